"""Layer normalisation, in the forms Keras writes it, as one op."""

import numpy as np

from tfvllm.graph import dims, op_traits
from tfvllm.graph.builder import Declined
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.pattern import add, constant, either, maybe, op
from tfvllm.graph.rewriter import Rule

_same = maybe(*op_traits.COPIES)


class FuseLayerNorm(Rule):
    """(x - mean)·rsqrt(var + ε)·γ + β -> _MklLayerNorm(x, γ, β, ε), over the last axis, ε taken from the graph.

    Grappler has a fusion of the same name that always uses ε = 0.001; this one leaves it nothing to match.
    """

    guarantee = Reordered()
    targets = ("onednn",)
    emits = ("_MklLayerNorm",)

    def pattern(self, x, gamma, beta):
        mean = op.Mean(x, constant("axes"), name="mean")
        variance = op.Mean(op.SquaredDifference(x, _same(mean)), constant("axes_2"), name="variance")
        rsqrt = op.Rsqrt(add(variance, constant("epsilon")))
        inv = op.Mul(rsqrt, gamma)
        shift = either(
            add(op.Mul(op.Neg(_same(mean)), inv), beta),
            op.Sub(beta, op.Mul(_same(mean), inv)),
        )
        centred = op.Sub(x, _same(mean))
        return either(
            add(op.Mul(x, inv), shift),
            add(op.Mul(op.Mul(centred, rsqrt), gamma), beta),
            add(op.Mul(centred, inv), beta),
        )

    def condition(self, graph, m):
        if m.x.rank is None:
            raise Declined("the rank is unknown")
        if m.x.dtype.name not in ("float32", "bfloat16"):
            raise Declined(f"no fused kernel for {m.x.dtype.name}")
        for axes in (m.axes, m.axes_2):
            content = axes.known_value if isinstance(axes.known_value, tuple) else (axes.known_value,)
            if content not in ((-1,), (m.x.rank - 1,)):
                raise Declined(f"it normalises over axes {content}, not over the last")
        width = m.x.shape[-1]
        if not isinstance(width, int):
            raise Declined("the width of the normalised axis is unknown")
        if not m.node("mean").attr("keep_dims") or not m.node("variance").attr("keep_dims"):
            raise Declined("the means drop their axis")
        for what, value in (("gamma", m.gamma), ("beta", m.beta)):
            if value.shape is None or any(d != 1 for d in value.shape[:-1]) or value.shape[-1:] != (width,):
                raise Declined(f"{what} is not one number for each of the {width} positions of the last axis")
            if not graph.is_static(value):
                raise Declined(f"{what} is computed at run time")
        if np.size(graph.constant(m.epsilon)) != 1:
            raise Declined("epsilon is not one number")

    def replacement(self, b, m):
        width = m.x.shape[-1]
        # On [rows, width]: the reshape back sinks below the next residual and meets the next product's own.
        y = b.op(
            "_MklLayerNorm",
            [
                b.reshape(m.x, (dims.product(m.x.shape[:-1]), width)),
                b.reshape(m.gamma, (width,)),
                b.reshape(m.beta, (width,)),
            ],
            epsilon=float(np.reshape(b.graph.constant(m.epsilon), ())),
        )[0]
        return b.reshape(y, m.x.shape, like=[m.x])

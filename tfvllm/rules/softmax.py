"""Softmax written out by hand becomes the op."""

from tfvllm.graph import op_traits
from tfvllm.graph.builder import Declined
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.pattern import constant, either, maybe, op
from tfvllm.graph.rewriter import Rule

_same = maybe(*op_traits.COPIES)


class RecogniseSoftmax(Rule):
    """exp(x - max x) / Σ exp(x - max x) -> softmax(x), over the last axis, for finite x."""

    guarantee = Reordered()

    def pattern(self, x):
        largest = op.Max(x, constant("axes"), name="largest")
        exponentials = op.Exp(op.Sub(x, _same(largest)), name="exponentials")
        total = op.Sum(exponentials, constant("axes_2"), name="total")
        return either(op.RealDiv(exponentials, total), op.Mul(exponentials, op.Reciprocal(total)))

    def condition(self, graph, m):
        if m.x.rank is None or m.x.rank < 1:
            raise Declined("the rank is unknown")
        for axes in (m.axes, m.axes_2):
            content = axes.known_value if isinstance(axes.known_value, tuple) else (axes.known_value,)
            if content not in ((-1,), (m.x.rank - 1,)):
                raise Declined(f"it is over axes {content}, not over the last")
        if not m.node("largest").attr("keep_dims") or not m.node("total").attr("keep_dims"):
            raise Declined("a reduction drops its axis")
        if m.x.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
            raise Declined(f"no kernel for {m.x.dtype.name}")

    def replacement(self, b, m):
        return b.Softmax(m.x)

"""Linear layers joined with what is linear around them: weights change, work goes."""

import numpy as np

from tfvllm.graph import dims
from tfvllm.graph.builder import Declined, Skip
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.pattern import add, either, op
from tfvllm.graph.rewriter import Rule

_LINEAR = ("MatMul", "Conv2D", "DepthwiseConv2dNative")


class ScaleIntoWeights(Rule):
    """(x ∗ w + b)·c -> x ∗ (w·c) + b·c,   c one number for each output channel (∗: MatMul, Conv2D, depthwise).

    What batch normalisation is at inference time: y·k + d, with k = γ/√(variance + ε).
    """

    guarantee = Reordered(within="w·c")

    def pattern(self, x, w, bias, c):
        product = op.any_of(*_LINEAR)(x, w, name="product")
        return op.Mul(either(op.BiasAdd(product, bias, name="biased"), product), c, name="out")

    def condition(self, graph, m):
        node = m.node("product")
        if m.c.shape is None or m.c.node is m.product.node or not graph.is_static(m.c):
            raise Skip("the factor is computed at run time")
        check_linear(graph, m, node)
        channels = m.product.shape[-1] if m.product.shape else None
        flat = tuple(d for d in m.c.shape if d != 1)
        if not isinstance(channels, int) or flat not in ((), (channels,)) or (flat and m.c.shape[-1] != channels):
            raise Declined("the factor is not one number for each output channel")
        if m.out.shape != m.product.shape:
            raise Declined("the factor widens the product")
        inner = [m.product] if m.get("biased") is None else [m.product, m.biased]
        if any(graph.single_use(v) is None for v in inner):
            raise Declined("the unscaled product is read elsewhere")

    def replacement(self, b, m):
        node, w = m.node("product"), m.w
        size = int(np.prod(m.c.shape, dtype=np.int64))
        c = b.reshape(m.c, (size,)) if size > 1 else b.reshape(m.c, ())
        factor = c
        if size > 1 and node.op == "DepthwiseConv2dNative":  # [height, width, channels, multiplier]
            factor = b.reshape(c, w.shape[2:])
        elif size > 1 and node.op == "MatMul" and node.attr("transpose_b"):
            factor = b.reshape(c, (size, 1))
        attrs = node.own_attrs()
        y = b.op(node.op, [m.x, b.Mul(w, factor)], **attrs)[0]
        return y if m.get("biased") is None else b.BiasAdd(y, b.Mul(m.bias, c))


def check_linear(graph, m, node) -> None:
    """Declines where the weights of a linear op may not be changed, or its channels are not last."""
    if node.attr("data_format", "NHWC") != "NHWC":
        raise Declined("the channels are not last (NCHW)")
    if not graph.is_static(m.w) or (m.get("bias") is not None and not graph.is_static(m.bias)):
        raise Declined("the weights are computed at run time")
    if not graph.is_private(m.w):
        raise Declined("others read the weight too, which would have to be stored twice")
    if m.w.shape is None or not all(isinstance(d, int) for d in m.w.shape):
        raise Declined("the shape of the weight is unknown")


class TermToBias(Rule):
    """x ∗ w + b -> BiasAdd(x ∗ w, b) where b is one number for each output channel: the form that kernels fuse."""

    guarantee = Reordered()

    def pattern(self, x, w, bias):
        return add(op.any_of(*_LINEAR)(x, w, name="product"), bias, name="out")

    def condition(self, graph, m):
        channels = m.product.shape[-1] if m.product.shape else None
        if m.bias.node is m.product.node or not graph.is_static(m.bias):
            raise Skip("the term is computed at run time")
        if m.node("product").attr("data_format", "NHWC") != "NHWC":
            raise Declined("the channels are not last (NCHW)")
        if m.bias.shape is None or not isinstance(channels, int) or dims.product(m.bias.shape) != channels:
            raise Declined("the term is not one number for each output channel")
        if m.bias.shape[-1:] != (channels,) or m.out.shape != m.product.shape:
            raise Declined("the term does not lie along the last axis")

    def replacement(self, b, m):
        return b.BiasAdd(m.product, b.reshape(m.bias, (m.product.shape[-1],)))


class BatchNormToAffine(Rule):
    """FusedBatchNormV3(x, γ, β, μ, σ²) -> x·k + (β - μ·k),   k = γ·rsqrt(σ² + ε): what it is at inference time."""

    guarantee = Reordered(within="x·k")

    def pattern(self, x, gamma, beta, mean, variance):
        names = ("FusedBatchNormV3", "FusedBatchNormV2", "FusedBatchNorm")
        return op.any_of(*names)(x, gamma, beta, mean, variance, name="norm")

    def condition(self, graph, m):
        node = m.node("norm")
        if node.attr("is_training", True):
            raise Declined("it is in training mode: its statistics come from the batch")
        if node.attr("data_format", "NHWC") != "NHWC":
            raise Declined("the channels are not last (NCHW)")
        if any(v.uses or graph.is_output(v) for v in node.outputs[1:]):
            raise Declined("its statistics are read")
        if not all(graph.is_static(v) for v in (m.gamma, m.beta, m.mean, m.variance)):
            raise Declined("its parameters are computed at run time")
        if m.x.dtype != m.gamma.dtype:
            raise Declined("mixed precision")

    def replacement(self, b, m):
        epsilon = b.const(m.node("norm").attr("epsilon"), m.gamma.dtype)
        k = b.Mul(m.gamma, b.Rsqrt(b.AddV2(m.variance, epsilon)))
        return b.AddV2(b.Mul(m.x, k), b.Sub(m.beta, b.Mul(m.mean, k)))


class JoinLinearLayers(Rule):
    """(x@A + a)@B + b -> x@(A@B) + (a@B + b), where that takes no more work: k·n ≤ k·h + h·n."""

    guarantee = Reordered(within="A@B")

    def pattern(self, x, w, bias, second):
        product = op.MatMul(x, w, name="product")
        return op.MatMul(either(op.BiasAdd(product, bias, name="biased"), product), second, name="out")

    def condition(self, graph, m):
        if not m.x.dtype.is_floating:
            raise Skip("integers")
        if m.node("product").attr("transpose_a") or m.node("out").attr("transpose_a"):
            raise Declined("an operand is transposed")
        if not graph.is_static(m.second):
            raise Skip("not two linear layers")
        if not graph.is_static(m.w) or (m.get("bias") is not None and not graph.is_static(m.bias)):
            raise Skip("not two linear layers")
        inner = [m.product] if m.get("biased") is None else [m.product, m.biased]
        if any(graph.single_use(v) is None for v in inner):
            raise Declined("the result of the first layer is read elsewhere")
        if not graph.is_private(m.w) or not graph.is_private(m.second):
            raise Declined("others read a weight too, which would have to be stored twice")
        hidden, n = m.product.shape[-1], m.out.shape[-1]
        k = m.w.shape[1] if m.node("product").attr("transpose_b") else m.w.shape[0]
        if not all(isinstance(d, int) for d in (k, hidden, n)):
            raise Declined("a width is unknown")
        if k * n > k * hidden + hidden * n:
            raise Declined(f"one layer {k}→{n} takes more work than {k}→{hidden}→{n}")

    def replacement(self, b, m):
        first, last = bool(m.node("product").attr("transpose_b")), bool(m.node("out").attr("transpose_b"))
        joined = b.MatMul(m.w, m.second, transpose_a=first, transpose_b=last)
        y = b.MatMul(m.x, joined)
        if m.get("biased") is None:
            return y
        hidden, n = m.product.shape[-1], m.out.shape[-1]
        bias = b.MatMul(b.reshape(m.bias, (1, hidden)), m.second, transpose_b=last)
        return b.BiasAdd(y, b.reshape(bias, (n,)))

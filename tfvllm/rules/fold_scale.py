"""A constant factor moves into the weights of the linear layer before it."""

import numpy as np

from tfvllm.graph.builder import Declined
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.pattern import constant, either, op
from tfvllm.graph.rewriter import Rule


class FoldScale(Rule):
    """(x @ w + b)·c -> x @ (w·c) + b·c.   Exact where c is a power of two (attention with heads of 64: c = 1/8)."""

    guarantee = Reordered(within="w·c")

    def pattern(self, x, w, bias):
        product = op.MatMul(x, w, name="product")
        return op.Mul(either(op.BiasAdd(product, bias, name="biased"), product), constant("c"))

    def condition(self, graph, m):
        if not graph.is_static(m.w) or (m.get("bias") is not None and not graph.is_static(m.bias)):
            raise Declined("the weights are computed at run time")
        if not graph.is_private(m.w):
            raise Declined("others read the weight too, which would have to be stored twice")
        if graph.constant(m.c).size != 1:
            raise Declined("the factor is not one number")
        inner = [m.product] if m.get("biased") is None else [m.product, m.biased]
        if any(graph.single_use(v) is None for v in inner):
            raise Declined("the unscaled product is read elsewhere")

    def replacement(self, b, m):
        node = m.node("product")
        c = b.const(np.reshape(b.graph.constant(m.c), ()), m.c.dtype)
        y = b.MatMul(m.x, b.Mul(m.w, c), transpose_a=node.attr("transpose_a"), transpose_b=node.attr("transpose_b"))
        return y if m.get("biased") is None else b.BiasAdd(y, b.Mul(m.bias, c))

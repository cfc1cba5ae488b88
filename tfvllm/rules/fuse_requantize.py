"""int8: a product hands its result on in the type that is read next."""

from __future__ import annotations

import tensorflow as tf

from tfvllm.graph.builder import Declined, Skip
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.int8_ops import STEPS, quantised_matmul
from tfvllm.graph.pattern import constant, op
from tfvllm.graph.rewriter import NodePass, Rule
from tfvllm.rules.bfloat16 import narrow_next


class FuseRequantize(Rule):
    """uint8(f(x @ w + b)) -> the product's own kernel writes bytes: what lies between two products is never float32."""

    guarantee = Approximate(
        max_error=1.0 / STEPS, domain="the range of the next product", source="ties may round the other way"
    )
    targets = ("onednn",)
    emits = ("_QuantizedMatMul",)

    def pattern(self, y):
        return op.QuantizeV2(y, constant("low"), constant("high"), T=tf.quint8, mode="MIN_FIRST")

    def condition(self, graph, m):
        if m.y.node.op != "_QuantizedMatMul" or m.y.node.attr("fused_ops")[-1] != "Dequantize":
            raise Skip("not a product in int8")
        if "Add" in m.y.node.attr("fused_ops"):
            raise Declined("a residual is fused with the product")
        if graph.single_use(m.y) is None:
            raise Declined("the product is read in float32 too")

    def replacement(self, b, m):
        node = m.y.node
        fused = [*node.attr("fused_ops")[:-1], "Requantize"]
        return quantised_matmul(b, [*node.inputs, m.low, m.high], fused, tf.quint8)


class EmitBfloat16Output(NodePass):
    """f(x @ w + b), which is rounded to bfloat16 next -> the product's own kernel writes bfloat16."""

    guarantee = Approximate(max_error=2.0**-8, domain="its result", source="bfloat16 keeps 8 significant bits")
    targets = ("onednn",)
    emits = ("_QuantizedMatMul",)
    ops = frozenset({"_QuantizedMatMul"})

    def rewrite(self, b, node):
        if node.output.dtype != tf.float32 or "Add" in node.attr("fused_ops"):
            return None
        if not narrow_next(b.graph, node.output, moved=True):
            return None
        narrow = quantised_matmul(b, list(node.inputs), node.attr("fused_ops"), tf.bfloat16)
        return {node.output: b.Cast(narrow, DstT=tf.float32)}

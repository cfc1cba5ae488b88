"""Matrix products in bfloat16: half the weights to read, twice the products in an instruction.

Products and what is fused with them run in bfloat16 (oneDNN accumulates in float32). Softmax, means, and every sum
that is not fused stay in float32; a layer norm runs on bfloat16 only where its input has been rounded to it anyway and
its result is rounded to it next (its inner arithmetic stays float32).
"""

import numpy as np
import tensorflow as tf

from tfvllm.graph.guarantee import Approximate, Exact
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.pattern import constant, op
from tfvllm.graph.rewriter import Builder, Declined, Pass, Rule, Skip

_PRODUCTS = ("MatMul", "_FusedMatMul", "BatchMatMulV2")
_MOVES = (
    "Reshape",
    "Transpose",
    "ExpandDims",
    "Squeeze",
    "StridedSlice",
    "Slice",
    "GatherV2",
    "Split",
    "SplitV",
    "Unpack",
)


def is_product(node: Node) -> bool:
    return node.op in _PRODUCTS and node.output.dtype == tf.float32


def lowered_product(graph: Graph, node: Node) -> Value:
    """The product computed in bfloat16, as float32. `node` stays in the graph."""
    b = Builder(graph, node.name)
    inputs = [b.Cast(v, DstT=tf.bfloat16) for v in node.inputs]
    attrs = node.own_attrs("T")
    return b.Cast(b.op(node.op, inputs, **attrs)[0], DstT=tf.float32)


class LowerProducts(Pass):
    """x @ w -> float32(bfloat16(x) @ bfloat16(w)), and what is fused with it (bias, activation, residual)."""

    guarantee = Approximate(
        max_error=2.0**-8, domain="products of float32", source="bfloat16 keeps 8 significant bits; float32 sums"
    )

    def run(self, rewriter):
        graph = rewriter.graph
        changed = False
        for node in graph.order():
            if not is_product(node) or not rewriter.allowed(self, node):
                continue
            out = lowered_product(graph, node)
            self.substitute(rewriter, node, out)
            changed = True
        return changed


class CancelCasts(Rule):
    """bfloat16(float32(x)) -> x for x in bfloat16: nothing was rounded."""

    guarantee = Exact()

    def pattern(self, x):
        return op.Cast(op.Cast(x, DstT=tf.float32), DstT=tf.bfloat16)

    def replacement(self, b, m):
        if m.x.dtype != tf.bfloat16:
            raise Skip("another type")
        return m.x


class SinkCasts(Pass):
    """reshape(float32(x)) -> float32(reshape(x)) for x in bfloat16; transposes, slices, splits, shapes too."""

    guarantee = Exact()

    def run(self, rewriter):
        graph = rewriter.graph
        changed = False
        for node in graph.order():
            if node.op not in (*_MOVES, "Shape") or graph.nodes.get(node.name) is not node:
                continue
            at = 1 if node.op == "Split" else 0
            cast = node.inputs[at].node
            if cast.op != "Cast" or cast.inputs[0].dtype != tf.bfloat16 or cast.output.dtype != tf.float32:
                continue
            if not rewriter.allowed(self, node):
                continue
            b = Builder(graph, node.name)
            inputs = list(node.inputs)
            inputs[at] = cast.inputs[0]
            types = [k for k, a in node.attrs.items() if a.type == tf.float32.as_datatype_enum]
            attrs = node.own_attrs(*types)
            outputs = b.op(node.op, inputs, **attrs)
            if node.op != "Shape":
                outputs = [b.Cast(v, DstT=tf.float32) for v in outputs]
            self.substitute(rewriter, node, *outputs)
            changed = True
        return changed


class SinkCastBelowMask(Rule):
    """where(mask, float32(x), 0) -> float32(where(mask, x, 0)) for x in bfloat16."""

    guarantee = Exact()

    def pattern(self, mask, x):
        return op.SelectV2(mask, op.Cast(x, DstT=tf.float32), constant("zero"))

    def condition(self, graph, m):
        if m.x.dtype != tf.bfloat16 or np.any(graph.constant(m.zero) != 0):
            raise Skip("not a blanked value in bfloat16")

    def replacement(self, b, m):
        return b.Cast(b.SelectV2(m.mask, m.x, b.Cast(m.zero, DstT=tf.bfloat16)), DstT=tf.float32)


class LowerBias(Rule):
    """float32(x) + b -> float32(x + bfloat16(b)) for a product x in bfloat16, so that the runtime can fuse the two."""

    guarantee = Approximate(max_error=2.0**-8, domain="b and x + b", source="bfloat16 keeps 8 significant bits")

    def pattern(self, x, bias):
        return op.BiasAdd(op.Cast(x, DstT=tf.float32, name="wide"), bias)

    def condition(self, graph, m):
        if m.x.dtype != tf.bfloat16 or m.x.node.op != "MatMul":
            raise Skip("not a product in bfloat16")
        if graph.sole_reader(m.wide) is None:
            raise Declined("the product without its bias is read elsewhere")

    def replacement(self, b, m):
        return b.Cast(b.BiasAdd(m.x, b.Cast(m.bias, DstT=tf.bfloat16)), DstT=tf.float32)


class LowerLayerNorm(Rule):
    """bfloat16(layernorm(float32(x), γ, β)) -> layernorm(x, bfloat16(γ), bfloat16(β)) for x in bfloat16."""

    guarantee = Approximate(max_error=2.0**-8, domain="γ and β", source="bfloat16 keeps 8 significant bits")
    targets = ("onednn",)
    emits = ("_MklLayerNorm",)

    def pattern(self, x, gamma, beta):
        return op._MklLayerNorm(op.Cast(x, DstT=tf.float32), gamma, beta, name="norm")

    def condition(self, graph, m):
        if m.x.dtype != tf.bfloat16:
            raise Skip("another type")
        if graph.is_result(m.norm) or any(
            r.op != "Cast" or r.output.dtype != tf.bfloat16 for r in graph.readers(m.norm)
        ):
            raise Declined("something reads its result in float32")

    def replacement(self, b, m):
        inputs = [m.x, b.Cast(m.gamma, DstT=tf.bfloat16), b.Cast(m.beta, DstT=tf.bfloat16)]
        return b.Cast(b.op("_MklLayerNorm", inputs, epsilon=m.node("norm").attr("epsilon"))[0], DstT=tf.float32)

"""Matrix products in bfloat16: half the weights to read, twice the products in an instruction.

Products and what is fused with them run in bfloat16 (oneDNN accumulates in float32). Means and every sum that is not
fused stay in float32; a layer norm or a softmax runs on bfloat16 only where its input has been rounded to it anyway and
its result is rounded to it next (oneDNN's inner arithmetic stays float32).
"""

import numpy as np
import tensorflow as tf

from tfvllm.graph import op_traits
from tfvllm.graph.builder import Builder, Declined, Skip
from tfvllm.graph.guarantee import Approximate, Exact
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.pattern import constant, op
from tfvllm.graph.rewriter import NodePass, Rule

_MATMULS = op_traits.MATMULS | {"BatchMatMulV2"}  # as layers and attention have them here
_LARGEST = float(tf.bfloat16.max)
_MOVES = op_traits.RESHAPES | op_traits.SLICES | op_traits.PARTS | {"Transpose", "GatherV2"}


def is_matmul(node: Node) -> bool:
    return node.op in _MATMULS and node.output.dtype == tf.float32


def lowered_matmul(graph: Graph, node: Node) -> Value:
    """The product computed in bfloat16, as float32. `node` stays in the graph."""
    return _lowered(Builder(graph, node.name), node)


def _lowered(b: Builder, node: Node) -> Value:
    inputs = [b.Cast(v, DstT=tf.bfloat16) for v in node.inputs]
    attrs = node.own_attrs("T")
    return b.Cast(b.op(node.op, inputs, **attrs)[0], DstT=tf.float32)


class LowerProducts(NodePass):
    """x @ w -> float32(bfloat16(x) @ bfloat16(w)), and what is fused with it (bias, activation, residual).

    `weights`: products with weights too, not only those of two computed values.
    """

    guarantee = Approximate(
        max_error=2.0**-8, domain="products of float32", source="bfloat16 keeps 8 significant bits; float32 sums"
    )
    ops = _MATMULS

    def __init__(self, weights: bool = True):
        self.weights = weights

    def rewrite(self, b, node):
        if not is_matmul(node) or (not self.weights and any(b.graph.is_static(v) for v in node.inputs)):
            return None
        return {node.output: _lowered(b, node)}


class CancelCasts(Rule):
    """bfloat16(float32(x)) -> x for x in bfloat16: nothing was rounded."""

    guarantee = Exact()

    def pattern(self, x):
        return op.Cast(op.Cast(x, DstT=tf.float32), DstT=tf.bfloat16)

    def replacement(self, b, m):
        if m.x.dtype != tf.bfloat16:
            raise Skip("another type")
        return m.x


class SinkCasts(NodePass):
    """reshape(float32(x)) -> float32(reshape(x)) for x in bfloat16; transposes, slices, splits, shapes too."""

    guarantee = Exact()
    ops = _MOVES | {"Shape"}

    def rewrite(self, b, node):
        at = 1 if node.op == "Split" else 0
        narrow = _widened(node.inputs[at])
        if narrow is None:
            return None
        inputs = list(node.inputs)
        inputs[at] = narrow
        types = [k for k, a in node.attrs.items() if a.type == tf.float32.as_datatype_enum]
        outputs = b.op(node.op, inputs, **node.own_attrs(*types))
        if node.op != "Shape":
            outputs = [b.Cast(v, DstT=tf.float32) for v in outputs]
        return dict(zip(node.outputs, outputs))


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
        if graph.single_use(m.wide) is None:
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
        if not narrow_next(graph, m.norm):
            raise Declined("something reads its result in float32")

    def replacement(self, b, m):
        inputs = [m.x, b.Cast(m.gamma, DstT=tf.bfloat16), b.Cast(m.beta, DstT=tf.bfloat16)]
        return b.Cast(b.op("_MklLayerNorm", inputs, epsilon=m.node("norm").attr("epsilon"))[0], DstT=tf.float32)


class LowerSoftmax(NodePass):
    """bfloat16(softmax(float32(s) + mask)) -> softmax(s + bfloat16(mask)) for scores s in bfloat16.

    So too without a mask, and for where(mask, float32(s), low). Nothing of the size of the scores is then float32.
    """

    guarantee = Approximate(max_error=2.0**-8, domain="s + mask", source="bfloat16 keeps 8 significant bits")
    targets = ("onednn",)  # other kernels of softmax add in bfloat16
    ops = frozenset({"Softmax"})

    def rewrite(self, b, node):
        scores = self._narrow(b, node) if narrow_next(b.graph, node.output) else None
        return None if scores is None else {node.output: b.Cast(b.Softmax(scores), DstT=tf.float32)}

    @staticmethod
    def _narrow(b: Builder, node: Node) -> Value | None:
        """The input of a softmax in bfloat16, where it was that before it was masked."""
        graph, inner = b.graph, node.inputs[0]
        if graph.single_use(inner) is not node:
            return None
        if inner.node.op not in ("AddV2", "SelectV2"):
            return _widened(inner)
        *chosen, scores, mask = inner.node.inputs
        if inner.node.op == "AddV2" and _widened(scores) is None:
            scores, mask = mask, scores
        narrow = _widened(scores)
        if narrow is None or not _stays_finite(graph, mask):
            return None
        return b.op(inner.node.op, [*chosen, narrow, b.Cast(mask, DstT=tf.bfloat16)])[0]


def _stays_finite(graph: Graph, value: Value) -> bool:
    """Whether no number that a value is made of is finite in float32 and not in bfloat16, such as float32's lowest.

    Added to all scores of a row it would make them -inf, and their softmax NaN. A value of another graph may be any.
    """
    seen: set[Node] = set()
    stack = [value]
    while stack:
        v = stack.pop()
        if v.node in seen or not v.dtype.is_floating:
            continue
        seen.add(v.node)
        known = graph.array(v) if graph.is_weight(v) else graph.constant(v)
        if known is not None:
            if np.any(np.isfinite(known) & (np.abs(known) > _LARGEST)):
                return False
        elif not v.node.inputs:
            return False
        stack.extend(v.node.inputs if known is None else ())
    return True


def _widened(value: Value) -> Value | None:
    """What is in bfloat16 and cast to this float32."""
    node = value.node
    wide = node.op == "Cast" and node.inputs[0].dtype == tf.bfloat16 and value.dtype == tf.float32
    return node.inputs[0] if wide else None


def narrow_next(graph: Graph, value: Value, moved: bool = False) -> bool:
    """Whether a value is rounded to bfloat16 by all that read it; `moved`: or first moved or blanked."""
    readers = graph.uses(value)
    if not readers or graph.is_output(value):
        return False

    def narrow(reader: Node) -> bool:
        if moved and reader.op in _MOVES | {"SelectV2"}:
            return all(narrow_next(graph, v, moved) for v in reader.outputs if graph.uses(v) or graph.is_output(v))
        return reader.op == "Shape" or (reader.op == "Cast" and reader.output.dtype == tf.bfloat16)

    return all(narrow(r) for r in readers)

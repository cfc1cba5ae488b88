"""Few numbers become bytes by ops that need no preparing."""

from __future__ import annotations

from functools import partial

import tensorflow as tf

from tfvllm.graph import dims, onednn_costs
from tfvllm.graph.branches import BySize, as_it_is
from tfvllm.graph.builder import Builder
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.ir import Node, Value
from tfvllm.graph.rewriter import NodePass


class UnfuseSmallQuantize(NodePass):
    """QuantizeV2(x, low, high) -> byte(clip(rint(x·s - low·s), 0, 255)), s = 255 / (high - low).

    For fewer than 2¹⁶ elements; chosen while rewriting where the size is known, and when the graph runs (`StatelessIf`)
    where it is not.
    """

    guarantee = Approximate(
        max_error=1.0 / 255.0,
        domain="the range of the bytes",
        source="ties may fall the other way: one byte in 10⁴ or fewer",
    )
    targets = ("onednn",)
    ops = frozenset({"QuantizeV2"})

    def begin(self, rewriter):
        return partial(_chosen, BySize(rewriter, "by_size", None, onednn_costs.QUANTIZE_ELEMENTS))


def _chosen(sizes: BySize, b: Builder, node: Node) -> dict[Value, Value] | None:
    if not _known(node):
        return None
    x = node.inputs[0]
    new = sizes.choose(
        b,
        dims.product(x.shape),
        lambda b: b.Size(x, out_type=tf.int64),
        [x],
        [("quantize_few", partial(plain, node=node)), ("quantize", partial(_same, node=node))],
        node.output,
        node.op,
        key=x.shape,
    )
    return None if new is None else {node.output: new}


def _known(node: Node) -> bool:
    """Whether the range is constant, and only the bytes are read."""
    if any(v.node.op != "Const" or v.shape != () for v in node.inputs[1:]) or any(v.uses for v in node.outputs[1:]):
        return False
    low, high = _ends(node)
    as_bytes = node.attr("mode") == "MIN_FIRST" and node.outputs[0].dtype == tf.quint8
    return low < high and as_bytes and node.inputs[0].shape is not None


def _ends(node: Node) -> list[float]:
    return [float(v.node.attr("value")) for v in node.inputs[1:]]


def plain(b: Builder, values: list[Value], node: Node) -> Value:
    """The bytes of a `QuantizeV2` whose range is constant, with ops that oneDNN does not prepare."""
    low, high = _ends(node)
    steps = 255.0 / (high - low)
    y = b.AddV2(b.Mul(values[0], b.const(steps, tf.float32)), b.const(-low * steps, tf.float32))
    y = b.ClipByValue(b.Rint(y), b.const(0.0, tf.float32), b.const(255.0, tf.float32))
    return b.Bitcast(b.Cast(y, DstT=tf.uint8), type=tf.quint8)


def _same(b: Builder, values: list[Value], node: Node) -> Value:
    return as_it_is(b, [*values, *(b.const(end, tf.float32) for end in _ends(node))], node)

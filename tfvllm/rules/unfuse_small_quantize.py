"""Few numbers become bytes by ops that need no preparing."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfvllm.graph import dims, onednn_costs
from tfvllm.graph.branches import either
from tfvllm.graph.builder import Builder
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.ir import Node, Value
from tfvllm.graph.rewriter import Pass


class UnfuseSmallQuantize(Pass):
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

    def run(self, rewriter):
        graph = rewriter.graph
        few: dict[Any, Value] = {}  # shape -> whether it has fewer elements than that
        changed = False
        for node in graph.order():
            if node.op != "QuantizeV2" or not rewriter.allowed(self, node) or not _known(node):
                continue
            x, size = node.inputs[0], dims.product(node.inputs[0].shape)
            b = Builder(graph, node.name)
            if isinstance(size, int):
                if size >= onednn_costs.QUANTIZE_ELEMENTS:
                    continue
                new = plain(b, node, x)
            else:
                if x.shape not in few:
                    few[x.shape] = b.Less(
                        b.Size(x, out_type=tf.int64), b.const(onednn_costs.QUANTIZE_ELEMENTS, tf.int64)
                    )
                new = either(
                    rewriter,
                    f"{node.name}/by_size",
                    few[x.shape],
                    [x],
                    [
                        ("quantize_few", lambda b, v, n=node: plain(b, n, v[0])),  # type: ignore[misc]
                        ("quantize", lambda b, v, n=node: _same(b, n, v[0])),  # type: ignore[misc]
                    ],
                    node.outputs[0],
                    node.op,
                )
            self.substitute(rewriter, node, new)
            changed = True
        return changed


def _known(node: Node) -> bool:
    """Whether the range is constant, and only the bytes are read."""
    if any(v.node.op != "Const" or v.shape != () for v in node.inputs[1:]) or any(v.readers for v in node.outputs[1:]):
        return False
    low, high = _ends(node)
    as_bytes = node.attr("mode") == "MIN_FIRST" and node.outputs[0].dtype == tf.quint8
    return low < high and as_bytes and node.inputs[0].shape is not None


def _ends(node: Node) -> list[float]:
    return [float(v.node.attr("value")) for v in node.inputs[1:]]


def plain(b: Builder, node: Node, x: Value) -> Value:
    """The bytes of a `QuantizeV2` whose range is constant, with ops that oneDNN does not prepare."""
    low, high = _ends(node)
    steps = 255.0 / (high - low)
    y = b.AddV2(b.Mul(x, b.const(steps, tf.float32)), b.const(-low * steps, tf.float32))
    y = b.ClipByValue(b.Rint(y), b.const(0.0, tf.float32), b.const(255.0, tf.float32))
    return b.Bitcast(b.Cast(y, DstT=tf.uint8), type=tf.quint8)


def _same(b: Builder, node: Node, x: Value) -> Value:
    attrs = node.own_attrs()
    return b.op("QuantizeV2", [x, *(b.const(end, tf.float32) for end in _ends(node))], **attrs)[0]

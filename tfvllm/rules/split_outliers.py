"""int8: the channels too large for bytes are computed apart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from tfvllm.graph import op_traits
from tfvllm.graph.builder import Builder
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.rewriter import Pass

_ZERO_AT_ZERO = op_traits.FUSED_ACTIVATIONS - {"Sigmoid"}


def can_split(graph: Graph, product: Node) -> bool:
    """Whether channels of a product's input can be computed apart: `SplitOutliers` on it."""
    value = product.inputs[0]
    before = value.node
    return (
        product.op == "_FusedMatMul"
        and product.attr("fused_ops") in (["BiasAdd"], ["BiasAdd", "Add"])
        and before.op == "_FusedMatMul"
        and before.attr("fused_ops")[0] == "BiasAdd"
        and all(f in _ZERO_AT_ZERO for f in before.attr("fused_ops")[1:])
        and graph.single_use(value) is product
        and all(graph.is_static(v) for v in (*before.inputs[1:3], *product.inputs[1:3]))
        and graph.is_private(before.inputs[1])
        and graph.is_private(product.inputs[1])
    )


class SplitOutliers(Pass):
    """f(x @ v + a) @ w + b -> f(x @ v' + a') @ w' + (f(x @ v_S + a_S) @ w_S + b), the channels S apart, in float32.

    The few hidden channels whose values dwarf all others would take the steps of int8 from them. v', a' and w' are v, a
    and w with the columns and rows of S zeroed: sizes stay what they are.
    """

    guarantee = Reordered()
    targets = ("onednn",)
    emits = ("_FusedMatMul",)

    def __init__(self, channels: Mapping[str, np.ndarray]):
        self.channels = channels  # name of the second product -> indices of the channels
        self.done: set[str] = set()

    def run(self, rewriter):
        graph = rewriter.graph
        changed = False
        for name, channels in self.channels.items():
            node = graph.nodes.get(name)
            if name in self.done or node is None or not can_split(graph, node) or not rewriter.allowed(self, node):
                continue
            self.done.add(name)
            self._split(graph, node, np.asarray(channels, np.int32))
            rewriter.fire(self, node)
            changed = True
        return changed

    @staticmethod
    def _split(graph: Graph, product: Node, channels: np.ndarray) -> None:
        before = product.inputs[0].node
        b = Builder(graph, product.name + "/outliers")
        places = b.const(channels, tf.int32)
        kept = np.ones(product.inputs[0].shape[-1], np.float32)
        kept[channels] = 0.0

        def apart(weight: Value, axis: int) -> Value:
            return b.GatherV2(weight, places, b.const(axis, tf.int32))

        def rest(weight: Value, axis: int) -> Value:
            return b.Mul(weight, b.const(kept[:, None] if weight.rank == 2 and axis == 0 else kept, tf.float32))

        columns, rows = int(not before.attr("transpose_b")), int(bool(product.attr("transpose_b")))
        v, a, w = before.inputs[1], before.inputs[2], product.inputs[1]
        few = b.op(
            "_FusedMatMul",
            [before.inputs[0], apart(v, columns), apart(a, 0)],
            num_args=1,
            fused_ops=before.attr("fused_ops"),
            transpose_b=before.attr("transpose_b"),
        )[0]
        terms = [few, apart(w, rows), product.inputs[2], *product.inputs[3:]]
        extra = b.op(
            "_FusedMatMul",
            terms,
            num_args=len(terms) - 2,
            fused_ops=product.attr("fused_ops"),
            transpose_b=product.attr("transpose_b"),
        )[0]
        graph.set_input(before, 1, rest(v, columns))
        graph.set_input(before, 2, rest(a, 0))
        zeros = b.const(np.zeros(extra.shape[-1], np.float32), tf.float32)
        joined = b.op(
            "_FusedMatMul",
            [product.inputs[0], rest(w, rows), zeros, extra],
            hint="joined",
            num_args=2,
            fused_ops=["BiasAdd", "Add"],
            transpose_b=product.attr("transpose_b"),
        )[0]
        graph.replace(product.output, joined)
        graph.prune(product)

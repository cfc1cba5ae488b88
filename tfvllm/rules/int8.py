"""Matrix products in int8: a quarter of the weights to read, four times the products in an instruction.

`y = x @ w + b` becomes `y ≈ (s·m_j / 127)·(q(x) @ q(w)) + b_j - z·s·Σ_k ŵ_kj`. The input is `q(x) = round(x/s) + z`, an
unsigned byte: one range for all of `x`, found on calibration inputs; what lies outside saturates. The weight is
`q(w) = round(127·w/m_j)` with one scale `m_j = max |w_·j|` for each column, and `ŵ` is what it stands for. The kernel
knows no zero point; what `z` adds to each column is known beforehand and goes into the bias. The products are summed in
int32; everything between them stays float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.graph import onednn_costs, op_traits
from tfvllm.graph.builder import Builder
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.int8_ops import LEVELS, Range, quantise_weight, quantised_matmul
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.rewriter import Pass

SMALLEST_TABLE = 1 << 16  # elements of a table of embeddings: below, it is no size to speak of


def why_not(graph: Graph, node: Node) -> str | None:
    """The reason for which a product cannot become int8; None if it can; an empty one if it is no candidate at all."""
    if node.op == "GatherV2":
        return _why_no_table(graph, node)
    if node.op not in op_traits.MATMULS or node.output.dtype != tf.float32:
        return ""
    x, w = node.inputs[:2]
    fused = node.attr("fused_ops", []) or []
    if node.attr("transpose_a"):
        return "the first operand is transposed"
    if fused and fused[0] != "BiasAdd":
        return f"no int8 kernel with {', '.join(fused)} fused"
    if any(f not in op_traits.FUSED_ACTIVATIONS | {"BiasAdd", "Add"} for f in fused):
        return f"no int8 kernel with {', '.join(fused)} fused"
    if not (graph.is_weight(w) or w.node.op == "Const"):
        return "its weight is computed at run time" if not graph.is_static(w) else "its weight is shared or computed"
    if w.shape is None or not all(isinstance(d, int) for d in w.shape) or x.rank != 2:
        return "its sizes are unknown"
    least, side = onednn_costs.INT8_ELEMENTS, onednn_costs.INT8_SIDE
    if int(np.prod(w.shape)) < least or min(w.shape) < side:
        return f"its weight has fewer than {least} elements, or a side below {side}: int8 would gain nothing"
    array = graph.array(w)
    if array is None or not np.all(np.isfinite(array)):
        return "its weight holds NaN or infinities"
    return None


def _why_no_table(graph: Graph, node: Node) -> str | None:
    table, _, axis = node.inputs
    if not graph.is_weight(table) or table.dtype != tf.float32 or table.rank != 2:
        return ""
    if graph.constant(axis) is None or int(graph.constant(axis)) != 0 or node.attr("batch_dims", 0):  # type: ignore[arg-type]
        return ""
    array = graph.array(table)
    assert array is not None
    if array.size < SMALLEST_TABLE:
        return ""
    return None if np.all(np.isfinite(array)) else "its table holds NaN or infinities"


@dataclass(frozen=True)
class Int8Form:
    """Writes the int8 form of nodes into a graph. Weights are made once for all signatures (`shared`)."""

    graph: Graph
    shared: dict[Any, Any]
    quantised: dict[Any, Value]  # (value, range) -> the value in int8: several products may read one input

    def table(self, node: Node) -> Value:
        """The rows that `node` gathers, from a table in int8 with one scale a row. `node` stays in the graph."""
        graph, b, (table, ids, axis) = self.graph, Builder(self.graph, node.name), node.inputs
        source = graph.captures[table.node.inputs[0].node.name].tensor
        key = ("int8 rows", id(source))
        if key not in self.shared:
            content, scale = quantise_weight(graph.array(table).T)  # type: ignore[union-attr]
            self.shared[key] = (
                tf.Variable(np.ascontiguousarray(content.T), trainable=False, name="table_int8"),
                tf.Variable((scale / np.float32(LEVELS))[:, None], trainable=False, name="table_scale"),
                source,  # held: its id is the key
            )
        content, scale, _ = self.shared[key]
        rows = b.GatherV2(graph.weight(graph.unique(f"{node.name}/int8"), content, tf.int8), ids, axis)
        steps = b.GatherV2(graph.weight(graph.unique(f"{node.name}/scale"), scale, tf.float32), ids, axis)
        return b.Mul(b.Cast(rows, DstT=tf.float32), steps)

    def build(self, node: Node, span: Range | None) -> Value:
        """The int8 form of `node`, which stays in the graph.

        Args:
            span: what the smallest and the largest byte of its input stand for (`align_zero_point`). None for a table.
        """
        if span is None:
            return self.table(node)
        b = Builder(self.graph, node.name)
        x, (low, high) = node.inputs[0], span
        key = (x.node.name, x.index, span)
        if key not in self.quantised:
            ends = [b.const(low, tf.float32), b.const(high, tf.float32)]
            self.quantised[key] = b.op(
                "QuantizeV2", [x, *ends], T=tf.quint8, mode="MIN_FIRST", ensure_minimum_range=0.0
            )[0]
        weight, scale, sums = self._weight(node)
        fused = list(node.attr("fused_ops", []) or ["BiasAdd"])
        bias = b.const((low * sums).astype(np.float32), tf.float32)
        if len(node.inputs) > 2:
            bias = b.AddV2(b.reshape(node.inputs[2], sums.shape), bias)
        return quantised_matmul(
            b,
            [
                *(self.quantised[key], b.Bitcast(weight, type=tf.qint8), bias, *node.inputs[3:]),
                *(b.const(0.0, tf.float32), b.const(high - low, tf.float32), scale, scale),
            ],
            [*fused, "Dequantize"],
            tf.float32,
        )

    def _weight(self, node: Node) -> tuple[Value, Value, np.ndarray]:
        """Readers of the variables that hold a weight (int8[inputs, outputs], float32[outputs]); its column sums."""
        graph, w = self.graph, node.inputs[1]
        transposed = bool(node.attr("transpose_b"))
        source = graph.captures[w.node.inputs[0].node.name].tensor if graph.is_weight(w) else w.node
        key = ("int8", id(source), transposed)
        if key not in self.shared:
            array = graph.array(w)
            assert array is not None
            content, scale = quantise_weight(np.ascontiguousarray(array.T if transposed else array))
            name = node.name.rsplit("/", 1)[-1]
            self.shared[key] = (
                tf.Variable(content, trainable=False, name=f"{name}_int8"),
                tf.Variable(scale, trainable=False, name=f"{name}_scale"),
                content.sum(axis=0, dtype=np.int64) * (scale / LEVELS),
                source,  # held: its id is the key
            )
        content, scale, sums, _ = self.shared[key]
        return (
            graph.weight(graph.unique(f"{node.name}/int8"), content, tf.int8),
            graph.weight(graph.unique(f"{node.name}/scale"), scale, tf.float32),
            sums,
        )


class QuantizeProducts(Pass):
    """x @ w + b -> (s·m/127)·(uint8(x/s + z) @ int8(127·w/m)) + b', with s, z calibrated and m for each column.

    What is fused with the product (activation, residual) stays fused.
    """

    targets = ("onednn",)
    emits = ("_QuantizedMatMul",)

    def __init__(self, ranges: Mapping[str, Range], guarantee: Approximate):
        self.ranges = ranges  # node name -> what the smallest and the largest byte of its input stand for
        self.guarantee = guarantee

    def run(self, rewriter):
        graph = rewriter.graph
        nodes = [graph.nodes[n] for n in self.ranges if n in graph.nodes and rewriter.allowed(self, graph.nodes[n])]
        maker = Int8Form(graph, rewriter.shared_weights, {})
        for node in nodes:
            new = maker.build(node, self.ranges[node.name])
            rewriter.fire(self, node)
            graph.replace(node.output, new)
        for node in nodes:
            self.removed(rewriter, node)
        return bool(nodes)


class QuantizeTables(Pass):
    """gather(table, ids) -> float32(gather(int8(127·table/m), ids))·gather(m/127, ids), with m for each row."""

    def __init__(self, names: Collection[str], guarantee: Approximate):
        self.names = names
        self.guarantee = guarantee

    def run(self, rewriter):
        graph = rewriter.graph
        nodes = [graph.nodes[n] for n in self.names if n in graph.nodes and rewriter.allowed(self, graph.nodes[n])]
        for node in nodes:
            new = Int8Form(graph, rewriter.shared_weights, {}).table(node)
            self.substitute(rewriter, node, new)
        return bool(nodes)

"""Embeddings: lookups as plain ops, and sums where a table is read at a known place (one segment, given as zeros)."""

from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.graph import dims, op_traits
from tfvllm.graph.builder import Declined, Skip
from tfvllm.graph.guarantee import Exact, Reordered
from tfvllm.graph.ir import Graph, Value
from tfvllm.graph.pattern import add, either, op
from tfvllm.graph.rewriter import Rule

_REPEATS = op_traits.RESHAPES | op_traits.SLICES | {"Identity", "Tile", "BroadcastTo"}  # no element that x has not
_MAX_DEPTH = 8


class PlainLookup(Rule):
    """ResourceGather(variable, i) -> GatherV2(variable's value, i): what other rules know, where nothing assigns it."""

    guarantee = Exact()

    def pattern(self, variable, index):
        return op.ResourceGather(variable, index, name="rows")

    def condition(self, graph, m):
        if m.node("rows").attr("batch_dims"):
            raise Declined("a table for each row")
        capture = graph.captures.get(m.variable.node.name)
        if capture is None or not capture.frozen:
            raise Declined("the table is assigned")

    def replacement(self, b, m):
        table = b.ReadVariableOp(m.variable, dtype=m.rows.dtype)
        return b.GatherV2(table, m.index, b.const(0, tf.int32))


class KnownRow(Rule):
    """x + table[i] -> x + table[k], where every element of i is known to be k: one row for all positions, no lookup."""

    guarantee = Exact()

    def pattern(self, x, table, index, axis):
        return add(x, op.GatherV2(table, index, axis, name="rows"), name="out")

    def condition(self, graph, m):
        k = uniform(graph, m.index)
        if k is None:
            raise Skip("the index is not known")
        if not graph.is_static(m.table) or m.table.rank != 2 or not isinstance(m.table.shape[0], int):
            raise Skip("the table is computed at run time")
        if m.axis.known_value != 0 or m.node("rows").attr("batch_dims"):
            raise Skip("not a lookup of rows")
        if not 0 <= k < m.table.shape[0]:
            raise Declined(f"row {k} of a table of {m.table.shape[0]}: an error at run time")
        if m.out.shape is None or m.x.shape != m.out.shape:
            raise Declined("the sum has the shape of the lookup")

    def replacement(self, b, m):
        k = int(uniform(b.graph, m.index))
        row = b.StridedSlice(m.table, b.ints(k), b.ints(k + 1), b.ints(1), shrink_axis_mask=1)
        return b.AddV2(m.x, row)


class RowIntoTable(Rule):
    """x + table[:n] + row -> x + (table + row)[:n], and likewise for looked-up rows: the sum is in the weights."""

    guarantee = Reordered(within="table + row")

    def pattern(self, x, table, row, begin, size, index, axis):
        cut = op.Slice(table, begin, size, name="part")
        rows = either(cut, op.GatherV2(table, index, axis, name="part"))
        return add(add(x, rows, name="inner"), row, name="out")

    def condition(self, graph, m):
        if not graph.is_static(m.row) or not graph.is_static(m.table) or m.table.rank != 2 or m.row.node is m.part.node:
            raise Skip("not a row of weights and a table")
        width = m.table.shape[1]
        if not isinstance(width, int) or m.row.shape is None or dims.product(m.row.shape) != width:
            raise Skip("not one row")
        if m.row.shape[-1] != width or m.part.shape is None or m.part.shape[-1] != width:
            raise Declined("only some of the columns are read")
        if m.get("axis") is not None and (m.axis.known_value != 0 or m.node("part").attr("batch_dims")):
            raise Skip("not a lookup of rows")
        if m.out.shape != m.inner.shape:
            raise Declined("the row widens the sum")
        if graph.single_use(m.inner) is None or graph.single_use(m.part) is None:
            raise Declined("the sum without the row is read elsewhere")
        if not graph.is_private(m.table):
            raise Declined("others read the table too, which would have to be stored twice")

    def replacement(self, b, m):
        table = b.AddV2(m.table, b.reshape(m.row, (m.table.shape[1],)))
        node = m.node("part")
        attrs = node.own_attrs()
        part = b.op(node.op, [table, *node.inputs[1:]], **attrs)[0]
        part.shape = m.part.shape
        return b.AddV2(m.x, part)


def uniform(graph: Graph, value: Value, depth: int = _MAX_DEPTH) -> Any:
    """The one number that all elements of `value` are known to be, however many there are; None if it is not known."""
    node = value.node
    if node.op == "Const":
        content = np.asarray(node.attr("value"))
        same = content.size and content.dtype.kind in "iub" and (content == content.flat[0]).all()
        return content.flat[0].item() if same else None
    if node.op in ("ZerosLike", "OnesLike") and (value.dtype.is_integer or value.dtype.is_bool):
        return int(node.op == "OnesLike")
    if depth == 0 or not node.inputs:
        return None
    if node.op == "Fill":
        return uniform(graph, node.inputs[1], depth - 1)
    if node.op in _REPEATS:
        return uniform(graph, node.inputs[0], depth - 1)
    if node.op == "Cast" and value.dtype.is_integer:
        k = uniform(graph, node.inputs[0], depth - 1)
        return None if k is None else int(k)
    if node.op == "SelectV2":
        condition, *branches = (uniform(graph, v, depth - 1) for v in node.inputs)
        return None if condition is None else branches[0 if condition else 1]
    if node.op in _COMPUTED and len(node.inputs) == 2 and not value.dtype.is_floating:
        a, b = (uniform(graph, v, depth - 1) for v in node.inputs)
        return None if a is None or b is None else _COMPUTED[node.op](a, b)
    return None


_COMPUTED: dict[str, Any] = {
    "AddV2": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Less": lambda a, b: a < b,
    "Greater": lambda a, b: a > b,
    "LessEqual": lambda a, b: a <= b,
    "GreaterEqual": lambda a, b: a >= b,
}

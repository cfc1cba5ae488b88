"""Assertions that hold by construction.

Ragged tensors check themselves at every call: that row splits begin at 0, never fall, and end at the number of values.
Each check is a conditional with two functions behind it, and each tokenizer carries a dozen. Where the splits come from
an op whose definition promises just that, the check can never fail.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tfvllm.graph import ops, strided_slice
from tfvllm.graph.guarantee import Exact
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.rewriter import Pass

# Ops that give row splits, and the outputs that these partition. A row of splits for each element of the first input.
_PARTITIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "RegexSplitWithOffsets": ("row_splits", ("tokens", "begin_offsets", "end_offsets")),
    "FastWordpieceTokenizeWithOffsets": (
        "output_row_splits",
        ("output_subwords", "output_ids", "start_values", "end_values"),
    ),
    "WordpieceTokenizeWithOffsets": ("output_row_splits", ("output_values", "start_values", "limit_values")),
    "WhitespaceTokenizeWithOffsetsV2": (
        "output_row_splits",
        ("output_tokens", "output_start_offsets", "output_end_offsets"),
    ),
    "SentencepieceTokenizeOp": ("output_splits", ("output_values",)),
    "UnicodeDecode": ("row_splits", ("char_values",)),
    "UnicodeDecodeWithOffsets": ("row_splits", ("char_values", "char_to_byte_starts")),
    "RaggedRange": ("rt_nested_splits", ("rt_dense_values",)),
}
_ROWS_OF_FIRST_INPUT = {op for op in _PARTITIONS if op != "RaggedRange"}
_ELEMENTWISE = {
    *("Identity", "Cast", "CaseFoldUTF8", "NormalizeUTF8", "StaticRegexReplace", "RegexReplace", "StringLower"),
    *("StringStrip", "AddV2", "StringUpper"),
}


class DropProvenAssertions(Pass):
    """assert(p), p true by construction -> nothing."""

    guarantee = Exact()

    def run(self, rewriter):
        graph = rewriter.graph
        unread = [n for n in graph.effects if not any(v.uses for v in n.outputs)]
        asserted = [(n, _condition(graph, n)) for n in unread]
        proven = [n for n, value in asserted if value is not None and rewriter.allowed(self, n) and holds(graph, value)]
        if rewriter.limit is not None:
            proven = proven[: max(0, rewriter.limit - len(rewriter.fired))]
        for node in proven:
            rewriter.fire(self, node)
            graph.effects.remove(node)
            for other in graph.nodes.values():
                if node in other.controls:
                    at = other.controls.index(node)
                    before = [c for c in node.controls if c not in other.controls]
                    other.controls[at : at + 1] = before
            self.removed(rewriter, node)
        return bool(proven)


def _condition(graph: Graph, node: Node) -> Value | None:
    """What an assertion asserts; None for any other node."""
    if node.op == "Assert":
        return node.inputs[0]
    if node.op != "If":
        return None
    passes, fails = (_stateful(graph, node.attr(branch)) for branch in ("then_branch", "else_branch"))
    return node.inputs[0] if passes == [] and fails == ["Assert"] else None


def _stateful(graph: Graph, function: str) -> list[str] | None:
    """The ops with effects in a function of the library; None where it calls others."""
    found = graph.library.get(function)
    if found is None:
        return None
    called = [a for n in found.node_def for a in n.attr.values() if a.HasField("func") or a.list.func]
    return None if called else [n.op for n in found.node_def if ops.is_stateful(n.op)]


# --- what is known of a condition -------------------------------------------------------------------------------------


def holds(graph: Graph, value: Value) -> bool:
    """Whether a boolean tensor is proven true in every element, whatever the inputs of the graph are."""
    array = graph.constant(value)
    if array is not None:
        return bool(np.all(array))
    node = value.node
    if node.op in ("All", "Identity", "Reshape", "Squeeze"):
        return holds(graph, node.inputs[0])
    if node.op == "LogicalAnd":
        return all(holds(graph, v) for v in node.inputs)
    if node.op in ("LessEqual", "GreaterEqual"):
        low, high = node.inputs if node.op == "LessEqual" else node.inputs[::-1]
        array = graph.constant(low)
        return array is not None and bool(np.all(array <= 0)) and _not_negative(high)
    if node.op == "Equal":
        a, b = node.inputs
        if a.dtype.is_floating:
            return False  # NaN is not equal to itself
        return a is b or any(_first_is(graph, x, y) or _last_is_count(x, y) for x, y in ((a, b), (b, a)))
    return False


def _first_is(graph: Graph, first: Value, zero: Value) -> bool:
    """splits[0] == 0."""
    array = graph.constant(zero)
    splits = _element(first, 0)
    return array is not None and bool(np.all(array == 0)) and splits is not None and _count(splits) is not None


def _last_is_count(last: Value, count: Value) -> bool:
    """splits[-1] == number of values."""
    splits = _element(last, -1)
    if splits is None:
        return False
    total = _count(splits)
    values = _size_of(count)
    if total is None or values is None:
        return False
    return _owner(values) is total


def _not_negative(value: Value) -> bool:
    """splits[1:] - splits[:-1]."""
    if value.node.op != "Sub":
        return False
    ends, starts = (_part(v) for v in value.node.inputs)
    if ends is None or starts is None or ends[0] is not starts[0]:
        return False
    return (ends[1:], starts[1:]) == ((1, None), (None, -1)) and _count(ends[0]) is not None


# --- row splits -------------------------------------------------------------------------------------------------------


def _count(splits: Value) -> Node | None:
    """The op whose values the row splits partition to the last one; None where nothing shows that they are splits."""
    node = splits.node
    if node.op == "Identity":
        return _count(node.inputs[0])
    if node.op in _PARTITIONS:
        return node if splits is _output(node, _PARTITIONS[node.op][0]) else None
    if node.op == "GatherV2" and len(node.inputs) == 3:
        # Splits of splits: every row of the inner ones belongs to the outer, so the last of the outer is their end.
        inner, outer = (_count(v) for v in node.inputs[:2])
        if inner is None or outer is None or inner.op not in _ROWS_OF_FIRST_INPUT or node.attr("batch_dims", 0):
            return None
        return inner if node.inputs[0].node is inner and _owner(inner.inputs[0]) is outer else None
    return None


def _owner(values: Value) -> Node | None:
    """The partitioning op that made these values, one for one."""
    node = values.node
    while node.op in _ELEMENTWISE and (len(node.inputs) == 1 or node.inputs[1].rank == 0):
        values = node.inputs[0]
        node = values.node
    if node.op not in _PARTITIONS:
        return None
    return node if any(values is _output(node, name) for name in _PARTITIONS[node.op][1]) else None


def _output(node: Node, name: str) -> Value | None:
    """An output by its name in the op's definition (a list of tensors must hold one)."""
    position, definition = 0, ops.definition(node.op)
    for argument in definition.output_arg if definition is not None else ():
        length = int(node.attr(argument.number_attr)) if argument.number_attr else 1
        if argument.name == name:
            return node.outputs[position] if length == 1 else None
        position += length
    return None


# --- slices -----------------------------------------------------------------------------------------------------------


def _part(value: Value) -> tuple[Value, int | None, int | None] | None:
    """x, a, b for x[a:b] of a vector with step 1."""
    found = _slice(value)
    if found is None or found[3]:
        return None
    return found[:3]


def _element(value: Value, index: int) -> Value | None:
    """x for the scalar x[index] of a vector; also for the vector of it alone."""
    while value.node.op in ("Reshape", "Squeeze", "Identity") and value.shape in ((), (1,)):
        value = value.node.inputs[0]
    found = _slice(value)
    return found[0] if found is not None and found[3] and found[1] == index else None


def _slice(value: Value) -> tuple[Value, int | None, int | None, bool] | None:
    node = value.node
    if node.op != "StridedSlice" or node.inputs[0].rank != 1:
        return None
    begin, end, stride = (_number(v) for v in node.inputs[1:])
    entries = strided_slice.entries(node)
    if begin is None or stride != 1 or entries is None or not entries[0].reads_axis:
        return None
    if entries[0].kind == "index":
        return node.inputs[0], begin, None, True
    if end is None:
        return None
    return node.inputs[0], None if entries[0].from_start else begin, None if entries[0].to_end else end, False


def _number(value: Value) -> int | None:
    array = value.node.attr("value") if value.node.op == "Const" else None
    return int(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def _size_of(value: Value) -> Value | None:
    """x for the number of elements of a vector x."""
    for node in _through(value):
        if node.op == "Size" and node.inputs[0].rank == 1:
            return node.inputs[0]
        if node.op == "StridedSlice":
            shape = _element(node.output, 0)
            return shape.node.inputs[0] if shape is not None and shape.node.op == "Shape" else None
    return None


def _through(value: Value) -> Iterator[Node]:
    """The node behind casts, identities and reshapes of one number."""
    node = value.node
    while node.op in ("Cast", "Identity", "Reshape", "Squeeze"):
        node = node.inputs[0].node
    yield node

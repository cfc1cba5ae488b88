"""Where the axes of tokens and batch of a result lie in its operands: one rule an op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tfvllm.graph import dims, op_traits, reductions, strided_slice
from tfvllm.graph.ir import Node


@dataclass(frozen=True)
class Tokens:
    """Where the tokens lie in a value: the axes of sequences and of positions; one axis where they are merged."""

    batch: int
    position: int | None  # None: axis `batch` holds sequence·positions
    sizes: tuple  # (sequences, positions)

    @property
    def axes(self) -> tuple[int, ...]:
        return (self.batch,) if self.position is None else (self.batch, self.position)

    @property
    def leads(self) -> bool:
        """Whether the tokens are the first axis or axes."""
        return self.axes == tuple(range(len(self.axes)))


def through(node: Node, tokens: Tokens) -> list[Tokens | None]:
    """For each operand: where in it the tokens lie that these tokens of the result are computed from alone."""
    rule = _elementwise if node.op in op_traits.ELEMENTWISE else PASSES.get(node.op)
    return [None] * len(node.inputs) if rule is None else rule(node, tokens)


def is_axis(size: Any, of_result: Any) -> bool:
    return size != 1 or of_result == 1


def _elementwise(node: Node, tokens: Tokens) -> list[Tokens | None]:
    out = node.output.shape
    result: list[Tokens | None] = []
    for value in node.inputs:
        if out is None or value.shape is None:
            result.append(None)
            continue
        shift = len(out) - len(value.shape)
        axes = [a - shift for a in tokens.axes]
        if min(axes) < 0 or not all(is_axis(value.shape[a], out[a + shift]) for a in axes):
            result.append(None)
        elif tokens.position is None:
            same = value.shape[axes[0]] == out[tokens.batch]
            result.append(Tokens(axes[0], None, tokens.sizes) if same else None)
        else:
            result.append(Tokens(axes[0], axes[1], tuple(value.shape[a] for a in axes)))
    return result


def of_operand(inner: Callable[[Node, Tokens], Tokens | None], at: int = 0) -> Callable[[Node, Tokens], list]:
    """The demand reaches one operand alone."""

    def rule(node: Node, tokens: Tokens) -> list[Tokens | None]:
        x = node.inputs[at]
        if x.shape is None or any(v.shape is None for v in node.outputs):
            return [None] * len(node.inputs)
        passed = inner(node, tokens)
        return [passed if i == at else None for i in range(len(node.inputs))]

    return rule


def _not_last(node: Node, tokens: Tokens) -> Tokens | None:
    last = len(node.output.shape) - 1
    return None if last in tokens.axes or node.attr("data_format", "NHWC") != "NHWC" else tokens


def _view(node: Node, tokens: Tokens) -> Tokens | None:
    shape, other = node.output.shape, node.inputs[0].shape
    if node.op == "StridedSlice":
        kept = strided_axes(node)
        if kept is None or any(a not in kept for a in tokens.axes):
            return None
        axes = [kept.index(a) for a in tokens.axes]
        return Tokens(axes[0], None if tokens.position is None else axes[1], tokens.sizes)
    return _reshaped(shape, other, tokens)


def _reshaped(shape: Any, other: Any, tokens: Tokens) -> Tokens | None:
    """The same tokens in another shape of the same elements, merged or split as that shape has them."""
    inner = dims.product(shape[tokens.axes[-1] + 1 :])
    between = () if tokens.position is None else shape[tokens.batch + 1 : tokens.position]
    adjacent = all(size == 1 for size in between)
    whole = dims.product(tokens.sizes)
    for axis in range(len(other)):
        if not adjacent or dims.product(other[axis + 1 :]) != inner:
            continue
        if axis and other[axis - 1 : axis + 1] == tokens.sizes:
            return Tokens(axis - 1, axis, tokens.sizes)
        if other[axis] == whole:
            return Tokens(axis, None, tokens.sizes)
    if tokens.position is None:
        return None
    batch, position = _same_axis(shape, other, tokens.batch), _same_axis(shape, other, tokens.position)
    return None if batch is None or position is None else Tokens(batch, position, tokens.sizes)


def _same_axis(shape: Any, other: Any, axis: int) -> int | None:
    """The axis of `other` that is `axis` of `shape`: as long, with as many elements after it."""
    inner = dims.product(shape[axis + 1 :])
    for i in range(len(other)):
        if other[i] == shape[axis] and dims.product(other[i + 1 :]) == inner:
            return i
    return None


def viewed(node: Node, axis: int) -> int | None:
    """Where an axis of a view's operand is in its result."""
    if node.op == "StridedSlice":
        kept = strided_axes(node)
        return None if kept is None or axis not in kept else kept.index(axis)
    if node.inputs[0].shape is None or node.output.shape is None:
        return None
    if node.op == "BroadcastTo":
        return axis + len(node.output.shape) - len(node.inputs[0].shape)
    return _same_axis(node.inputs[0].shape, node.output.shape, axis)


def strided_axes(node: Node) -> list[int | None] | None:
    """For every axis of the result the axis of the operand it is the whole of, None for one that is new or cut."""
    x, entries = node.inputs[0], strided_slice.entries(node)
    if x.shape is None or entries is None or any(e.kind == "ellipsis" for e in entries):
        return None
    result: list[int | None] = []
    axis = 0
    for entry in entries:
        if entry.kind != "index":
            result.append(axis if entry.whole else None)
        axis += entry.reads_axis
    return [*result, *range(axis, len(x.shape))]


def _transpose(node: Node, tokens: Tokens) -> Tokens | None:
    perm = node.inputs[1].known_value
    if perm is None:
        return None
    return Tokens(perm[tokens.batch], None if tokens.position is None else perm[tokens.position], tokens.sizes)


def _reduced(node: Node, tokens: Tokens) -> Tokens | None:
    before = reductions.axes_before(node)
    found = [] if before is None else [before[a] for a in tokens.axes]
    axes = [a for a in found if a is not None]
    if len(axes) < len(tokens.axes):
        return None
    return Tokens(axes[0], None if tokens.position is None else axes[1], tokens.sizes)


def _lookup(node: Node, tokens: Tokens) -> Tokens | None:
    """table[ids]: as many leading axes as the ids have."""
    ids = node.inputs[1]
    if ids.rank is None or node.attr("batch_dims", 0) or max(tokens.axes) >= ids.rank:
        return None
    return tokens if node.op == "ResourceGather" or node.inputs[2].known_value == 0 else None


def _unpack(node: Node, tokens: Tokens) -> Tokens | None:
    axis = node.attr("axis", 0) % len(node.inputs[0].shape)
    moved = [a + (a >= axis) for a in tokens.axes]
    return Tokens(moved[0], None if tokens.position is None else moved[1], tokens.sizes)


def _split(node: Node, tokens: Tokens) -> list[Tokens | None]:
    result: list[Tokens | None] = [None] * len(node.inputs)
    axis = node.inputs[0 if node.op == "Split" else 2].known_value
    at = 1 if node.op == "Split" else 0
    shape = node.inputs[at].shape
    if isinstance(axis, int) and shape is not None and axis % len(shape) not in tokens.axes:
        result[at] = tokens
    return result


def _concat(node: Node, tokens: Tokens) -> list[Tokens | None]:
    axis, shape = node.inputs[-1].known_value, node.output.shape
    if not isinstance(axis, int) or shape is None or axis % len(shape) in tokens.axes:
        return [None] * len(node.inputs)
    return [*[tokens] * (len(node.inputs) - 1), None]


def _matmul(node: Node, tokens: Tokens) -> list[Tokens | None]:
    result: list[Tokens | None] = [None] * len(node.inputs)
    if tokens.axes == (0,) and not node.attr("transpose_a"):
        result[0] = tokens
        fused = node.attr("fused_ops", [])
        if "Add" in fused and node.inputs[2 + fused.index("Add")].shape == node.output.shape:
            result[2 + fused.index("Add")] = tokens
    return result


def _batch_matmul(node: Node, tokens: Tokens) -> list[Tokens | None]:
    out = node.output.shape
    x, y = node.inputs[:2]
    result: list[Tokens | None] = [None] * len(node.inputs)
    if out is None or x.shape is None or y.shape is None or not len(x.shape) == len(y.shape) == len(out):
        return result
    rank = len(out)
    if tokens.position is None or tokens.batch >= rank - 2 or tokens.position < rank - 2:
        return result
    i = 0 if tokens.position == rank - 2 else 1
    flipped = node.attr("adj_x") if i == 0 else node.attr("adj_y")
    shape = (x, y)[i].shape
    axis = 2 * rank - 3 - tokens.position if flipped else tokens.position
    if is_axis(shape[tokens.batch], out[tokens.batch]):
        result[i] = Tokens(tokens.batch, axis, (shape[tokens.batch], shape[axis]))
    return result


PASSES: dict[str, Callable[[Node, Tokens], list[Tokens | None]]] = {
    **dict.fromkeys(op_traits.MATMULS, _matmul),
    **dict.fromkeys(op_traits.BATCH_MATMULS, _batch_matmul),
    **dict.fromkeys(op_traits.VIEWS - {"BroadcastTo"}, of_operand(_view)),  # which may widen the tokens' own axes
    **dict.fromkeys(op_traits.ALONG_LAST, of_operand(_not_last)),
    **dict.fromkeys(op_traits.REDUCTIONS, of_operand(_reduced)),
    **dict.fromkeys(op_traits.LOOKUPS, of_operand(_lookup, at=1)),
    "Transpose": of_operand(_transpose),
    "Unpack": of_operand(_unpack),
    "Split": _split,
    "SplitV": _split,
    "ConcatV2": _concat,
}

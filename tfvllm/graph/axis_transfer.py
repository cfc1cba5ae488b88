"""How axes pass through an op: one table, op by op, for all that follow an axis through a graph.

An axis of the result *is* an axis of an operand where its position i is computed from position i of that operand's
axis and from no other. One axis of the result may be an axis of several operands (the stack of a matrix product). Where
it is an axis of any, each position takes the same of the operands that have no such axis, a weight for one; where
positions are mixed (a softmax's last axis, a sum's), it is an axis of none.

The table says which axes lie on each other, not how long they are: an operand that is stretched (broadcast) along an
axis has it as well, with one element. Who needs every position to be there looks at the sizes.

Those who follow axes ask different questions, so not all of them follow all of it:
- `demand` (backwards) cuts positions out and computes the op anew for them. It follows what such a cut saves work in.
- `token_axes` (backwards) asks which positions of the operands go into a position of the result. It leaves BroadcastTo
  out, which may make the tokens' own axes wider.
- `padding_facts` (forwards) knows which number stands at a position: it follows what moves or combines numbers.
- `TrimPadding` (forwards) asks whether the first positions stay what they are without the later ones. It leaves
  BroadcastTo out as well: the size that it stretches to would have to be cut, too.
A reshape joins and splits axes: what is left of a period, of tokens or of an order in an axis made of several, each of
them works out; the table has the axes that go through it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tfvllm.graph import dims, op_traits, reductions, strided_slice
from tfvllm.graph.ir import Node, Value

Axes = Sequence[int | None]  # for each axis of a result the axis of one operand that it is; None: of no one


def operand_axes(node: Node, axis: int) -> Axes:
    """For each operand the axis of it that `axis` of the results is; all None where the op or its shape is not known.

    An op with several results has them cut along one axis, and all of one rank.
    """
    table = _axes(node)
    return [None] * len(node.inputs) if table is None else [axes[axis] for axes in table]


def result_axis(node: Node, operand: int, axis: int) -> int | None:
    """The axis of the results that is `axis` of an operand, the first if there are several."""
    table = _axes(node)
    return None if table is None or axis not in table[operand] else list(table[operand]).index(axis)


def summed_axes(node: Node) -> tuple[int, int]:
    """The axis of each factor that a matrix product sums over. The ranks of both are known."""
    x, y = (len(v.shape) for v in node.inputs[:2])
    flipped = [node.attr(old) or node.attr(new) for old, new in (("transpose_a", "adj_x"), ("transpose_b", "adj_y"))]
    return x - 2 if flipped[0] else x - 1, y - 1 if flipped[1] else y - 2


def _axes(node: Node) -> list[Axes] | None:
    rule = TABLE.get(node.op)
    if rule is None or any(v.shape is None for v in node.outputs):
        return None
    return rule(node, len(node.outputs[0].shape))


def _aligned(value: Value, rank: int) -> Axes:
    """An operand that is broadcast: its axes are the last ones of the result."""
    if value.shape is None:
        return [None] * rank
    shift = rank - len(value.shape)
    return [axis - shift if axis >= shift else None for axis in range(rank)]


def _of_operand(inner: Callable[[Node, int], Axes | None], at: int = 0) -> Callable[[Node, int], list[Axes] | None]:
    """Of one operand alone; the others are sizes, axes, or whole for every position."""

    def rule(node: Node, rank: int) -> list[Axes] | None:
        axes = None if node.inputs[at].shape is None else inner(node, rank)
        return None if axes is None else [axes if i == at else [None] * rank for i in range(len(node.inputs))]

    return rule


def _elementwise(node: Node, rank: int) -> list[Axes]:
    return [_aligned(value, rank) for value in node.inputs]


def _broadcast(node: Node, rank: int) -> Axes:
    return _aligned(node.inputs[0], rank)


def _along_last(node: Node, rank: int) -> Axes | None:
    return None if node.attr("data_format", "NHWC") != "NHWC" else [*range(rank - 1), None]


def _matmul(node: Node, rank: int) -> list[Axes] | None:
    """Rows are those of the first factor, columns those of the second; a bias and a residual lie on the result."""
    if any(v.shape is None for v in node.inputs[:2]):
        return None
    rows, columns = (2 * len(v.shape) - 3 - axis for v, axis in zip(node.inputs, summed_axes(node)))
    x, y = (_aligned(v, rank)[:-2] for v in node.inputs[:2])
    return [[*x, rows, None], [*y, None, columns], *(_aligned(v, rank) for v in node.inputs[2:])]


def _einsum(node: Node, rank: int) -> list[Axes] | None:
    equation = node.attr("equation").replace(" ", "")
    left, _, right = equation.partition("->")
    if "." in equation or len(right) != rank:
        return None
    operands = left.split(",")
    once = [label if all(o.count(label) <= 1 for o in operands) else None for label in right]  # else a diagonal
    return [[o.index(label) if label and label in o else None for label in once] for o in operands]


def _reshape(node: Node, rank: int) -> Axes:
    """As long, with as many elements after it."""
    shape, other = node.output.shape, node.inputs[0].shape
    after = [dims.product(other[axis + 1 :]) for axis in range(len(other))]
    result: list[int | None] = []
    for axis in range(rank):
        inner = dims.product(shape[axis + 1 :])
        same = (i for i, size in enumerate(other) if size == shape[axis] and after[i] == inner)
        result.append(next(same, None))
    return result


def _strided_slice(node: Node, rank: int) -> Axes | None:
    """Those of which it takes the whole."""
    entries = strided_slice.entries(node)
    if entries is None or any(e.kind == "ellipsis" for e in entries):
        return None
    result: list[int | None] = []
    axis = 0
    for entry in entries:
        if entry.kind != "index":
            result.append(axis if entry.whole else None)
        axis += entry.reads_axis
    return [*result, *range(axis, len(node.inputs[0].shape))]


def _transpose(node: Node, rank: int) -> Axes | None:
    return node.inputs[1].known_value


def _reduced(node: Node, rank: int) -> Axes | None:
    return reductions.axes_before(node)


def _lookup(node: Node, rank: int) -> list[Axes] | None:
    """table[:, ids]: the ids' axes stand where the one was that they look up in."""
    table, ids = node.inputs[:2]
    at = 0 if node.op == "ResourceGather" else node.inputs[2].known_value
    if ids.shape is None or node.attr("batch_dims", 0) or not isinstance(at, int) or (at < 0 and table.shape is None):
        return None
    at, width = (at % len(table.shape) if at else 0), len(ids.shape)
    of_ids = [axis - at if at <= axis < at + width else None for axis in range(rank)]
    of_table = [axis if axis < at else None if axis < at + width else axis - width + 1 for axis in range(rank)]
    rest = [[None] * rank] * (len(node.inputs) - 2)
    return [of_table if node.op == "GatherV2" else [None] * rank, of_ids, *rest]


def _unpack(node: Node, rank: int) -> Axes:
    at = node.attr("axis", 0) % (rank + 1)
    return [axis + (axis >= at) for axis in range(rank)]


def _pack(node: Node, rank: int) -> list[Axes]:
    at = node.attr("axis", 0) % rank
    axes = [None if axis == at else axis - (axis > at) for axis in range(rank)]
    return [axes] * len(node.inputs)


def _but(axis: object, rank: int) -> Axes | None:
    return [a if a != axis % rank else None for a in range(rank)] if isinstance(axis, int) else None


def _split(node: Node, rank: int) -> Axes | None:
    return _but(node.inputs[0 if node.op == "Split" else 2].known_value, rank)


def _concat(node: Node, rank: int) -> list[Axes] | None:
    axes = _but(node.inputs[-1].known_value, rank)
    return None if axes is None else [*[axes] * (len(node.inputs) - 1), [None] * rank]


TABLE: dict[str, Callable[[Node, int], list[Axes] | None]] = {
    **dict.fromkeys(op_traits.ELEMENTWISE, _elementwise),
    **dict.fromkeys(op_traits.MATMULS | op_traits.BATCH_MATMULS | {"BatchMatMulV3"}, _matmul),  # V3: what rules make
    **dict.fromkeys(op_traits.ALONG_LAST, _of_operand(_along_last)),
    **dict.fromkeys(op_traits.REDUCTIONS | op_traits.LOGICAL_REDUCTIONS, _of_operand(_reduced)),
    **dict.fromkeys(op_traits.RESHAPES, _of_operand(_reshape)),
    **dict.fromkeys(op_traits.LOOKUPS, _lookup),
    "BroadcastTo": _of_operand(_broadcast),
    "StridedSlice": _of_operand(_strided_slice),
    "Transpose": _of_operand(_transpose),
    "Einsum": _einsum,
    "Split": _of_operand(_split, at=1),
    "SplitV": _of_operand(_split),
    "Unpack": _of_operand(_unpack),
    "Pack": _pack,
    "ConcatV2": _concat,
}

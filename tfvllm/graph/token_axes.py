"""Where the tokens of a result lie in its operands."""

from __future__ import annotations

from dataclasses import dataclass

from tfvllm.graph import axis_transfer, dims, op_traits
from tfvllm.graph.axis_transfer import Axes
from tfvllm.graph.ir import Node, Value


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
    result: list[Tokens | None] = [None] * len(node.inputs)
    if node.op == "BroadcastTo" or any(v.shape is None for v in node.outputs):
        return result
    if node.op in op_traits.RESHAPES:
        return result if node.inputs[0].shape is None else [_reshaped(node, tokens), *result[1:]]
    found = [axis_transfer.operand_axes(node, axis) for axis in tokens.axes]
    return [_inside(value, axes, node, tokens) for value, *axes in zip(node.inputs, *found)]


def _inside(value: Value, axes: Axes, node: Node, tokens: Tokens) -> Tokens | None:
    """The tokens in an operand that has these axes of theirs; a position that it is stretched from is none of them."""
    known = [a for a in axes if a is not None]
    if value.shape is None or len(known) < len(axes):
        return None
    sizes = tuple(value.shape[a] for a in known)
    of_result = tuple(node.outputs[0].shape[a] for a in tokens.axes)
    if any(size == 1 != other for size, other in zip(sizes, of_result)):
        return None
    if tokens.position is None:
        return Tokens(known[0], None, tokens.sizes) if sizes == of_result else None
    return Tokens(known[0], known[1], sizes)


def _reshaped(node: Node, tokens: Tokens) -> Tokens | None:
    """The same tokens in another shape of the same elements, merged or split as that shape has them."""
    shape, other = node.output.shape, node.inputs[0].shape
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
    batch, position = (axis_transfer.operand_axes(node, axis)[0] for axis in tokens.axes)
    return None if batch is None or position is None else Tokens(batch, position, tokens.sizes)

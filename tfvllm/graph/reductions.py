"""Which axes a reduction goes over, and where those that it leaves were."""

from __future__ import annotations

from tfvllm.graph.ir import Node


def reduced_axes(node: Node) -> set[int] | None:
    """The axes of its operand that a reduction goes over, from 0 on; None where they or the rank are not known."""
    shape, axes = node.inputs[0].shape, node.inputs[1].known_value
    if shape is None or axes is None:
        return None
    return {a % len(shape) for a in (axes if isinstance(axes, tuple) else (axes,))}


def axes_before(node: Node) -> list[int | None] | None:
    """For each axis of a reduction's result the axis of its operand, None for one of which one element is left."""
    reduced = reduced_axes(node)
    if reduced is None:
        return None
    every = range(len(node.inputs[0].shape))
    if node.attr("keep_dims"):
        return [None if axis in reduced else axis for axis in every]
    return [axis for axis in every if axis not in reduced]

"""What the results demand of every value: all of it, or only some positions along one axis.

Demand flows from the results backwards. A classifier that reads position 0 of the last hidden state demands one row
in every `seq` of everything that is computed row by row before it: layer norms, dense layers, residuals, activations,
up to the attention's query; keys and values are still demanded in full.

`SliceDemand(axis, extent, index)` describes such a demand on a value whose axis has `n·extent` positions: those with
`position mod extent == index`. The plain case, one position of an axis, has n = 1; a flattened [batch·seq, width] has
n = batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tfvllm.graph import axis_transfer, dims, op_traits, strided_slice
from tfvllm.graph.ir import Graph, Node, Value

ALL = "full"


@dataclass(frozen=True)
class SliceDemand:
    axis: int
    extent: Any  # int or Dim
    index: int

    def outer(self, value: Value) -> Any:
        """How many positions are demanded along the axis."""
        return dims.divide(value.shape[self.axis], self.extent)


Demand = Any  # ALL or SliceDemand


def analyse(graph: Graph) -> dict[Value, Demand]:
    """The demand on every value that is demanded at all."""
    demand: dict[Value, Demand] = {}
    effects = set(graph.effects)
    for value in graph.outputs.values():
        demand[value] = ALL
    for node in reversed(graph.live()):
        wanted = [demand.get(v) for v in node.outputs]
        if all(w is None for w in wanted) and node not in effects:
            continue
        for value, needed in zip(node.inputs, on_inputs(node, wanted[0] if len(wanted) == 1 else ALL)):
            known = demand.get(value)
            demand[value] = needed if known is None or known == needed else ALL
    return demand


def on_inputs(node: Node, wanted: Demand) -> list[Demand]:
    """What a demand on a node's output demands of its inputs; all ALL where the demand cannot pass through."""
    everything = [ALL] * len(node.inputs)
    if node.op == "StridedSlice" and wanted == ALL:
        picked = selected_row(node)
        return everything if picked is None else [picked, *everything[1:]]
    if not isinstance(wanted, SliceDemand):
        return everything
    if node.op in op_traits.RESHAPES:
        return _reshaped(node, wanted)
    return _followed(node, wanted) if node.op in _FOLLOWED else everything


def passes(node: Node, wanted: Demand) -> bool:
    """Whether a partial demand on a node's output can be met without computing the rest."""
    return isinstance(wanted, SliceDemand) and any(isinstance(d, SliceDemand) for d in on_inputs(node, wanted))


def selected_row(node: Node) -> SliceDemand | None:
    """The demand of `x[:, i, :]` on x: one constant, non-negative position of one axis, everything of the others."""
    x, entries = node.inputs[0], strided_slice.entries(node)
    if x.shape is None or entries is None or any(e.begin is None or e.end is None for e in entries):
        return None
    if any(not e.reads_axis or e.stride != 1 for e in entries):
        return None
    found = None
    for axis, entry in enumerate(entries):
        if entry.whole:
            continue
        index = 0 if entry.from_start and entry.kind == "range" else entry.begin
        single = entry.kind == "index" or (not entry.to_end and entry.end == dims.add(index, 1))
        if not single or not isinstance(index, int) or index < 0 or axis == 0 or found is not None:
            return None
        if isinstance(x.shape[axis], int) and index >= x.shape[axis]:
            return None
        found = SliceDemand(axis, x.shape[axis], index)
    return found


# ------------------------------------------------------------------------------------ how demand passes through an op

# What is computed anew for the positions alone. A second slice, or a lookup, is not: there is no work to save in it.
_MATMULS = op_traits.MATMULS | op_traits.BATCH_MATMULS | {"BatchMatMulV3"}
_FOLLOWED = (_MATMULS | op_traits.ELEMENTWISE | op_traits.ALONG_LAST | {"Transpose", "Einsum"}).union(
    op_traits.REDUCTIONS - {"Prod"}  # products are taken of sizes, not of rows
)


def _followed(node: Node, wanted: SliceDemand) -> list[Demand]:
    """One axis, seen in the operands that have it; the others are read whole."""
    everything: list[Demand] = [ALL] * len(node.inputs)
    out = node.output.shape
    if any(v.shape is None for v in node.inputs):
        return everything  # it may have the axis
    if node.op in _MATMULS and wanted.axis != len(out) - 2:
        return everything  # columns, those of a weight for one: one wide product is quicker than several narrow ones
    result: list[Demand] = []
    for value, axis in zip(node.inputs, axis_transfer.operand_axes(node, wanted.axis)):
        if axis is None or value.shape[axis] == 1:
            result.append(ALL)
        elif value.shape[axis] == out[wanted.axis]:
            result.append(SliceDemand(axis, wanted.extent, wanted.index))
        else:
            return everything  # it may have one position, from which it is stretched
    return result


def _reshaped(node: Node, wanted: SliceDemand) -> list[Demand]:
    """The same positions, seen in another shape of the same elements, if one axis of it holds them."""
    others: list[Demand] = [ALL] * (len(node.inputs) - 1)
    shape, other = node.output.shape, node.inputs[0].shape
    if shape is None or other is None:
        return [ALL, *others]
    # Elements after the demanded axis, and elements in one period of it: both shapes must cut there.
    inner = dims.product(shape[wanted.axis + 1 :])
    period = dims.multiply(inner, wanted.extent)
    for axis in range(len(other)):
        if dims.product(other[axis + 1 :]) == inner:
            if other[axis] == 1 and wanted.extent != 1:
                continue
            size = dims.multiply(inner, other[axis])
            outer = dims.divide(size, period)
            if dims.multiply(outer, period) == size:
                return [SliceDemand(axis, wanted.extent, wanted.index), *others]
    return [ALL, *others]

"""What the results demand of every value: all of it, or only some positions along one axis.

Demand flows from the results backwards. A classifier that reads position 0 of the last hidden state demands one row
in every `seq` of everything that is computed row by row before it: layer norms, dense layers, residuals, activations,
up to the attention's query; keys and values are still demanded in full.

`SliceDemand(axis, extent, index)` describes such a demand on a value whose axis has `n·extent` positions: those with
`position mod extent == index`. The plain case, one position of an axis, has n = 1; a flattened [batch·seq, width] has
n = batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tfvllm.graph import dims, op_traits, reductions, strided_slice
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
    rule = _RULES.get(node.op)
    passed = rule(node, wanted) if rule is not None else None
    if passed is None or any(d != ALL and v.shape is None for v, d in zip(node.inputs, passed)):
        return everything  # positions of a value of unknown rank cannot be cut out
    return passed


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


def _elementwise(node: Node, wanted: SliceDemand) -> list[Demand] | None:
    out = node.output
    if out.shape is None:
        return None
    result: list[Demand] = []
    for value in node.inputs:
        if value.shape is None:
            return None
        axis = wanted.axis - (len(out.shape) - len(value.shape))
        if axis < 0 or value.shape[axis] == 1:
            result.append(ALL)
        elif value.shape[axis] == out.shape[wanted.axis]:
            result.append(SliceDemand(axis, wanted.extent, wanted.index))
        else:
            return None
    return result


def _along_other_axes(node: Node, wanted: SliceDemand) -> list[Demand] | None:
    """Softmax, LayerNorm, BiasAdd: work along the last axis, row by row otherwise."""
    out = node.output
    if out.shape is None or node.attr("data_format", "NHWC") != "NHWC" or wanted.axis == len(out.shape) - 1:
        return None
    return [wanted, *[ALL] * (len(node.inputs) - 1)]


def _matmul(node: Node, wanted: SliceDemand) -> list[Demand] | None:
    if wanted.axis != 0 or node.attr("transpose_a"):
        return None
    result: list[Demand] = [wanted, *[ALL] * (len(node.inputs) - 1)]
    fused = node.attr("fused_ops", [])
    if "Add" in fused:  # the residual, one row for each row of the product
        result[2 + fused.index("Add")] = wanted
    return result


def _batch_matmul(node: Node, wanted: SliceDemand) -> list[Demand] | None:
    x, out = node.inputs[0], node.output
    if out.shape is None or x.shape is None or len(x.shape) != len(out.shape) or wanted.axis != len(out.shape) - 2:
        return None
    axis = len(x.shape) - (1 if node.attr("adj_x") else 2)
    return [SliceDemand(axis, wanted.extent, wanted.index), *[ALL] * (len(node.inputs) - 1)]


def _reshape(node: Node, wanted: SliceDemand) -> list[Demand] | None:
    x, out = node.inputs[0], node.output
    if x.shape is None or out.shape is None:
        return None
    mapped = reshaped_axis(out.shape, x.shape, wanted)
    return None if mapped is None else [mapped, *[ALL] * (len(node.inputs) - 1)]


def reshaped_axis(shape: tuple, other: tuple, wanted: SliceDemand) -> SliceDemand | None:
    """The same positions, seen in another shape of the same elements; None where no one axis holds them."""
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
                return SliceDemand(axis, wanted.extent, wanted.index)
    return None


def _transpose(node: Node, wanted: SliceDemand) -> list[Demand] | None:
    perm = node.inputs[1].known_value
    if perm is None:
        return None
    return [SliceDemand(perm[wanted.axis], wanted.extent, wanted.index), ALL]


def _einsum(node: Node, wanted: SliceDemand) -> list[Demand] | None:
    equation = node.attr("equation").replace(" ", "")
    left, _, right = equation.partition("->")
    if "." in equation:
        return None
    label = right[wanted.axis]
    operands = left.split(",")
    if sum(label in o for o in operands) != 1 or any(o.count(label) > 1 for o in operands):
        return None
    return [SliceDemand(o.index(label), wanted.extent, wanted.index) if label in o else ALL for o in operands]


def _reduce(node: Node, wanted: SliceDemand) -> list[Demand] | None:
    before = reductions.axes_before(node)
    axis = None if before is None else before[wanted.axis]
    return None if axis is None else [SliceDemand(axis, wanted.extent, wanted.index), ALL]


_RULES: dict[str, Callable[[Node, SliceDemand], list[Demand] | None]] = {
    **dict.fromkeys(op_traits.ELEMENTWISE, _elementwise),
    **dict.fromkeys(op_traits.MATMULS, _matmul),
    # BatchMatMul comes in old graphs only; BatchMatMulV3 is what rules make.
    **dict.fromkeys(("BatchMatMulV2", "BatchMatMulV3"), _batch_matmul),
    **dict.fromkeys(op_traits.RESHAPES, _reshape),
    **dict.fromkeys(op_traits.REDUCTIONS - {"Prod"}, _reduce),  # products are taken of sizes, not of rows
    **dict.fromkeys(op_traits.ALONG_LAST, _along_other_axes),
    "Transpose": _transpose,
    "Einsum": _einsum,
}

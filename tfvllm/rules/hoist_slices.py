"""A slice of a result moves up to where it saves work."""

import tensorflow as tf

from tfvllm.graph import demand, op_traits
from tfvllm.graph.builder import Builder, Declined
from tfvllm.graph.demand import ALL, SliceDemand
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.ir import Node, Value
from tfvllm.graph.rewriter import Pass

_WORK = op_traits.MATMULS | {"BatchMatMulV2", "Einsum"}  # not the small products that rules make


class HoistSlices(Pass):
    """f(x)[:, i] -> f(x[:, i]) for everything that is computed row by row.

    Only values of which nothing but the slice is demanded are touched, and only where a matrix product is saved.
    """

    guarantee = Reordered()  # a product with fewer rows may be summed in another order

    def run(self, rewriter):
        graph = rewriter.graph
        wanted = demand.analyse(graph)
        partial = {v: d for v, d in wanted.items() if isinstance(d, SliceDemand)}
        rebuilt = {v for v, d in partial.items() if demand.passes(v.node, d)}
        saved = [v for v in rebuilt if v.node.op in _WORK and partial[v].extent != 1]
        if not saved:
            return False
        anchors = [n for n in graph.order() if n.op == "StridedSlice" and n.inputs[0] in rebuilt]
        if not anchors or not rewriter.allowed(self, anchors[0]):
            return False
        builder, mark = Builder(graph, anchors[0].name + "/demand"), graph.mark()
        sliced: dict[Value, Value] = {}
        replaced: list[tuple[Node, Value]] = []
        try:
            for node in graph.order():
                value = node.output if node.outputs else None
                if value in rebuilt:
                    sliced[value] = self._rebuild(builder, node, partial, sliced)
                elif node in anchors:
                    x = self._sliced(builder, node.inputs[0], partial[node.inputs[0]], sliced)
                    replaced.append((node, builder.reshape(x, node.output.shape, like=[x])))
        except Declined as declined:
            graph.forget(builder.made, mark)
            rewriter.decline(self, anchors[0], str(declined))
            return False
        rewriter.fire(self, anchors[0])
        for node, new in replaced:
            graph.replace(node.output, new)
            self.removed(rewriter, node)  # else the whole product would still be merged with its neighbours
        return True

    def _sliced(self, b: Builder, value: Value, rows: SliceDemand, done: dict[Value, Value]) -> Value:
        """The demanded rows of a value: rebuilt if it could be, else cut out of the whole."""
        if value not in done:
            shape, axis, outer = value.shape, rows.axis, rows.outer(value)
            if outer == 1:
                done[value] = _cut(b, value, axis, rows.index, keep=True)
                return done[value]
            split = b.reshape(value, (*shape[:axis], outer, rows.extent, *shape[axis + 1 :]), like=[value])
            done[value] = _cut(b, split, axis + 1, rows.index, keep=False)
        return done[value]

    def _rebuild(self, b: Builder, node: Node, partial: dict, done: dict[Value, Value]) -> Value:
        value = node.output
        rows = partial[value]
        needs = demand.on_inputs(node, rows)
        inputs = [v if need == ALL else self._sliced(b, v, need, done) for v, need in zip(node.inputs, needs)]
        shape = (*value.shape[: rows.axis], rows.outer(value), *value.shape[rows.axis + 1 :])
        if node.op in op_traits.RESHAPES:
            return b.reshape(inputs[0], shape, like=[value])
        attrs = node.own_attrs()
        out = b.op(node.op, inputs, **attrs)[0]
        if out.shape is None or len(out.shape) != len(shape):
            raise Declined("the shape of the sliced work is unknown")
        if out.shape[rows.axis] != shape[rows.axis]:
            raise Declined(f"the sliced work has {out.shape[rows.axis]} rows where {shape[rows.axis]} are demanded")
        return out


def _cut(b: Builder, value: Value, axis: int, index: int, keep: bool) -> Value:
    """value[..., index, ...] at `axis`, which stays as an axis of size 1 if `keep`."""
    others = (1 << axis) - 1
    row = b.StridedSlice(
        value,
        b.ints(*[0] * axis, index),
        b.ints(*[0] * axis, index + 1),
        b.ints(*[1] * (axis + 1)),
        begin_mask=others,
        end_mask=others,
        shrink_axis_mask=1 << axis,
    )
    return b.ExpandDims(row, b.const(axis, tf.int32)) if keep else row

"""A batch is cut to its longest sequence, where nothing that is asked for sees the columns that are padding alone."""

from __future__ import annotations

from collections.abc import Iterator

import tensorflow as tf

from tfvllm.graph import axis_transfer, demand, dims, op_traits, padding, padding_facts, strided_slice
from tfvllm.graph.builder import Builder, Declined
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.rewriter import Pass

_MULTIPLE = 8  # what attention's kernels like
_SIZES = ("StridedSlice", "Pack", "ConcatV2", "GatherV2", "Prod", "Mul", "Cast", "Identity", "ExpandDims", "Squeeze")
_TAKE_SIZES = {"Reshape": 1, "BroadcastTo": 1, "Fill": 0, "Slice": 2, "StridedSlice": 2, "BroadcastArgs": None}


class TrimPadding(Pass):
    """f(x) -> f(x[:, :t]), t = 1 + the last position of any sequence that a padding mask keeps, rounded up to 8.

    Kept are the unmasked positions, position 0, and all positions of a sequence that has no unmasked one. Beyond t
    every row is padding: columns that no result sees. Everything that is computed from positions has to be known to
    give the same for the first t of them, however many follow; what is not known declines.
    """

    guarantee = Approximate(
        max_error=0.0,
        domain="padding masks of 0 and 1; unmasked scores more than 104 above masked ones",
        source="exp(x) is 0 in float32 for x < -104 (IEEE 754); the terms left out are 0",
    )

    def run(self, rewriter):
        graph = rewriter.graph
        analysis = padding.analyse(graph)
        if analysis is None or not rewriter.allowed(self, analysis.mask.node):
            return False
        mask = analysis.mask
        inputs = _inputs(graph, analysis)
        if not inputs or mask.shape is None or isinstance(mask.shape[1], int):
            return False
        if any(n.name.startswith(mask.node.name + "/pack/") for n in graph.live()):
            return False  # the tokens are packed already
        if not dims.atoms(mask.shape[1]) <= {a for v in inputs for a in dims.atoms(v.shape[1])}:
            return False  # the positions are made in the graph, by a tokenizer: it pads to the longest
        try:
            _Check(graph, analysis, inputs).run()
        except Declined as declined:
            rewriter.decline(self, mask.node, str(declined))
            return False
        rewriter.fire(self, mask.node)
        shapes = [value.shape for value in inputs]
        for value, shape in zip(inputs, shapes):  # from here on the symbol stands for what is left
            value.shape = (shape[0], dims.fresh(f"{value.node.name}:whole"), *shape[2:])
        for cut, shape in zip(self._cut(graph, mask, inputs), shapes):
            cut.shape = shape
        return True

    @staticmethod
    def _cut(graph: Graph, mask: Value, inputs: list[Value]) -> list[Value]:
        """Puts the cut between the inputs and all that reads them but what says how long it is."""
        b = Builder(graph, mask.node.name + "/trim")
        zero, one = b.const(0, tf.int32), b.const(1, tf.int32)
        readers = {value: list(value.uses) for value in inputs}
        own = _copied(b, mask)  # the mask as it comes: the graph's own will be cut
        real = own if own.dtype == tf.bool else b.NotEqual(own, b.const(0, own.dtype))
        widths = [_width(b, value) for value in (own, *inputs)]
        places = b.Range(one, b.AddV2(widths[0], one), one)
        some = b.op("Any", [real, b.ints(1)], keep_dims=True)[0]
        keep = b.op("Any", [b.LogicalOr(real, b.LogicalNot(some)), b.ints(0)])[0]
        longest = b.Maximum(b.op("Max", [b.Mul(b.Cast(keep, DstT=tf.int32), places), b.ints(0)])[0], one)
        multiple = b.const(_MULTIPLE, tf.int32)
        longest = b.Mul(b.FloorDiv(b.AddV2(longest, b.const(_MULTIPLE - 1, tf.int32)), multiple), multiple)
        if len(inputs) > 1:  # arguments of different sizes are broadcast: they stay whole
            together = b.Pack(*widths, axis=0)
            widest = b.op("Max", [together, b.ints(0)])[0]
            even = b.op("All", [b.Equal(together, widest), b.ints(0)])[0]
            longest = b.SelectV2(even, longest, widest)
        cuts = []
        for value in inputs:
            ends = (b.ints(0, 0), b.Pack(zero, longest, axis=0), b.ints(1, 1))
            cut = b.StridedSlice(value, *ends, begin_mask=3, end_mask=1)
            for reader, position in readers[value]:
                graph.set_input(reader, position, cut)
            cuts.append(cut)
        return cuts


def _inputs(graph: Graph, analysis: padding.Analysis) -> list[Value]:
    """The graph's arguments of sequences, positions first, that are not demanded at padding, and those of the mask."""
    behind: set[Node] = set()
    stack = [analysis.mask.node]
    while stack:
        node = stack.pop()
        if node not in behind:
            behind.add(node)
            stack.extend(v.node for v in node.inputs)
    found = []
    for value in graph.inputs.values():
        if value.rank is None or value.rank < 2 or isinstance(value.shape[1], int) or not value.uses:
            continue
        tokens = analysis.leading(value)
        if value.node in behind or (tokens is not None and tokens.axes == (0, 1)):
            found.append(value)
    return found


def _from_the_front(node: Node) -> bool:
    """Whether a slice begins at 0 and goes on in steps of 1."""
    begins = node.inputs[1].known_value
    if node.op == "Slice":
        return begins is not None and all(c == 0 for c in begins)
    entries = strided_slice.entries(node)
    if begins is None or entries is None or not all(e.reads_axis for e in entries):
        return False
    return all(e.stride == 1 and (e.begin == 0 or e.from_start) for e in entries)


def _copied(b: Builder, value: Value) -> Value:
    """The same value from nodes of its own, down to the graph's arguments and weights."""
    node = value.node
    if not node.inputs or b.graph.is_static(value):
        return value
    attrs = node.own_attrs()
    return b.op(node.op, [_copied(b, v) for v in node.inputs], **attrs)[value.index]


def _width(b: Builder, value: Value) -> Value:
    ends = (b.ints(1), b.ints(2), b.ints(1))
    return b.StridedSlice(b.Shape(value, out_type=tf.int32), *ends, shrink_axis_mask=1)


class _Check:
    """Whether all that is computed for the first positions is the same without the later ones."""

    def __init__(self, graph: Graph, analysis: padding.Analysis, inputs: list[Value]):
        self.graph, self.analysis = graph, analysis
        self.cut = {a for v in inputs for a in dims.atoms(v.shape[1])}
        self.other = {
            a for v in graph.inputs.values() for size in (v.shape or ())[1:] for a in dims.atoms(size)
        } - self.cut  # fmt: skip
        self.silenced = set(analysis.silenced)
        self.sizes: set[Value] = set()  # integers that are, or hold, numbers of positions

    def run(self) -> None:
        for name, value in self.graph.outputs.items():
            if value.shape is None or self.axes(value):
                raise Declined(f"padded positions are part of the result {name!r}")
        for node in self.graph.live():
            reads_sizes = [i for i, v in enumerate(node.inputs) if v in self.sizes]
            for value in (*node.inputs, *node.outputs):
                if value.shape is None and value.dtype not in (tf.resource, tf.variant, tf.string):
                    raise Declined(f"the shape of {node.op} is unknown")
            if reads_sizes:
                self._size_read(node, reads_sizes)
            elif any(self.axes(v) for v in (*node.inputs, *node.outputs)) and not self._same_in_front(node):
                raise Declined(f"{node.op} may see padded positions")
        for node in self.graph.live():  # after the rest, which says more
            for size in (size for value in (*node.inputs, *node.outputs) for size in value.shape or ()):
                atoms = dims.atoms(size)
                if atoms & self.cut and atoms & self.other:
                    asked = [n for n, v in self.graph.outputs.items() if any(map(atoms.__and__, self._atoms(v)))]
                    raise Declined(
                        f"padded positions are part of the result {asked[0]!r}"
                        if asked
                        else "an argument of another size, or seen at padding, meets the positions"
                    )

    @staticmethod
    def _atoms(value: Value) -> list[set[str]]:
        return [dims.atoms(size) for size in value.shape or ()]

    def axes(self, value: Value) -> list[int]:
        """The axes along which positions lie, alone or beside others."""
        return [i for i, size in enumerate(self._atoms(value)) if size & self.cut]

    def _size_read(self, node: Node, positions: list[int]) -> None:
        """A number of positions may go into other sizes, and be the size of something; not into arithmetic."""
        takes = _TAKE_SIZES.get(node.op, -1)
        if node.op in _TAKE_SIZES and all(takes is None or i == takes for i in positions):
            if node.op == "Slice" and (
                self.axes(node.inputs[0]) or any(c != 0 for c in node.inputs[1].known_value or (1,))
            ):
                raise Declined("a part of the positions is cut out")
            if node.op == "BroadcastArgs":
                self.sizes.add(node.output)
        elif node.op == "Range" and positions == [1]:
            plain = isinstance(limit := node.inputs[1].known_value, dims.Dim) and limit == node.output.shape[0]
            if (
                (node.inputs[0].known_value, node.inputs[2].known_value) != (0, 1)
                or not plain
                or limit.terms[0][1] != 1
            ):
                raise Declined("positions are not counted from the front")
        elif node.op in _SIZES and all(v.dtype.is_integer and (v.rank or 0) <= 1 for v in node.outputs):
            self.sizes.update(node.outputs)
        elif node.op not in op_traits.SHAPE_ONLY:
            raise Declined(f"{node.op} computes with the number of positions")

    def _same_in_front(self, node: Node) -> bool:
        if node.op in ("Shape", "Size"):
            self.sizes.update(node.outputs)
            return True
        if node.op == "Placeholder":
            return True
        if node.op not in axis_transfer.TABLE or node.op == "BroadcastTo":
            return False
        along = [(i, axis) for i, value in enumerate(node.inputs) for axis in self.axes(value)]
        if node.op in op_traits.RESHAPES:
            return all(i == 0 for i, _ in along) and self._keeps_order(node)
        lost = [(i, axis) for i, axis in along if axis_transfer.result_axis(node, i, axis) is None]
        return node in self.silenced or all(i == 0 and self._front_suffices(node, axis) for i, axis in lost)

    def _front_suffices(self, node: Node, axis: int) -> bool:
        """Whether an axis that is none of the result's gives the same for its first positions alone."""
        if node.op == "Softmax":
            return any(f.masked <= padding_facts.LOW and f.open for f in self._facts(node, axis))
        if node.op in ("Sum", "Any"):
            return any(f.masked == 0 and not f.relative for f in self._facts(node, axis))
        row = demand.selected_row(node) if node.op == "StridedSlice" else None
        return row is not None and (row.axis, row.index) == (axis, 0)

    def _keeps_order(self, node: Node) -> bool:
        """Whether every axis of positions is one in the view, too, or the inner part of one."""
        x, y = node.inputs[0].shape or (), node.output.shape or ()
        for axis in self.axes(node.inputs[0]):
            inner = dims.product(x[axis + 1 :])
            if not any(dims.product(y[i + 1 :]) == inner and dims.atoms(size) & self.cut for i, size in enumerate(y)):
                return False
        return True

    def _facts(self, node: Node, axis: int) -> Iterator[padding_facts.Fact]:
        """What is known of the operand at padding, if its positions lie along an axis."""
        for (_, position), fact in self.analysis.facts.get(node.inputs[0], {}).items():
            if position == axis:
                yield fact

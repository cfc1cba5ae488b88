"""Padding is left out: what is computed token by token is computed for the real tokens alone."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import tensorflow as tf

from tfvllm.graph import demand, dims, op_traits, padding, token_axes
from tfvllm.graph.builder import Builder, Declined
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.rewriter import Pass
from tfvllm.graph.token_axes import Tokens

_WORK = op_traits.MATMULS | {"Einsum"}  # of each token; products of queries with keys stay padded
_MOVES = op_traits.RESHAPES | op_traits.SLICES | op_traits.PARTS | {"Transpose", "Identity"}
_SCOPE = "/pack"  # ends the names of what packs and unpacks
_PACKABLE = op_traits.MATMULS.union(
    op_traits.RESHAPES, op_traits.REDUCTIONS, op_traits.ALONG_LAST, op_traits.LOOKUPS, ("Split", "ConcatV2")
)


class PackTokens(Pass):
    """f(x) -> unpack(f(pack(x))) for all that is computed token by token and read where a padding mask lets it.

    pack: [batch, positions, …] -> [tokens, …]: the unmasked positions, position 0 of every sequence, and the whole of
    sequences without any unmasked position. unpack: the other way round, with a token of the same sequence at every
    position that was left out, so that a NaN of one sequence never reaches another. What reads an unpacked value
    multiplies those positions by 0, or chooses them away: `tfvllm.graph.padding` proves it.
    """

    guarantee = Approximate(
        max_error=0.0,
        domain="padding masks of 0 and 1; finite numbers at padding; unmasked scores more than 104 above masked ones",
        source="exp(x) is 0 in float32 for x < -104 (IEEE 754); the terms left out are 0",
    )

    def run(self, rewriter):
        graph = rewriter.graph
        analysis = padding.analyse(graph)
        if analysis is None or not rewriter.allowed(self, analysis.mask.node):
            return False
        packer = _Packer(graph, analysis)
        if not packer.pays():
            if not packer.done_before():
                rewriter.decline(self, analysis.mask.node, padding.reason(graph, analysis))
            return False
        mark = graph.mark()
        try:
            inputs, results = packer.build()
        except Declined as declined:
            graph.forget(packer.builder.made, mark)
            rewriter.decline(self, analysis.mask.node, str(declined))
            return False
        rewriter.fire(self, analysis.mask.node)
        for reader, position, value in inputs:
            graph.set_input(reader, position, value)
        for old, new in results:
            graph.replace(old, new)
            self.removed(rewriter, old.node)
        for node in reversed(list(packer.nodes)):  # the last first: what reads a value goes before it
            self.removed(rewriter, node)
        return True


def comes_unpacked(value: Value) -> bool:
    """Whether `value` is cut out of, or another view of, one that `PackTokens` has unpacked."""
    node = value.node
    while node.op in _MOVES:
        node = node.inputs[int(node.op == "Split")].node
    return node.op == "GatherV2" and f"{_SCOPE}/" in node.name


class _Packer:
    """One graph's tokens: which values are packed, and the indices that pack and unpack them."""

    def __init__(self, graph: Graph, analysis: padding.Analysis):
        self.graph, self.analysis = graph, analysis
        self.builder = Builder(graph, analysis.mask.node.name + _SCOPE)
        self.values: dict[Value, Tokens] = {}
        self.live = dict.fromkeys(graph.live())
        for node in self.live:
            tokens = [t for t in map(analysis.leading, node.outputs) if t is not None]
            if tokens and len(tokens) == len(node.outputs) and _packable(node, tokens, self.values):
                self.values.update(zip(node.outputs, tokens))
        self.nodes = dict.fromkeys(v.node for v in self.values)
        self.packed: dict[Value, Value] = {}
        self._made: dict[tuple, Value] = {}  # by what it is
        self._sizes: dict[Any, Value] = {}

    def pays(self) -> bool:
        """Whether more than half of the products of tokens can be packed: the indices and the moving cost something."""
        flat = {dims.product(t.sizes) for t in self.values.values()}
        work = [n for n in self.live if n.op in _WORK]
        packed = [n for n in work if n in self.nodes]
        left = [n for n in work if n not in self.nodes and n.output.shape and n.output.shape[0] in flat]
        return len(packed) > len(left)

    def done_before(self) -> bool:
        """Whether what reads the attention's operands has been packed already."""
        return any(n.op == "Where" and n.name.startswith(self.builder.scope) for n in self.live)

    def build(self) -> tuple[list[tuple[Node, int, Value]], list[tuple[Value, Value]]]:
        """Makes the packed nodes; returns which inputs of the others, and which results, are to be replaced by what."""
        self._index()
        for node in self.nodes:
            for old, new in zip(node.outputs, self._rebuilt(node)):
                self.packed[old] = new
        inputs, results = [], []
        for node in self.nodes:
            for value in node.outputs:
                for reader, position in list(value.uses):
                    if reader in self.nodes or reader not in self.live:
                        continue
                    instead = self._instead(reader, value)
                    if instead is not None:
                        results.append((reader.output, instead))
                    else:
                        inputs.append((reader, position, self._unpacked(value)))
        return inputs, results

    # ------------------------------------------------------------------------------------------------------- indices

    def _index(self) -> None:
        """Finds the tokens to keep, and where each is."""
        b, mask = self.builder, self.analysis.mask
        zero = b.const(0, tf.int32)
        real = mask if mask.dtype == tf.bool else b.NotEqual(mask, b.const(0, mask.dtype))
        self.extents = dict.fromkeys([mask.shape, *(t.sizes for t in self.values.values())])
        self.carriers = [mask, *self.graph.inputs.values()]
        after = self._after()
        for node in self.nodes:
            for value, sizes in self._operands(node):
                self.extents[sizes] = None
                if value.node not in after:
                    self.carriers.append(value)
        symbols = [{e[axis] for e in self.extents if e[axis] != 1} for axis in (0, 1)]
        self.even = all(len(s) <= 1 for s in symbols)
        positions = b.Range(zero, b.reshape(self._size(mask.shape[1]), ()), b.const(1, tf.int32))
        some = b.op("Any", [real, b.ints(1)], keep_dims=True)[0]
        keep = b.LogicalOr(real, b.LogicalOr(b.LogicalNot(some), b.Equal(positions, zero)))
        self.full = mask.shape
        if not self.even:
            keep = self._keep_all_if_uneven(keep)
        flat = b.Reshape(keep, b.ints(-1))
        self.tokens = b.Cast(b.Reshape(b.Where(flat), b.ints(-1)), DstT=tf.int32)
        last = b.Sub(b.Cumsum(b.Cast(flat, DstT=tf.int32), zero), b.const(1, tf.int32))
        self.inverse = b.Reshape(last, self._shape(self.full))
        self.inverse.shape = self.full

    def _keep_all_if_uneven(self, keep: Value) -> Value:
        """Where arguments of different sizes are broadcast, no position is left out."""
        b = self.builder
        whole = []
        for axis in (0, 1):
            known = [self._size(e[axis]) for e in self.extents if e[axis] != 1]
            total = known[0]
            for size in known[1:]:
                total = b.BroadcastArgs(total, size)
            joined = b.ConcatV2(*known, b.const(0, tf.int32)) if len(known) > 1 else total
            differs = b.op("Any", [b.NotEqual(joined, total), b.ints(0)])[0]
            whole.append((total, differs))
        self.full = tuple(dims.symbol(f"{v.name}:whole") for v, _ in whole)
        for size, (value, _) in zip(self.full, whole):
            self._sizes[size] = value
        keep = b.BroadcastTo(keep, self._shape(self.full))
        keep.shape = self.full
        return b.LogicalOr(keep, b.LogicalOr(whole[0][1], whole[1][1]))

    def _size(self, size: Any) -> Value:
        """A size as an int32 vector of one element."""
        if size not in self._sizes:
            b = self.builder
            if isinstance(size, int):
                found = b.ints(size)
            else:
                try:
                    found = b.sizes([size], self.carriers)
                except Declined:
                    parts = dims.broadcast_parts(size)
                    if len(parts) < 2:
                        raise
                    found = self._size(parts[0])
                    for part in parts[1:]:
                        found = b.BroadcastArgs(found, self._size(part))
            self._sizes[size] = found
        return self._sizes[size]

    def _shape(self, sizes: tuple) -> Value:
        if len(sizes) == 1:
            return self._size(sizes[0])
        return self.builder.ConcatV2(*map(self._size, sizes), self.builder.const(0, tf.int32))

    def _index_of(self, sizes: tuple) -> Value:
        """Where the kept tokens lie in a flattened [sequences, positions] of these sizes: int32 [tokens]."""
        if sizes == self.full or (self.even and 1 not in sizes):
            return self.tokens
        key = ("index", sizes)
        if key not in self._made:
            b = self.builder
            width, one = self._size(self.full[1]), b.const(1, tf.int32)
            parts: list[Value | None] = [None, None]  # row and column; an axis of one element adds nothing
            for axis, divide in enumerate((b.FloorDiv, b.FloorMod)):
                if sizes[axis] == self.full[axis]:
                    parts[axis] = divide(self.tokens, width)
                elif sizes[axis] != 1:
                    parts[axis] = b.Minimum(divide(self.tokens, width), b.Sub(self._size(sizes[axis]), one))
            row, column = parts
            if row is not None:
                row = b.Mul(row, self._size(sizes[1])) if sizes[1] != 1 else row
            if row is not None and column is not None:
                self._made[key] = b.AddV2(row, column)
            else:
                self._made[key] = row or column or b.Mul(self.tokens, b.const(0, tf.int32))
        return self._made[key]

    def _inverse_of(self, sizes: tuple, axes: int) -> Value:
        """For each position of [sequences, positions] (flattened if one axis) a token to stand there."""
        key = ("inverse", sizes, axes)
        if key not in self._made:
            b = self.builder
            index = self.inverse
            if sizes != self.full:
                index = b.Slice(index, b.ints(0, 0), self._shape(sizes))
                index.shape = sizes
            if axes == 1:
                index = b.Reshape(index, b.ints(-1))
                index.shape = (dims.product(sizes),)
            self._made[key] = index
        return self._made[key]

    # --------------------------------------------------------------------------------------------------- into the pack

    def _after(self) -> set[Node]:
        """The nodes that are computed from packed ones."""
        found = set(self.nodes)
        for node in self.live:
            if any(v.node in found for v in node.inputs):
                found.add(node)
        return found

    def _operands(self, node: Node) -> Iterator[tuple[Value, tuple]]:
        """What has to be packed for an elementwise node, and its (sequences, positions)."""
        if node.op in op_traits.ELEMENTWISE:
            tokens = self.values[node.output]
            for value in node.inputs:
                if value not in self.values and tokens.position is not None:
                    sizes = _leading_sizes(value, node.output)
                    if sizes != (1, 1):
                        yield value, sizes

    def _enter(self, value: Value, tokens: Tokens) -> Value:
        """The packed form of a value with its tokens in front."""
        if value in self.values:
            return self.packed[value]
        return self._pack(value, tokens.sizes, value.shape[len(tokens.axes) :])

    def _pack(self, value: Value, sizes: tuple, rest: tuple) -> Value:
        key = ("packed", value, sizes)
        if key not in self._made:
            b = self.builder
            if any(not isinstance(d, int) for d in rest):
                raise Declined(f"a value beside the tokens has an unknown size: {value.node.op} of {list(value.shape)}")
            flat = b.reshape(value, (dims.product(sizes), *rest))
            self._made[key] = b.GatherV2(flat, self._index_of(sizes), b.const(0, tf.int32))
        return self._made[key]

    def _beside(self, value: Value, node: Node) -> Value:
        """An operand of an elementwise node, for each token."""
        out, tokens = node.output, self.values[node.output]
        if value in self.values and len(value.shape) == len(out.shape):
            return self.packed[value]
        count = len(tokens.axes)
        rest = len(out.shape) - count
        if len(value.shape) <= rest:
            return value
        if tokens.position is None:
            if value.shape[0] == out.shape[0]:
                return self._pack(value, tokens.sizes, value.shape[1:])
            if value.shape[0] != 1:
                raise Declined(f"{node.op} stretches its operand over the tokens")
            return self.builder.reshape(value, value.shape[1:])
        sizes = _leading_sizes(value, out)
        trailing = value.shape[len(value.shape) - rest :]
        if sizes == (1, 1):
            return self.builder.reshape(value, trailing)
        return self._pack(value, sizes, trailing)

    def _rebuilt(self, node: Node) -> list[Value]:
        b, tokens = self.builder, self.values[node.outputs[0]]
        count = len(tokens.axes)
        attrs = node.own_attrs()
        inputs = list(node.inputs)
        if node.op in op_traits.ELEMENTWISE:
            return b.op(node.op, [self._beside(v, node) for v in inputs], **attrs)
        if node.op in op_traits.RESHAPES:
            entering = token_axes.through(node, tokens)[0]
            assert entering is not None, node  # else it would not be packable
            x = self._enter(inputs[0], entering)
            return [b.reshape(x, (x.shape[0], *node.output.shape[count:]))]
        if node.op in op_traits.LOOKUPS:
            inputs[1] = self._enter(inputs[1], tokens)
        elif node.op == "Split":
            inputs[1] = self._enter(inputs[1], tokens)
            inputs[0] = b.const(node.inputs[0].known_value % len(node.inputs[1].shape) - count + 1, tf.int32)
        elif node.op == "ConcatV2":
            axis = inputs[-1].known_value % len(node.output.shape) - count + 1
            inputs = [*(self._enter(v, tokens) for v in inputs[:-1]), b.const(axis, tf.int32)]
        elif node.op in op_traits.REDUCTIONS:
            rank = len(inputs[0].shape)
            axes = inputs[1].known_value
            axes = axes if isinstance(axes, tuple) else (axes,)
            inputs = [self._enter(inputs[0], tokens), b.ints(*(a % rank - count + 1 for a in axes))]
        elif node.op == "_FusedMatMul":
            passed = token_axes.through(node, tokens)
            inputs = [v if t is None else self._enter(v, t) for v, t in zip(inputs, passed)]
        else:
            inputs[0] = self._enter(inputs[0], tokens)
        return b.op(node.op, inputs, **attrs)

    # ------------------------------------------------------------------------------------------------- out of the pack

    def _instead(self, reader: Node, value: Value) -> Value | None:
        """What takes the place of the result of a node that reads a packed value, without unpacking it."""
        b, tokens = self.builder, self.values[value]
        if reader.op == "Shape":
            sizes = [*(tokens.sizes if len(tokens.axes) == 2 else ()), *value.shape[len(tokens.axes) :]]
            parts = [self._size(s) for s in sizes]
            if len(tokens.axes) == 1:
                parts.insert(0, b.Mul(*map(self._size, tokens.sizes)))
            shape = parts[0] if len(parts) == 1 else b.ConcatV2(*parts, b.const(0, tf.int32))
            return b.Cast(shape, DstT=reader.output.dtype)
        if reader.op == "StridedSlice" and len(tokens.axes) == 2:
            row = demand.selected_row(reader)
            if row is not None and (row.axis, row.index) == (1, 0):
                first = self._first_of(tokens.sizes)
                return b.reshape(b.GatherV2(self.packed[value], first, b.const(0, tf.int32)), reader.output.shape)
        return None

    def _first_of(self, sizes: tuple) -> Value:
        """Where the tokens at position 0 are packed: int32 [sequences]."""
        key = ("first", sizes)
        if key not in self._made:
            b, index = self.builder, self._inverse_of(sizes, 2)
            ends = (b.ints(0, 0), b.ints(0, 1), b.ints(1, 1))
            self._made[key] = b.StridedSlice(index, *ends, begin_mask=1, end_mask=1, shrink_axis_mask=2)
        return self._made[key]

    def _unpacked(self, value: Value) -> Value:
        key = ("unpacked", value)
        if key not in self._made:
            tokens = self.values[value]
            index = self._inverse_of(tokens.sizes, len(tokens.axes))
            self._made[key] = self.builder.GatherV2(self.packed[value], index, self.builder.const(0, tf.int32))
            self._made[key].shape = value.shape
        return self._made[key]


def _leading_sizes(value: Value, like: Value) -> tuple:
    """The sizes (sequences, positions) of an operand that is broadcast to `like`, whose tokens lie in front."""
    padded = (1,) * (len(like.shape) - len(value.shape)) + tuple(value.shape)
    return padded[:2]


def _packable(node: Node, tokens: list[Tokens], packed: Container[Value]) -> bool:
    """Whether a node can be computed for packed tokens."""
    first = tokens[0]
    if any(t != first for t in tokens) or any(v.shape is None for v in [*node.inputs, *node.outputs]):
        return False
    count = len(first.axes)
    if node.op in op_traits.ELEMENTWISE:
        out = node.output.shape
        for value in node.inputs:
            if value in packed and len(value.shape) == len(out):
                continue
            rest = value.shape[max(0, len(value.shape) - len(out) + count) :]
            if len(value.shape) > len(out) - count and any(not isinstance(d, int) for d in rest):
                return False
            if count == 1 and len(value.shape) == len(out) and value.shape[0] not in (1, out[0]):
                return False
        return True
    if node.op not in _PACKABLE:
        return False
    passed = token_axes.through(node, first)
    at = int(node.op in op_traits.LOOKUPS | {"Split"})  # the operand that the tokens are in
    entering = passed[at]
    if entering is None or not entering.leads:
        return False
    rest = node.inputs[at].shape[len(entering.axes) :]
    return node.inputs[at] in packed or all(isinstance(d, int) for d in rest)

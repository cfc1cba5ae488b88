"""What padding reaches: which positions of a batch may hold anything without a change of any result.

A padding mask `m` is a value [batch, positions] that is 0 at padding. Two analyses, both relative to one such mask:

*Facts* flow forward from the mask: this value is -1e9 wherever `m` is 0, this one is False, this one 0. A softmax over
keys whose scores are set to (or lowered by) -1e4 or less at padding gives exactly 0 there, for exp(x) is 0 in float32
for x < -104: the fact reaches the attention's probabilities. It holds for sequences with at least one unmasked key;
those without any must be computed in whole.

*Demand* flows backward from the results. What is multiplied by such a 0, or chosen away by such a mask, is not demanded
at padding: values and keys of the attention, the terms of a masked mean. The demand passes through everything that is
computed position by position, up to the embeddings. Of `x[:, 0]` the position 0 is demanded alone.

Where a value is "not demanded at padding", its elements at padding may be replaced by any finite numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.graph import demand, dims
from tfvllm.graph.ir import Graph, Node, Value

LOW = -1e4  # a score at or below it (or lowered by it) is taken for masked
WORK = ("MatMul", "_FusedMatMul", "Einsum")
SHAPE_ONLY = ("Shape", "Size", "Rank")  # they read no element


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


@dataclass(frozen=True)
class Fact:
    """What is known of a value at padding, and elsewhere. Elements are numbers; None where unknown.

    `relative`: the number is what is added to something unknown. `open`: elsewhere it is a score as it comes, not
    lowered by anything.
    """

    masked: float
    kept: float | None = None
    relative: bool = False
    open: bool = False


Facts = dict[Value, dict[tuple[int, int], Fact]]  # value -> (axis of sequences, axis of positions) -> fact
Demanded = frozenset[Tokens]  # the ways in which a value is not demanded at padding; empty: demanded everywhere
EVERYWHERE: Demanded = frozenset()


@dataclass
class Analysis:
    mask: Value
    facts: Facts
    demanded: dict[Value, Demanded]
    silenced: list[Node]  # the products in which padding meets only zeros

    def leading(self, value: Value) -> Tokens | None:
        """The tokens of a value that lie in front and are not demanded at padding."""
        return next((t for t in self.demanded.get(value, EVERYWHERE) if t.leads), None)


def analyse(graph: Graph) -> Analysis | None:
    """The analysis under the mask that silences the most; None where no mask silences anything."""
    best = None
    for mask in candidates(graph):
        facts = facts_of(graph, mask)
        silenced = [n for n in graph.live() if any(p is not None for p in _silent_operands(n, facts))]
        if silenced and (best is None or len(silenced) > len(best.silenced)):
            best = Analysis(mask, facts, {}, silenced)
    if best is not None:
        best.demanded = _demanded(graph, best.facts)
    return best


def candidates(graph: Graph) -> Iterator[Value]:
    """Values [batch, positions] that the input of a softmax is made of other than by products, the nearest first."""
    seen: set[Value] = set()
    queue = [n.inputs[0] for n in graph.live() if n.op == "Softmax"]
    while queue:
        value = queue.pop(0)
        if value in seen or value.dtype in (tf.string, tf.resource, tf.variant):
            continue
        seen.add(value)
        if value.rank == 2 and not graph.is_static(value):
            yield value
        if value.node.op in demand.ELEMENTWISE or value.node.op in _VIEWS or value.node.op in ("Transpose", "Cast"):
            queue.extend(value.node.inputs)


# --------------------------------------------------------------------------------------------------------------- facts


def facts_of(graph: Graph, mask: Value) -> Facts:
    """What follows from `mask` being 0 at padding and 1 elsewhere."""
    facts: Facts = {mask: {(0, 1): Fact(0.0, 1.0)}}
    for node in graph.live():
        if len(node.outputs) != 1 or node.output in facts or not any(v in facts for v in node.inputs):
            continue
        found = _facts_of(graph, node, facts)
        if found:
            facts[node.output] = found
    return facts


def _facts_of(graph: Graph, node: Node, facts: Facts) -> dict[tuple[int, int], Fact]:
    x, out = node.inputs[0], node.output
    if out.shape is None:
        return {}
    known = facts.get(x, {})
    if node.op in _VIEWS:
        moved = {(_viewed(node, b), _viewed(node, s)): fact for (b, s), fact in known.items()}
        return {(b, s): fact for (b, s), fact in moved.items() if b is not None and s is not None}
    if node.op == "Transpose":
        perm = node.inputs[1].content
        return {} if perm is None else {(perm.index(b), perm.index(s)): fact for (b, s), fact in known.items()}
    if node.op == "Softmax":
        last = len(out.shape) - 1
        silent = {p: f for p, f in known.items() if p[1] == last and f.masked <= LOW and f.open}
        return {p: Fact(0.0) for p in silent}
    if node.op in demand.ELEMENTWISE:
        return _elementwise_facts(graph, node, facts)
    return {}


def _elementwise_facts(graph: Graph, node: Node, facts: Facts) -> dict[tuple[int, int], Fact]:
    rank = len(node.output.shape)  # type: ignore[arg-type]
    found: dict[tuple[int, int], list[Fact | None]] = {}
    for position, value in enumerate(node.inputs):
        if value.shape is None:
            return {}
        shift = rank - len(value.shape)
        for (b, s), fact in facts.get(value, {}).items():
            found.setdefault((b + shift, s + shift), [None] * len(node.inputs))[position] = fact
    result = {}
    constants = [uniform(graph, v) for v in node.inputs]
    plain = all(v in facts or c is not None or _is_plain(graph, v) for v, c in zip(node.inputs, constants))
    for pair, given in found.items():
        both = [Fact(c, c) if f is None and c is not None else f for f, c in zip(given, constants)]
        combined = _combined(node, both, plain)
        if combined is not None:
            result[pair] = combined
    return result


def _is_plain(graph: Graph, value: Value) -> bool:
    """Whether a score is made of products, weights and small constants alone: nothing else masks it."""
    seen: set[Value] = set()
    stack = [value]
    while stack:
        value = stack.pop()
        if value in seen or value.node.op in _PRODUCTS:
            continue
        seen.add(value)
        if value.node.op == "Const" or graph.is_static(value):
            array = graph.array(value)
            if array is None and value.node.op not in _ARITHMETIC and value.node.op not in _MOVES:
                return False
            if array is not None:
                if array.dtype.kind in "fV" and not np.all(array.astype(np.float64) > LOW):
                    return False
                continue
        elif value.node.op not in _ARITHMETIC and value.node.op not in _MOVES:
            return False
        stack.extend(value.node.inputs[: None if value.node.op in _ARITHMETIC else 1])
    return True


def _combined(node: Node, given: list[Fact | None], plain: bool) -> Fact | None:
    if node.op in ("AddV2", "Add") and (None in given or any(f is not None and f.relative for f in given)):
        known = [f for f in given if f is not None]
        if not known or any(not f.relative and f.kept is None for f in known):
            return None
        is_open = plain and all(f.open if f.relative else f.kept == 0 for f in known)
        return Fact(sum(f.masked for f in known), None, relative=True, open=is_open)
    if any(f is not None and f.relative for f in given):
        return given[0] if node.op in ("Identity", "StopGradient") else None
    masked = _apply(node, [None if f is None else f.masked for f in given])
    if masked is None:
        return None
    kept = _apply(node, [None if f is None else f.kept for f in given])
    is_open = node.op in ("Identity", "StopGradient") and given[0] is not None and given[0].open
    if node.op == "SelectV2" and given[0] is not None and given[0].kept is not None:
        is_open = plain and given[1 if given[0].kept else 2] is None
    return Fact(masked, kept, open=is_open)


def _apply(node: Node, numbers: Sequence[float | None]) -> float | None:
    """The node's result for these operands; None where it depends on an unknown one."""
    if node.op == "SelectV2":
        return None if numbers[0] is None else numbers[1] if numbers[0] else numbers[2]
    absorbing = _ABSORBING.get(node.op)
    if absorbing is not None and absorbing in numbers:
        return absorbing
    if any(n is None for n in numbers):
        return None
    if node.op == "Cast":
        return float(np.float64(numbers[0]).astype(node.output.dtype.as_numpy_dtype))  # type: ignore[arg-type]
    function = _NUMBERS.get(node.op)
    with np.errstate(all="ignore"):
        result = None if function is None else float(function(*numbers))
    return None if result is None or np.isnan(result) else result


_PRODUCTS = ("BatchMatMulV2", "BatchMatMul", "_MklFusedBatchMatMulV2", "Einsum", "MatMul", "_FusedMatMul")
_ARITHMETIC = ("AddV2", "Add", "BiasAdd", "Mul", "Sub", "RealDiv", "Identity", "Cast", "Maximum", "Minimum", "Tanh")
_MOVES = ("Reshape", "ExpandDims", "Squeeze", "Transpose", "GatherV2", "BroadcastTo", "StridedSlice", "Sum", "Mean")
_ABSORBING = {"Mul": 0.0, "LogicalAnd": 0.0, "LogicalOr": 1.0}
_NUMBERS: dict[str, Callable[..., Any]] = {
    "Identity": lambda a: a,
    "StopGradient": lambda a: a,
    "AddV2": np.add,
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "RealDiv": np.divide,
    "Neg": np.negative,
    "Maximum": np.maximum,
    "Minimum": np.minimum,
    "LogicalNot": np.logical_not,
    "LogicalAnd": np.logical_and,
    "LogicalOr": np.logical_or,
    "Equal": np.equal,
    "NotEqual": np.not_equal,
    "Greater": np.greater,
    "GreaterEqual": np.greater_equal,
    "Less": np.less,
    "LessEqual": np.less_equal,
}


def uniform(graph: Graph, value: Value) -> float | None:
    """The number that every element of a constant is; None where they differ or it is none."""
    if value.node.op in ("Fill", "BroadcastTo"):
        return uniform(graph, value.node.inputs[1 if value.node.op == "Fill" else 0])
    array = graph.constant(value)
    if array is None or array.size == 0 or array.dtype.kind not in "fiubV":
        return None
    first = array.reshape(-1)[0]
    return float(first) if np.all(array == first) else None


# -------------------------------------------------------------------------------------------------------------- demand


def _demanded(graph: Graph, facts: Facts) -> dict[Value, Demanded]:
    found: dict[Value, Demanded] = dict.fromkeys(graph.outputs.values(), EVERYWHERE)
    effects = set(graph.effects)
    for node in reversed(graph.live()):
        if node.op in SHAPE_ONLY or (node not in effects and not any(v in found for v in node.outputs)):
            continue
        for value, needs in zip(node.inputs, demanded_of(node, found, facts)):
            found[value] = found[value] & needs if value in found else needs
    return found


def demanded_of(node: Node, found: dict[Value, Demanded], facts: Facts) -> list[Demanded]:
    """What a node demands of its inputs, given what is demanded of its outputs."""
    needs: list[set[Tokens]] = [set() for _ in node.inputs]
    wanted = [found.get(v) for v in node.outputs]
    shared = [w for w in wanted if w is not None]
    for tokens in frozenset.intersection(*shared) if shared else ():
        for need, passed in zip(needs, through(node, tokens)):
            if passed is not None:
                need.add(passed)
    if node.op in demand.ELEMENTWISE:  # what makes a fact true must stay true
        for i, value in enumerate(node.inputs):
            needs[i] -= {t for t in needs[i] if t.axes in facts.get(value, {})}
        for i, silent in _chosen_away(node, facts):
            if silent.axes not in facts.get(node.inputs[i], {}):
                needs[i].add(silent)
    for need, operand in zip(needs, _silent_operands(node, facts)):
        if operand is not None:
            need.add(operand)
    if node.op == "Softmax":
        for (b, s), fact in facts.get(node.inputs[0], {}).items():
            shape = node.inputs[0].shape
            if fact.relative and fact.open and fact.masked <= LOW and s == len(shape) - 1:  # type: ignore[arg-type]
                needs[0].add(Tokens(b, s, (shape[b], shape[s])))  # type: ignore[index]
    if node.op == "StridedSlice":
        row = demand.selected_row(node)
        if row is not None and row.axis == 1 and row.index == 0:
            needs[0].add(Tokens(0, 1, node.inputs[0].shape[:2]))  # type: ignore[index]
    return [frozenset(n) for n in needs]


def through(node: Node, tokens: Tokens) -> list[Tokens | None]:
    """For each operand: where in it the tokens lie that these tokens of the result are computed from alone."""
    rule = _elementwise if node.op in demand.ELEMENTWISE else _PASSES.get(node.op)
    return [None] * len(node.inputs) if rule is None else rule(node, tokens)


def _chosen_away(node: Node, facts: Facts) -> Iterator[tuple[int, Tokens]]:
    """Operands of `where(m, x, y)` and `x·m` that do not count where the mask is 0."""
    if node.op == "SelectV2":
        for pair, fact in facts.get(node.inputs[0], {}).items():
            loser = 2 if fact.masked else 1
            yield from ((loser, t) for t in _aligned(node, 0, pair, loser))
    elif node.op == "Mul":
        for i in (0, 1):
            for pair, fact in facts.get(node.inputs[i], {}).items():
                if fact.masked == 0 and not fact.relative:
                    yield from ((1 - i, t) for t in _aligned(node, i, pair, 1 - i))


def _aligned(node: Node, from_operand: int, pair: tuple[int, int], operand: int) -> Iterator[Tokens]:
    """The axes of one operand seen in another, if both axes are there."""
    if node.inputs[operand].shape is None:
        return
    shift = len(node.inputs[operand].shape) - len(node.inputs[from_operand].shape)  # type: ignore[arg-type]
    b, s = pair[0] + shift, pair[1] + shift
    shape = node.inputs[operand].shape
    out = node.output.shape
    if b >= 0 and s >= 0 and out is not None:
        offset = len(out) - len(shape)  # type: ignore[arg-type]
        if _is_axis(shape[b], out[b + offset]) and _is_axis(shape[s], out[s + offset]):  # type: ignore[index]
            yield Tokens(b, s, (shape[b], shape[s]))  # type: ignore[index]


def _is_axis(size: Any, of_result: Any) -> bool:
    return size != 1 or of_result == 1


def _silent_operands(node: Node, facts: Facts) -> list[Tokens | None]:
    """For each operand of a product: the tokens that meet only zeros of the other operand at padding."""
    result: list[Tokens | None] = [None] * len(node.inputs)
    if node.op not in ("BatchMatMulV2", "BatchMatMul") or any(v.rank is None for v in node.inputs):
        return result
    x, y = node.inputs
    if len(x.shape) != len(y.shape):  # type: ignore[arg-type]
        return result
    rank = len(x.shape)  # type: ignore[arg-type]
    summed = (rank - 2 if node.attr("adj_x") else rank - 1, rank - 1 if node.attr("adj_y") else rank - 2)
    for i in (0, 1):
        for (b, s), fact in facts.get(node.inputs[i], {}).items():
            other = node.inputs[1 - i]
            if s != summed[i] or b >= rank - 2 or fact.masked != 0 or fact.relative or other in facts:
                continue
            if other.shape[b] != 1 or node.output.shape[b] == 1:  # type: ignore[index]
                j = summed[1 - i]
                result[1 - i] = Tokens(b, j, (other.shape[b], other.shape[j]))  # type: ignore[index]
    return result


# ------------------------------------------------------------------------------------ how a demand passes through an op


def _elementwise(node: Node, tokens: Tokens) -> list[Tokens | None]:
    out = node.output.shape
    result: list[Tokens | None] = []
    for value in node.inputs:
        if out is None or value.shape is None:
            result.append(None)
            continue
        shift = len(out) - len(value.shape)
        axes = [a - shift for a in tokens.axes]
        if min(axes) < 0 or not all(_is_axis(value.shape[a], out[a + shift]) for a in axes):
            result.append(None)
        elif tokens.position is None:
            same = value.shape[axes[0]] == out[tokens.batch]
            result.append(Tokens(axes[0], None, tokens.sizes) if same else None)
        else:
            result.append(Tokens(axes[0], axes[1], tuple(value.shape[a] for a in axes)))
    return result


def _first(inner: Callable[[Node, Tokens], Tokens | None], at: int = 0) -> Callable[[Node, Tokens], list]:
    """The demand reaches one operand alone."""

    def rule(node: Node, tokens: Tokens) -> list[Tokens | None]:
        x = node.inputs[at]
        if x.shape is None or any(v.shape is None for v in node.outputs):
            return [None] * len(node.inputs)
        passed = inner(node, tokens)
        return [passed if i == at else None for i in range(len(node.inputs))]

    return rule


def _not_last(node: Node, tokens: Tokens) -> Tokens | None:
    last = len(node.output.shape) - 1  # type: ignore[arg-type]
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


def _viewed(node: Node, axis: int) -> int | None:
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
    x, strides = node.inputs[0], node.inputs[3].content
    if x.shape is None or strides is None or node.attr("ellipsis_mask", 0):
        return None
    result: list[int | None] = []
    axis = 0
    for i, stride in enumerate(strides):
        bit = 1 << i
        if node.attr("new_axis_mask", 0) & bit:
            result.append(None)
            continue
        whole = node.attr("begin_mask", 0) & bit and node.attr("end_mask", 0) & bit and stride == 1
        if not node.attr("shrink_axis_mask", 0) & bit:
            result.append(axis if whole else None)
        axis += 1
    return [*result, *range(axis, len(x.shape))]


def _transpose(node: Node, tokens: Tokens) -> Tokens | None:
    perm = node.inputs[1].content
    if perm is None:
        return None
    return Tokens(perm[tokens.batch], None if tokens.position is None else perm[tokens.position], tokens.sizes)


def _reduce(node: Node, tokens: Tokens) -> Tokens | None:
    x, axes = node.inputs[0], node.inputs[1].content
    if axes is None:
        return None
    rank = len(x.shape)  # type: ignore[arg-type]
    reduced = {a % rank for a in (axes if isinstance(axes, tuple) else (axes,))}
    left = [i for i in range(rank) if node.attr("keep_dims") or i not in reduced]
    found = [left[a] for a in tokens.axes]
    if any(a in reduced for a in found):
        return None
    return Tokens(found[0], None if tokens.position is None else found[1], tokens.sizes)


def _lookup(node: Node, tokens: Tokens) -> Tokens | None:
    """table[ids]: as many leading axes as the ids have."""
    ids = node.inputs[1]
    if ids.rank is None or node.attr("batch_dims", 0) or max(tokens.axes) >= ids.rank:
        return None
    return tokens if node.op == "ResourceGather" or node.inputs[2].content == 0 else None


def _unpack(node: Node, tokens: Tokens) -> Tokens | None:
    axis = node.attr("axis", 0) % len(node.inputs[0].shape)  # type: ignore[arg-type]
    moved = [a + (a >= axis) for a in tokens.axes]
    return Tokens(moved[0], None if tokens.position is None else moved[1], tokens.sizes)


def _split(node: Node, tokens: Tokens) -> list[Tokens | None]:
    result: list[Tokens | None] = [None] * len(node.inputs)
    axis = node.inputs[0 if node.op == "Split" else 2].content
    at = 1 if node.op == "Split" else 0
    shape = node.inputs[at].shape
    if isinstance(axis, int) and shape is not None and axis % len(shape) not in tokens.axes:
        result[at] = tokens
    return result


def _concat(node: Node, tokens: Tokens) -> list[Tokens | None]:
    axis, shape = node.inputs[-1].content, node.output.shape
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
    if _is_axis(shape[tokens.batch], out[tokens.batch]):  # type: ignore[index]
        result[i] = Tokens(tokens.batch, axis, (shape[tokens.batch], shape[axis]))  # type: ignore[index]
    return result


_VIEWS = ("Reshape", "ExpandDims", "Squeeze", "StridedSlice", "BroadcastTo")
_PASSES: dict[str, Callable[[Node, Tokens], list[Tokens | None]]] = {
    "MatMul": _matmul,
    "_FusedMatMul": _matmul,
    "BatchMatMulV2": _batch_matmul,
    "BatchMatMul": _batch_matmul,
    "Reshape": _first(_view),
    "ExpandDims": _first(_view),
    "Squeeze": _first(_view),
    "StridedSlice": _first(_view),
    "Transpose": _first(_transpose),
    "BiasAdd": _first(_not_last),
    "Softmax": _first(_not_last),
    "LogSoftmax": _first(_not_last),
    "_MklLayerNorm": _first(_not_last),
    "GatherV2": _first(_lookup, at=1),
    "ResourceGather": _first(_lookup, at=1),
    "Unpack": _first(_unpack),
    "Split": _split,
    "SplitV": _split,
    "ConcatV2": _concat,
}
for _op in ("Mean", "Sum", "Max", "Min", "Prod"):
    _PASSES[_op] = _first(_reduce)


# -------------------------------------------------------------------------------------------------------------- reasons


def reason(graph: Graph, analysis: Analysis) -> str:
    """Why padding counts: what becomes of the first value before an attention that is demanded everywhere."""
    for node in analysis.silenced:
        for start, tokens in zip(node.inputs, _silent_operands(node, analysis.facts)):
            value: Value | None = start
            while value is not None and tokens is not None:
                if tokens not in analysis.demanded.get(value, EVERYWHERE):
                    return _blame(graph, analysis, value, tokens)
                at = next((i for i, t in enumerate(through(value.node, tokens)) if t is not None), None)
                value, tokens = (None, None) if at is None else (value.node.inputs[at], through(value.node, tokens)[at])
    return "too few matrix products are computed position by position"


def _blame(graph: Graph, analysis: Analysis, value: Value, tokens: Tokens) -> str:
    """What takes padding in, on the way from a value to the results."""
    for _ in range(len(graph.nodes)):
        result = next((k for k, v in graph.outputs.items() if v is value), None)
        if result is not None:
            return f"padded positions are part of the result {result!r}"
        following = None
        for reader, position in value.readers:
            if reader.op in SHAPE_ONLY or not any(v in analysis.demanded for v in reader.outputs):
                continue
            if tokens in demanded_of(reader, analysis.demanded, analysis.facts)[position]:
                continue
            ahead = [(v, t) for v in reader.outputs for t in _forward(reader, position, v, tokens)]
            following = next(((v, t) for v, t in ahead if t not in analysis.demanded.get(v, EVERYWHERE)), None)
            if following is None:
                return f"{reader.op} may bring padded positions into a result"
            break
        if following is None:
            break
        value, tokens = following
    return "padded positions may reach a result"


def _forward(node: Node, position: int, out: Value, tokens: Tokens) -> Iterator[Tokens]:
    """The tokens of an operand, seen in a result."""
    shape = out.shape or ()
    pairs = [Tokens(b, s, (shape[b], shape[s])) for b in range(len(shape)) for s in range(b + 1, len(shape))]
    for found in [*pairs, *(Tokens(b, None, tokens.sizes) for b in range(len(shape)))]:
        passed = through(node, found)[position]
        if passed is not None and passed.axes == tokens.axes:
            yield found

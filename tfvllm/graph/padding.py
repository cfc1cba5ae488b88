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

from collections.abc import Iterator
from dataclasses import dataclass

import tensorflow as tf

from tfvllm.graph import axis_transfer, demand, op_traits
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.padding_facts import LOW, Facts, facts_of
from tfvllm.graph.token_axes import Tokens, through

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
        if value.node.op in op_traits.ELEMENTWISE | op_traits.VIEWS | {"Transpose"}:
            queue.extend(value.node.inputs)


# -------------------------------------------------------------------------------------------------------------- demand


def _demanded(graph: Graph, facts: Facts) -> dict[Value, Demanded]:
    found: dict[Value, Demanded] = dict.fromkeys(graph.outputs.values(), EVERYWHERE)
    effects = set(graph.effects)
    for node in reversed(graph.live()):
        if node.op in op_traits.SHAPE_ONLY or (node not in effects and not any(v in found for v in node.outputs)):
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
    if node.op in op_traits.ELEMENTWISE:  # what makes a fact true must stay true
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
            if fact.relative and fact.open and fact.masked <= LOW and s == len(shape) - 1:
                needs[0].add(Tokens(b, s, (shape[b], shape[s])))
    if node.op == "StridedSlice":
        row = demand.selected_row(node)
        if row is not None and row.axis == 1 and row.index == 0:
            needs[0].add(Tokens(0, 1, node.inputs[0].shape[:2]))
    return [frozenset(n) for n in needs]


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
    b, s = (axis_transfer.result_axis(node, from_operand, axis) for axis in pair)
    out = node.output.shape
    if b is not None and s is not None:
        seen = through(node, Tokens(b, s, (out[b], out[s])))[operand]
        if seen is not None:
            yield seen


def _silent_operands(node: Node, facts: Facts) -> list[Tokens | None]:
    """For each operand of a product: the tokens that meet only zeros of the other operand at padding."""
    result: list[Tokens | None] = [None] * len(node.inputs)
    if node.op not in op_traits.BATCH_MATMULS or any(v.rank is None for v in node.inputs):
        return result
    x, y = node.inputs
    if len(x.shape) != len(y.shape):
        return result
    rank = len(x.shape)
    summed = axis_transfer.summed_axes(node)
    for i in (0, 1):
        for (b, s), fact in facts.get(node.inputs[i], {}).items():
            other = node.inputs[1 - i]
            if s != summed[i] or b >= rank - 2 or fact.masked != 0 or fact.relative or other in facts:
                continue
            if other.shape[b] != 1 or node.output.shape[b] == 1:
                j = summed[1 - i]
                result[1 - i] = Tokens(b, j, (other.shape[b], other.shape[j]))
    return result


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
        for reader, position in value.uses:
            if reader.op in op_traits.SHAPE_ONLY or not any(v in analysis.demanded for v in reader.outputs):
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

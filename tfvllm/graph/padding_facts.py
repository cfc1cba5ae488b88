"""What is known of the values at padded positions: which number stands there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfvllm.graph import op_traits
from tfvllm.graph.axis_transfer import result_axis
from tfvllm.graph.ir import Graph, Node, Value

LOW = -1e4  # a score at or below it (or lowered by it) is taken for masked


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
    if node.op in op_traits.VIEWS | {"Transpose"}:
        moved = {tuple(result_axis(node, 0, axis) for axis in pair): fact for pair, fact in known.items()}
        return {(b, s): fact for (b, s), fact in moved.items() if b is not None and s is not None}
    if node.op == "Softmax":
        last = len(out.shape) - 1
        silent = {p: f for p, f in known.items() if p[1] == last and f.masked <= LOW and f.open}
        return {p: Fact(0.0) for p in silent}
    if node.op in op_traits.ELEMENTWISE:
        return _elementwise_facts(graph, node, facts)
    return {}


def _elementwise_facts(graph: Graph, node: Node, facts: Facts) -> dict[tuple[int, int], Fact]:
    found: dict[tuple[int, int], list[Fact | None]] = {}
    for position, value in enumerate(node.inputs):
        if value.shape is None:
            return {}
        for pair, fact in facts.get(value, {}).items():
            b, s = (result_axis(node, position, axis) for axis in pair)
            if b is not None and s is not None:
                found.setdefault((b, s), [None] * len(node.inputs))[position] = fact
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
        if value in seen or value.node.op in _MATMULS:
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
    if node.op in op_traits.ADDITIONS and (None in given or any(f is not None and f.relative for f in given)):
        known = [f for f in given if f is not None]
        if not known or any(not f.relative and f.kept is None for f in known):
            return None
        is_open = plain and all(f.open if f.relative else f.kept == 0 for f in known)
        return Fact(sum(f.masked for f in known), None, relative=True, open=is_open)
    if any(f is not None and f.relative for f in given):
        return given[0] if node.op in op_traits.COPIES else None
    masked = _apply(node, [None if f is None else f.masked for f in given])
    if masked is None:
        return None
    kept = _apply(node, [None if f is None else f.kept for f in given])
    is_open = node.op in op_traits.COPIES and given[0] is not None and given[0].open
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
        return float(np.float64(numbers[0]).astype(node.output.dtype.as_numpy_dtype))
    function = _NUMBERS.get(node.op)
    with np.errstate(all="ignore"):
        result = None if function is None else float(function(*numbers))
    return None if result is None or np.isnan(result) else result


_MATMULS = op_traits.MATMULS | op_traits.BATCH_MATMULS | {"_MklFusedBatchMatMulV2", "Einsum"}


# Of small operands they make small results; Tanh is what caps scores. StopGradient and the like are gone by then.
_ARITHMETIC = op_traits.ARITHMETIC | {"BiasAdd", "Identity", "Cast", "Tanh"}


# Their first operand alone counts. A sum or a mean of small numbers is taken for small.
_MOVES = op_traits.VIEWS | {"Transpose", "GatherV2", "Sum", "Mean"}


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

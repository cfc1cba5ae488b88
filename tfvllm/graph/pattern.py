"""Patterns that read like forward maths, and how they are found in a graph.

    def pattern(self, x, w, b):
        return op.BiasAdd(op.MatMul(x, w, name="product"), b)

Parameters are variables: they match any value, and one that appears twice must match the same value. `op.X(...)`
matches a node of that type (`op.any_of("Add", "AddV2")` one of several); operands of commutative ops match in either
order; `either(p, q)` matches one of several patterns; `number(0.5)` matches a constant of that value (all its elements
equal it, to one part in a million), `constant("c")` and `weight("w")` any constant or frozen variable; `maybe(...)`
matches with or without one-input wrappers such as Identity.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tfvllm.graph import op_traits
from tfvllm.graph.ir import Graph, Node, Value


class Pattern:
    """Something a value may match."""

    def match(self, graph: Graph, value: Value, found: Match) -> Iterator[Match]:
        raise NotImplementedError  # every subclass below has its own


@dataclass(frozen=True)
class Match:
    """What a pattern's names are bound to. `m.x` is a value, `m.node("product")` the node behind it."""

    bound: dict[str, Value] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()

    def __getattr__(self, name: str) -> Value:
        try:
            return self.__dict__["bound"][name]
        except KeyError:
            raise AttributeError(name) from None

    def node(self, name: str) -> Node:
        return self.bound[name].node

    def get(self, name: str) -> Value | None:
        return self.bound.get(name)

    def bind(self, name: str, value: Value) -> Match | None:
        known = self.bound.get(name)
        if known is not None:
            return self if known is value else None
        return Match({**self.bound, name: value}, self.nodes)

    def through(self, node: Node) -> Match:
        return Match(self.bound, (*self.nodes, node))


@dataclass(frozen=True)
class Variable(Pattern):
    name: str
    test: Callable[[Graph, Value], bool] | None = None

    def match(self, graph, value, found):
        if self.test is None or self.test(graph, value):
            bound = found.bind(self.name, value)
            if bound is not None:
                yield bound


@dataclass(frozen=True)
class Number(Pattern):
    """A constant all of whose elements are `number`."""

    number: float
    tolerance: float = 1e-6

    def match(self, graph, value, found):
        array = graph.constant(value)
        if array is not None and array.size and array.dtype.kind in "fiuV":
            array = array.astype(np.float64)
            if np.all(np.abs(array - self.number) <= self.tolerance * max(1.0, abs(self.number))):
                yield found


@dataclass(frozen=True)
class Either(Pattern):
    options: tuple[Pattern, ...]

    def match(self, graph, value, found):
        for option in self.options:
            yield from option.match(graph, value, found)


@dataclass(frozen=True)
class Maybe(Pattern):
    """`inner`, or one of `ops` applied to it."""

    names: tuple[str, ...]
    inner: Pattern

    def match(self, graph, value, found):
        yield from self.inner.match(graph, value, found)
        while value.node.op in self.names and len(value.node.inputs) >= 1:
            found = found.through(value.node)
            value = value.node.inputs[0]
            yield from self.inner.match(graph, value, found)


@dataclass(frozen=True)
class Op(Pattern):
    """A node by its type, operands and attributes."""

    names: tuple[str, ...]
    operands: tuple[Pattern, ...] | None  # None: any number of any operands
    name: str | None = None
    attrs: tuple[tuple[str, Any], ...] = ()
    index: int = 0

    def match(self, graph, value, found):
        node = value.node
        if node.op not in self.names or value.index != self.index:
            return
        if self.operands is not None and len(node.inputs) != len(self.operands):
            return
        for key, wanted in self.attrs:
            actual = node.attr(key)
            if actual != wanted and not (isinstance(wanted, float) and math.isclose(actual, wanted, rel_tol=1e-6)):
                return
        found = found.through(node)
        if self.name is not None:
            bound = found.bind(self.name, value)
            if bound is None:
                return
            found = bound
        if self.operands is None:
            yield found
            return
        yield from self._operands(graph, node.inputs, found)
        if node.op in op_traits.COMMUTATIVE and self.operands[0] != self.operands[1]:
            yield from self._operands(graph, list(reversed(node.inputs)), found)

    def _operands(self, graph: Graph, values: Sequence[Value], found: Match, at: int = 0) -> Iterator[Match]:
        assert self.operands is not None
        if at == len(self.operands):
            yield found
            return
        for partial in self.operands[at].match(graph, values[at], found):
            yield from self._operands(graph, values, partial, at + 1)


class _Ops:
    """`op.MatMul(x, w, name=..., transpose_b=False)`: the pattern of a node of type MatMul."""

    def __getattr__(self, op_name: str) -> Callable[..., Op]:
        return self.any_of(op_name)

    @staticmethod
    def any_of(*names: str) -> Callable[..., Op]:
        def make(*operands, name: str | None = None, index: int = 0, **attrs) -> Op:
            inner = None if operands == (...,) else tuple(map(as_pattern, operands))
            return Op(names, inner, name, tuple(attrs.items()), index)

        return make


op = _Ops()


def as_pattern(operand: Any) -> Pattern:
    return operand if isinstance(operand, Pattern) else Number(float(operand))


def number(value: float, tolerance: float = 1e-6) -> Number:
    return Number(value, tolerance)


def constant(name: str) -> Variable:
    return Variable(name, lambda graph, value: value.node.op == "Const")


def weight(name: str) -> Variable:
    """A frozen variable's value, or a constant."""
    return Variable(name, lambda graph, value: value.node.op == "Const" or graph.is_weight(value))


def either(*options: Any) -> Either:
    return Either(tuple(map(as_pattern, options)))


def maybe(*names: str) -> Callable[[Any], Maybe]:
    return lambda inner: Maybe(names, as_pattern(inner))


def add(a, b, name: str | None = None) -> Op:
    return op.any_of(*op_traits.ADDITIONS)(a, b, name=name)


def variables_of(function: Callable) -> dict[str, Variable]:
    """The parameters of a `pattern` method (`self` excluded) as variables."""
    return {p: Variable(p) for p in inspect.signature(function).parameters if p != "self"}


def roots(pattern: Pattern) -> tuple[str, ...] | None:
    """The op types a match can start at, or None for any."""
    if isinstance(pattern, Op):
        return pattern.names
    if isinstance(pattern, Either):
        names: list[str] = []
        for option in pattern.options:
            found = roots(option)
            if found is None:
                return None
            names.extend(found)
        return tuple(names)
    return None

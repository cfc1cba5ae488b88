"""Sizes that are known, unknown, or related to one another: the arithmetic of symbolic dimensions.

A size is a Python `int` where it is known and a `Dim` where it is not. A `Dim` is a polynomial with integer
coefficients over named symbols (`batch`, `seq`, ...), kept in one canonical form, so that two sizes are provably
equal exactly when they compare equal. What is not polynomial (a quotient, a broadcast of two unknowns) becomes a
symbol named after the expression it stands for: equal expressions give equal symbols.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

Size = "int | Dim"
_counter = itertools.count()
_definitions: dict[str, tuple[Callable[..., int], tuple]] = {}


class Dim:
    """A polynomial over symbols: `{(): 2, ("batch", "seq"): 3}` is 2 + 3·batch·seq. Immutable."""

    __slots__ = ("_hash", "terms")

    def __init__(self, terms: Mapping[tuple[str, ...], int]):
        self.terms = tuple(sorted((k, v) for k, v in terms.items() if v))
        self._hash = hash(self.terms)

    def __eq__(self, other):
        return isinstance(other, Dim) and self.terms == other.terms

    def __hash__(self):
        return self._hash

    def __repr__(self):
        parts = []
        for symbols, factor in self.terms:
            names = "*".join(symbols)
            parts.append(str(factor) if not names else names if factor == 1 else f"{factor}*{names}")
        return " + ".join(parts)

    def symbols(self) -> set[str]:
        return {s for term, _ in self.terms for s in term}


def symbol(name: str) -> Dim:
    return Dim({(name,): 1})


def fresh(hint: str = "d") -> Dim:
    """A size about which nothing is known, equal to itself alone."""
    return symbol(f"{hint}#{next(_counter)}")


def _terms(size) -> dict[tuple[str, ...], int]:
    return dict(size.terms) if isinstance(size, Dim) else {(): int(size)}


def _close(terms: dict[tuple[str, ...], int]):
    terms = {k: v for k, v in terms.items() if v}
    if not terms:
        return 0
    if set(terms) == {()}:
        return terms[()]
    return Dim(terms)


def add(a, b):
    terms = _terms(a)
    for k, v in _terms(b).items():
        terms[k] = terms.get(k, 0) + v
    return _close(terms)


def multiply(a, b):
    terms: dict[tuple[str, ...], int] = {}
    for (k1, v1), (k2, v2) in itertools.product(_terms(a).items(), _terms(b).items()):
        k = tuple(sorted(k1 + k2))
        terms[k] = terms.get(k, 0) + v1 * v2
    return _close(terms)


def subtract(a, b):
    return add(a, multiply(-1, b))


def product(sizes: Sequence):
    return reduce(multiply, sizes, 1)


def divide(a, b):
    """a // b. Exact where b is a single term that divides every term of a; else a symbol that stands for it."""
    if isinstance(a, int) and isinstance(b, int) and b:
        return a // b
    divisor = _terms(b)
    if len(divisor) == 1:
        (names, factor) = next(iter(divisor.items()))
        result: dict[tuple[str, ...], int] = {}
        for k, v in _terms(a).items():
            rest = list(k)
            if factor == 0 or v % factor:
                break
            try:
                for name in names:
                    rest.remove(name)
            except ValueError:
                break
            result[tuple(rest)] = v // factor
        else:
            return _close(result)
    return _opaque("div", lambda x, y: x // y if y else 0, a, b)


def broadcast(a, b):
    """The size of one axis of a broadcast result."""
    if a == b:
        return a
    if a == 1:
        return b
    if b == 1:
        return a
    if isinstance(a, int):
        return a
    if isinstance(b, int):
        return b
    # Broadcasting is associative, commutative and idempotent: one flat, sorted set of sizes names the result.
    parts = {repr(p): p for x in (a, b) for p in broadcast_parts(x)}
    if len(parts) == 1:
        return next(iter(parts.values()))
    return _opaque("broadcast", _broadcast_value, *(parts[k] for k in sorted(parts)))


def broadcast_parts(size) -> tuple:
    """The sizes of which a size is the broadcast; itself alone if it is no broadcast."""
    if isinstance(size, Dim) and len(size.terms) == 1:
        (names, factor) = size.terms[0]
        if factor == 1 and len(names) == 1 and names[0].startswith("broadcast(") and names[0] in _definitions:
            return _definitions[names[0]][1]
    return (size,)


def _broadcast_value(*sizes: int) -> int:
    return next((s for s in sizes if s != 1), 1)


def minimum(a, b):
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return a if a == b else _opaque("min", min, *sorted((a, b), key=repr))


def maximum(a, b):
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return a if a == b else _opaque("max", max, *sorted((a, b), key=repr))


def _opaque(name: str, function: Callable[..., int], *arguments) -> Dim:
    key = f"{name}({','.join(map(repr, arguments))})"
    _definitions[key] = (function, arguments)
    return symbol(key)


def atoms(size) -> set[str]:
    """The symbols that a size is made of, through broadcasts, quotients and the like."""
    found: set[str] = set()
    stack = [size]
    while stack:
        current = stack.pop()
        for name in current.symbols() if isinstance(current, Dim) else ():
            if name in _definitions:
                stack.extend(_definitions[name][1])
            else:
                found.add(name)
    return found


def evaluate(size, given: Mapping[str, int], default: int = 1) -> int:
    """The number a size takes when symbols take the values `given`; a symbol that is not given takes `default`."""
    if isinstance(size, int):
        return size
    total = 0
    for names, factor in size.terms:
        total += factor * math.prod(_value(name, given, default) for name in names)
    return total


def _value(name: str, given: Mapping[str, int], default: int) -> int:
    if name in given:
        return given[name]
    if name in _definitions:
        function, arguments = _definitions[name]
        return function(*(evaluate(a, given, default) for a in arguments))
    return default


def broadcast_shapes(a: tuple | None, b: tuple | None) -> tuple | None:
    """The shape of a broadcast of two shapes; None where a rank is unknown."""
    if a is None or b is None:
        return None
    rank = max(len(a), len(b))
    a = (1,) * (rank - len(a)) + tuple(a)
    b = (1,) * (rank - len(b)) + tuple(b)
    return tuple(broadcast(x, y) for x, y in zip(a, b))

"""Sums and products rearranged so that fewer passes over the data are needed."""

import numpy as np
import tensorflow as tf

from tfvllm.graph.builder import Declined, Skip
from tfvllm.graph.guarantee import Exact, Reordered
from tfvllm.graph.pattern import add, constant, either, op
from tfvllm.graph.rewriter import Rule


class FactorOut(Rule):
    """x·c + y·c -> (x + y)·c,   x·c - y·c -> (x - y)·c,   x/c + y/c -> (x + y)/c.   Two products become one."""

    guarantee = Reordered(within="the sum of x and y")  # distributing rounds at other places

    def pattern(self, x, y, c):
        def pair(both):
            return op.any_of("AddV2", "Add", "Sub")(both("first", x), both("second", y), name="sum")

        return either(
            pair(lambda name, v: op.Mul(v, c, name=name)),
            pair(lambda name, v: op.RealDiv(v, c, name=name)),
        )

    def condition(self, graph, m):
        if not m.sum.dtype.is_floating:
            raise Skip("integers")
        if m.x is m.y:
            raise Skip("x·c + x·c")
        if any(graph.single_use(v) is None for v in (m.first, m.second)):
            raise Declined("a product is read elsewhere too")
        if m.x.shape is None or m.y.shape is None or not _alike(m.x.shape, m.y.shape):
            raise Declined("the summands have unlike shapes: their sum is larger than they are")

    def replacement(self, b, m):
        total = b.op(m.node("sum").op, [m.x, m.y])[0]
        return b.op(m.node("first").op, [total, m.c])[0]


def _alike(a, b) -> bool:
    """Whether two shapes may be the same: sizes that are known on both sides are equal."""
    return len(a) == len(b) and all(x == y or not (isinstance(x, int) and isinstance(y, int)) for x, y in zip(a, b))


class JoinFactors(Rule):
    """(x·a)·b -> x·(a·b),   (x/a)·b -> x·(b/a) for constants a and b."""

    guarantee = Reordered()  # one rounding fewer

    def pattern(self, x):
        a, b = constant("a"), constant("b")
        return either(op.Mul(op.Mul(x, a, name="inner"), b), op.Mul(op.RealDiv(x, a, name="inner"), b))

    def condition(self, graph, m):
        if not m.x.dtype.is_floating:
            raise Skip("integers")
        if m.x.node.op == "Const":
            raise Skip("constant folding's work")
        if graph.single_use(m.inner) is None:
            raise Declined("the inner product is read elsewhere too")
        both = _combined(graph, m)
        parts = [graph.constant(v).astype(np.float64) for v in (m.a, m.b)]
        limits = np.finfo(np.float16 if m.x.dtype == tf.float16 else np.float32)
        low, high = float(limits.tiny), float(limits.max)
        ordinary = [np.all((np.abs(p) <= high) & ((np.abs(p) >= low) | (p == 0))) for p in (*parts, both)]
        if not all(ordinary):
            raise Declined("the joined factor leaves the range of ordinary numbers")

    def replacement(self, b, m):
        return b.Mul(m.x, b.const(_combined(b.graph, m), m.x.dtype))


def _combined(graph, m):
    with np.errstate(all="ignore"):
        a, b = (graph.constant(v).astype(np.float64) for v in (m.a, m.b))
        return b / a if m.node("inner").op == "RealDiv" else a * b


class JoinTerms(Rule):
    """(x + a) + b -> x + (a + b) for constants and weights a and b (a convolution's bias and its normalisation's)."""

    guarantee = Reordered(within="a + b")

    def pattern(self, x, a, b):
        plus = op.any_of("AddV2", "Add", "BiasAdd")
        return plus(plus(x, a, name="inner"), b, name="out")

    def condition(self, graph, m):
        if not m.x.dtype.is_floating:
            raise Skip("integers")
        if graph.is_static(m.x) or not graph.is_static(m.a) or not graph.is_static(m.b):
            raise Skip("not two fixed terms")
        if graph.single_use(m.inner) is None:
            raise Declined("the inner sum is read elsewhere too")
        if m.x.shape is None or m.x.shape != m.inner.shape or m.out.shape != m.inner.shape:
            raise Declined("a term widens the sum")
        for v in (m.a, m.b):
            if v.shape is None or any(d != 1 for d in v.shape[:-1]):
                raise Declined("a term is more than one number for each position of the last axis")
        nodes = (m.node("inner"), m.node("out"))
        if any(n.op == "BiasAdd" and n.attr("data_format", "NHWC") != "NHWC" for n in nodes):
            raise Declined("the bias lies along another axis (NCHW)")

    def replacement(self, b, m):
        total = b.AddV2(_flat(b, m.a), _flat(b, m.b))
        if m.x.rank >= 2 and total.shape == m.x.shape[-1:]:
            return b.BiasAdd(m.x, total)
        return b.AddV2(m.x, total)


def _flat(b, value):
    return b.reshape(value, value.shape[-1:]) if value.rank > 1 else value


class Signs(Rule):
    """x + (-y) -> x - y,   x - (-y) -> x + y,   -(-x) -> x,   (-x)·(-y) -> x·y."""

    guarantee = Exact()

    def pattern(self, x, y):
        return either(
            add(x, op.Neg(y), name="difference"),
            op.Sub(x, op.Neg(y), name="sum"),
            op.Neg(op.Neg(x), name="same"),
            op.any_of("Mul")(op.Neg(x), op.Neg(y), name="product"),
        )

    def replacement(self, b, m):
        if m.get("same") is not None:
            return m.x
        if m.get("product") is not None:
            return b.Mul(m.x, m.y)
        return b.Sub(m.x, m.y) if m.get("difference") is not None else b.AddV2(m.x, m.y)


class SmallPowers(Rule):
    """x² -> square(x),   x³ -> x·square(x).   The general power is tens of times slower."""

    guarantee = Reordered()  # x·x is the correctly rounded square; the general power is within a few units of it

    def pattern(self, x):
        return op.Pow(x, constant("exponent"), name="power")

    def condition(self, graph, m):
        if not m.x.dtype.is_floating:
            raise Skip("integers")
        exponent = graph.constant(m.exponent)
        if exponent.size != 1 or float(np.reshape(exponent, ())) not in (2.0, 3.0):
            raise Declined("the exponent is not 2 or 3")
        if m.x.shape is None or m.x.shape != m.power.shape:
            raise Declined("the exponent widens the result")

    def replacement(self, b, m):
        square = b.Square(m.x)
        return square if float(np.reshape(b.graph.constant(m.exponent), ())) == 2.0 else b.Mul(m.x, square)

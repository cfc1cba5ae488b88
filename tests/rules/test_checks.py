"""The helper itself: a wrong rule, a rule that promises too much, and a miscount must not pass."""

import pytest
import tensorflow as tf

from tests.rules.checks import check, f32
from tfvllm.graph.guarantee import Approximate, Exact, Reordered
from tfvllm.graph.pattern import add, op
from tfvllm.graph.rewriter import Rule


class _Wrong(Rule):
    """x + y -> x - y."""

    guarantee = Reordered()

    def pattern(self, x, y):
        return add(x, y)

    def replacement(self, b, m):
        return b.Sub(m.x, m.y)


class _TooProud(Rule):
    """x / y -> x·(1/y), which is not exact."""

    guarantee = Exact()

    def pattern(self, x, y):
        return op.RealDiv(x, y)

    def replacement(self, b, m):
        return b.Mul(m.x, b.Reciprocal(m.y))


class _Coarse(Rule):
    """tanh(x) -> 0.999·tanh(x), called a reordering."""

    guarantee = Reordered()

    def pattern(self, x):
        return op.Tanh(x, name="out")

    def condition(self, graph, m):
        if any(r.op == "Mul" for r in graph.uses(m.out)):
            from tfvllm.graph.builder import Skip

            raise Skip("done")

    def replacement(self, b, m):
        return b.Mul(b.Tanh(m.x), b.const(0.999))


class _NaNToZero(Rule):
    """x·0 -> 0, forgetting NaN, infinities and -0."""

    guarantee = Exact()

    def pattern(self, x):
        return op.Mul(x, 0.0)

    def replacement(self, b, m):
        return b.ZerosLike(m.x)


def test_a_wrong_rule_is_rejected():
    with pytest.raises(AssertionError, match="off by"):
        check(lambda x, y: x + y, [f32(None, 3), f32(None, 3, name="y")], _Wrong(), 1, special=False)


def test_a_rule_that_is_not_exact_is_not_exact():
    with pytest.raises(AssertionError):
        check(lambda x, y: x / y, [f32(None, 40), f32(None, 40, name="y")], _TooProud(), 1, special=False)
    proud = _TooProud()
    proud.guarantee = Reordered()
    check(lambda x, y: x / y, [f32(None, 40), f32(None, 40, name="y")], proud, 1, special=False)


def test_a_small_error_is_no_reordering():
    with pytest.raises(AssertionError, match="off by"):
        check(tf.tanh, [f32(None, 3)], _Coarse(), 1, special=False)
    honest = _Coarse()
    honest.guarantee = Approximate(max_error=1.1e-3, domain="all", source="by construction")
    check(tf.tanh, [f32(None, 3)], honest, 1)


def test_special_values_are_tried():
    with pytest.raises(AssertionError):
        check(lambda x: x * 0.0, [f32(None, 30)], _NaNToZero(), 1)


def test_a_miscount_and_a_missing_reason_are_rejected():
    with pytest.raises(AssertionError, match="fired"):
        check(lambda x: tf.nn.relu(x), [f32(None, 3)], "CollapseTransposes", 1)
    with pytest.raises(AssertionError, match="no refusal"):
        check(lambda x: tf.nn.relu(x), [f32(None, 3)], "CollapseTransposes", 0, reason="anything")

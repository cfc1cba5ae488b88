"""Random graphs: simplified on both targets, they give what the originals give."""

import os
from collections import Counter

import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.graph import random_graphs
from tfvllm.graph.builder import Skip
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.pattern import op
from tfvllm.graph.rewriter import Rule, Step

GRAPHS_IN_ONE = 10  # programs traced into one function: tracing and compiling cost more than running
USUAL = "1000" if os.environ.get("TFVLLM_THOROUGH") else "200"
EXAMPLES = int(os.environ.get("TFVLLM_RANDOM_GRAPHS", USUAL)) // GRAPHS_IN_ONE

instruction = st.tuples(st.integers(0, len(random_graphs.OPERATIONS) - 1), st.integers(0, 2), st.integers(0, 5))
programs = st.lists(st.lists(instruction, min_size=1, max_size=7), min_size=GRAPHS_IN_ONE, max_size=GRAPHS_IN_ONE)
sizes = st.sampled_from([(None, None), (None, None), (2, 5), (None, 4), (1, 16)])
seen: Counter = Counter()


@pytest.fixture(autouse=True, scope="module")
def _no_grappler():
    """TensorFlow's own optimizer would take most of the time, and it is not what is tested here."""
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    yield
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(programs, sizes)
def test_random_graphs(programs, size):
    outcome = random_graphs.check(programs, *size)
    seen.update({k: 1 for k in outcome.fired})
    assert not outcome.failures, outcome.failures


def test_every_kind_of_rule_was_reached():
    if not seen or EXAMPLES < 50:
        pytest.skip("runs after test_random_graphs, over enough graphs")
    expected = {
        "FuseLayerNorm",
        "CentreLayerNorm",
        "GammaIntoWeights",
        "MaskRowsAfterAttention",
        "FactorOut",
        "FuseGelu",
    }
    expected |= {"FuseSwish", "EinsumToMatMul", "HoistSlices", "FuseConvBias", "RewriteBodies", "JoinLinearLayers"}
    assert expected <= set(seen), expected - set(seen)


class _SlightlyWrong(Rule):
    """tanh(x) -> 0.999·tanh(x)."""

    guarantee = Reordered()

    def pattern(self, x):
        return op.Tanh(x, name="out")

    def condition(self, graph, m):
        if any(r.op == "Mul" and r.name.endswith("wrong") for r in graph.uses(m.out)):
            raise Skip("done")

    def replacement(self, b, m):
        return b.op("Mul", [b.Tanh(m.x), 0.999], hint="wrong")[0]


@pytest.mark.parametrize("first", [4, 6, 11, 16, 24])  # none of them gives 0, of which the tanh is 0 anyway
def test_a_wrong_rule_is_always_caught(first):
    tanh = 26  # tanh between two transposes
    program = [(first, 0, 0), (tanh, 0, 0)]
    right = random_graphs.check([program], None, None, targets=("portable",))
    wrong = random_graphs.check(
        [program], None, None, targets=("portable",), extra=[Step("wrong", (_SlightlyWrong(),))]
    )
    assert not right.failures and wrong.failures

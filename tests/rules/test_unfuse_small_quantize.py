import numpy as np
import pytest
import tensorflow as tf

from tests.rules.checks import check, f32
from tfvllm.graph import executable
from tfvllm.graph.onednn_costs import QUANTIZE_ELEMENTS

RULE = "UnfuseSmallQuantize"
WIDTH = 64
MANY = QUANTIZE_ELEMENTS // WIDTH


def quantised(x, low=-3.0, high=4.0, mode="MIN_FIRST"):
    found = tf.raw_ops.QuantizeV2(
        input=x, min_range=low, max_range=high, T=tf.quint8, mode=mode, ensure_minimum_range=0.0
    )
    return tf.cast(tf.bitcast(found[0], tf.uint8), tf.float32)


def apart(c, samples):
    """How many bytes differ, and of how many."""
    differ = total = 0
    for (x,) in samples:
        (old,), (new,) = (
            executable.evaluate(g, list(g.outputs.values())[:1], dict(zip(g.inputs.values(), [x])))
            for g in (c.before, c.graph)
        )
        assert np.abs(old - new).max(initial=0) <= 1
        differ, total = differ + int((old != new).sum()), total + old.size
    return differ, total


def rows(count, scale=2.0):
    return [np.random.default_rng([count]).normal(0.5, scale, (count, WIDTH)).astype(np.float32)]


@pytest.mark.parametrize("low, high", [(-3.0, 4.0), (0.0, 255.0), (-0.01, 0.02), (-1e4, 1e-3)])
def test_the_same_bytes(low, high):
    edges = [np.float32([[0.0, -0.0, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-38, low, high, (low + high) / 2]])]
    samples = [
        edges,
        *([np.random.default_rng(n).uniform(2 * low, 2 * high, (n, 10)).astype(np.float32)] for n in (1, 7, 99)),
    ]
    c = check(
        lambda x: quantised(x, low, high), [f32(None, 10)], RULE, 1, special=False, generated=False, samples=samples
    )
    assert len(c.ops("StatelessIf")) == 1 and not c.ops("QuantizeV2")
    differ, total = apart(c, samples)
    assert differ <= 2 < total / 500


def test_chosen_when_the_graph_runs():
    samples = [rows(n) for n in (0, 1, MANY - 1, MANY, MANY + 1)]
    c = check(
        lambda x: (quantised(x), quantised(2.0 * x)),
        [f32(None, WIDTH)],
        RULE,
        2,
        special=False,
        generated=False,
        samples=samples,
    )
    assert len(c.ops("Size")) == 1, "one comparison for all values of one shape"
    differ, total = apart(c, samples)
    assert differ <= total / 10_000


@pytest.mark.parametrize("count, few", [(MANY - 1, True), (MANY, False)])
def test_known_sizes_are_decided_now(count, few):
    c = check(quantised, [f32(count, WIDTH)], RULE, int(few), special=False, generated=False, samples=[rows(count)])
    assert not c.ops("StatelessIf") and bool(c.ops("QuantizeV2")) != few


def test_what_stays():
    check(lambda x: quantised(x, mode="SCALED"), [f32(None, 4)], RULE, 0, special=False)
    ranged = [f32(None, 4), f32(name="low"), f32(name="high")]
    check(lambda x, low, high: quantised(x, low - 5.0, high + 5.0), ranged, RULE, 0, special=False)

    def range_read(x):
        y, low, high = tf.raw_ops.QuantizeV2(input=x, min_range=-1.0, max_range=1.0, T=tf.quint8, mode="MIN_FIRST")
        return tf.cast(tf.bitcast(y, tf.uint8), tf.float32), low, high

    check(range_read, [f32(None, 4)], RULE, 0, special=False)

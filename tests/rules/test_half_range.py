"""float16 ends at 65504: what is finite in the original stays finite, whatever the inputs."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tfvllm

HALF = np.float16
RNG = np.random.default_rng(0)
C = tf.constant(HALF(0.5))


def weight(*shape, scale=1.0):
    return tf.constant((scale * RNG.normal(size=shape)).astype(HALF))


W, V, BIG = weight(4, 4), weight(4, 4), weight(4, 4, scale=8000.0)
BIAS, FAR, NEAR = weight(4), tf.constant(HALF([6e4, -6e4, 5e4, 100])), tf.constant(HALF([-6e4, 6e4, -5e4, 7]))
GAMMA = tf.constant(HALF([300.0, 0.001, 2.0, -64.0]))
TABLE = weight(9, 4, scale=20000.0)


def norm(x):
    mean = tf.reduce_mean(x, -1, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(x, mean), -1, keepdims=True)
    inv = tf.math.rsqrt(variance + HALF(1e-3)) * GAMMA
    return x * inv + (BIAS - mean * inv)


# name -> what a rule would regroup, over x and y of float16[?, 4]
FUNCTIONS = {
    "sum of products": lambda x, y: x * C + y * C,
    "difference of quotients": lambda x, y: x / HALF(4.0) - y / HALF(4.0),
    "two terms": lambda x, y: (x + FAR) + NEAR,
    "two factors": lambda x, y: (x * HALF(0.001)) * HALF(3000.0),
    "scaled product": lambda x, y: (x @ BIG + BIAS) * HALF(20.0),
    "product scaled down": lambda x, y: (x @ W) * HALF(1 / 8192),
    "product scaled by channel": lambda x, y: (x @ BIG) * GAMMA,
    "gain before a product": lambda x, y: (x * GAMMA) @ BIG,
    "two layers": lambda x, y: (x @ BIG + BIAS) @ BIG,
    "norm": lambda x, y: norm(x),
    "row and table": lambda x, y: (x + tf.gather(TABLE, tf.range(tf.shape(x)[0]) % 9)) + FAR,
    "powers": lambda x, y: x**2.0 - y**3.0,
    "signs": lambda x, y: -tf.negative(x) + (-y) - (-x) * (-y),
    "softmax": lambda x, y: (
        tf.exp(x - tf.reduce_max(x, -1, keepdims=True))
        / tf.reduce_sum(tf.exp(x - tf.reduce_max(x, -1, keepdims=True)), -1, keepdims=True)
    ),
    "scores": lambda x, y: tf.matmul(x * HALF(0.01), y, transpose_b=True) @ y,
}
EXTREMES = [0.0, 1.0, -1.0, 6e-8, -6e-5, 255.9, -256.0, 40000.0, -40000.0, 50000.0, 65504.0, -65504.0]
number = st.one_of(st.sampled_from(EXTREMES), st.floats(-65504, 65504, width=16))
rows = st.lists(st.lists(number, min_size=4, max_size=4), min_size=1, max_size=3)


@pytest.fixture(scope="module", autouse=True)
def _no_grappler():
    """TensorFlow's own optimizer regroups sums too."""
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    yield
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


@pytest.fixture(scope="module")
def pairs():
    """All of them in one function, and that simplified: tracing costs more than running."""
    spec = [tf.TensorSpec([None, 4], tf.float16)] * 2
    plain = tf.function(lambda x, y: {n: f(x, y) for n, f in FUNCTIONS.items()}, input_signature=spec)
    # Tolerances that let all pass: what is tried here are the rules, not the verification that rolls them back.
    return plain, tfvllm.simplify(plain, rtol=1.0, atol=1e9)


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(rows, rows)
def test_finite_stays_finite(pairs, x, y):
    plain, fast = pairs
    n = min(len(x), len(y))
    x, y = tf.constant(x[:n], tf.float16), tf.constant(y[:n], tf.float16)
    want, found = plain(x, y), fast(x, y)
    for name in FUNCTIONS:
        old, new = (r[name].numpy().astype(np.float64) for r in (want, found))
        fine = np.isfinite(old)
        assert np.isfinite(new[fine]).all(), (name, x.numpy(), y.numpy(), old, new)
        np.testing.assert_allclose(new[fine], old[fine], rtol=2e-3, atol=2e-3, err_msg=name)


def test_what_is_declined_says_why(pairs):
    reasons = {d["rule"]: d["reason"] for d in pairs[1].report.declined}
    assert reasons["FactorOut"] == (
        "float16 ends at 65504, and the sum of x and y may go beyond where the original does not"
    )
    assert {"JoinTerms", "ScaleIntoWeights", "JoinLinearLayers", "RowIntoTable"} <= set(reasons)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_others_are_still_regrouped(dtype):
    spec = [tf.TensorSpec([None, 4], dtype)] * 2
    function = tf.function(lambda x, y: x * tf.cast(0.5, dtype) + y * tf.cast(0.5, dtype), input_signature=spec)
    fast = tfvllm.simplify(function)
    assert fast.report.rules["FactorOut"] == 1
    x, y = (tf.cast([[a] * 4], dtype) for a in (40000.0, 50000.0))
    np.testing.assert_array_equal(tf.cast(fast(x, y), tf.float32), tf.cast(function(x, y), tf.float32))

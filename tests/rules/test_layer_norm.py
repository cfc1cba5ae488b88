import numpy as np
import pytest
import tensorflow as tf

from tests.rules.checks import check, f32, weight

RULE = "FuseLayerNorm"


def _moments(x, axis=-1, keepdims=True):
    mean = tf.reduce_mean(x, axis, keepdims=keepdims)
    return mean, tf.reduce_mean(tf.math.squared_difference(x, tf.stop_gradient(mean)), axis, keepdims=keepdims)


def keras_form(x, gamma, beta, epsilon=1e-3, axis=-1):
    mean, variance = _moments(x, axis)
    inv = tf.math.rsqrt(variance + epsilon) * gamma
    return x * inv + (-mean * inv + beta)


def sub_form(x, gamma, beta, epsilon=1e-3):
    mean, variance = _moments(x)
    inv = tf.math.rsqrt(variance + epsilon) * gamma
    return x * inv + (beta - mean * inv)


def plain_form(x, gamma, beta, epsilon=1e-3):
    mean, variance = _moments(x)
    return (x - mean) * tf.math.rsqrt(variance + epsilon) * gamma + beta


@pytest.mark.parametrize("form", [keras_form, sub_form, plain_form])
@pytest.mark.parametrize("width", [16, 33])
def test_one_op(form, width):
    gamma, beta = weight(width), weight(width)
    samples = [[_rows(std, width)] for std in (1.0, 1e-2, 1e-4)]
    c = check(lambda x: form(x, gamma, beta, 1e-6), [f32(None, None, width)], RULE, 1, samples=samples, special=False)
    (norm,) = c.ops("_MklLayerNorm")
    assert norm.attr("epsilon") == pytest.approx(1e-6)


def _rows(std, width):
    return np.random.default_rng(1).normal(0.1, std, (2, 3, width))


def test_epsilon_is_the_graphs_own():
    gamma, beta = weight(8), weight(8)
    for epsilon in (1e-12, 1e-3):
        c = check(
            lambda x, e=epsilon: keras_form(x, gamma, beta, e),
            [f32(None, 8)],
            RULE,
            1,
            special=False,
            samples=[[_rows(3e-2, 8)[0]]],
        )
        assert c.ops("_MklLayerNorm")[0].attr("epsilon") == pytest.approx(epsilon, rel=1e-6)


def test_declines():
    gamma, beta, column = weight(8), weight(8), weight(5, 1)
    check(
        lambda x: keras_form(x, column, column, axis=1),
        [f32(None, 5, 8)],
        RULE,
        0,
        reason="not over the last",
        special=False,
    )
    check(
        lambda x, g: keras_form(x, g, beta), [f32(None, 8), f32(8, name="g")], RULE, 0, reason="run time", special=False
    )
    check(
        lambda x: keras_form(x, tf.constant(2.0), beta),
        [f32(None, 8)],
        RULE,
        0,
        reason="gamma is not one number for each",
        special=False,
    )
    check(
        lambda x: keras_form(x, tf.cast(gamma, tf.float64), tf.cast(beta, tf.float64)),
        [tf.TensorSpec([None, 8], tf.float64)],
        RULE,
        0,
        reason="float64",
        special=False,
    )


def test_a_mean_that_others_read_stays():
    gamma, beta = weight(8), weight(8)
    c = check(
        lambda x: (keras_form(x, gamma, beta), _moments(x)[0]),
        [f32(None, 8)],
        ["MergeDuplicates", RULE],
        {RULE: 1},
        special=False,
    )
    assert len(c.ops("Mean")) == 1

import numpy as np
import pytest
import tensorflow as tf

from tests.rules.checks import check, f32

RULE = "DropIdentities"


@pytest.mark.parametrize(
    "function",
    [
        lambda x: tf.identity(x),
        lambda x: tf.stop_gradient(x),
        lambda x: tf.raw_ops.Cast(x=x, DstT=tf.float32),
        lambda x: tf.reshape(x, tf.shape(x)),
        lambda x: tf.reshape(x, [-1, 6, 5]),
        lambda x: tf.transpose(x, [0, 1, 2]),
        lambda x: x * 1.0,
        lambda x: 1.0 * x,
        lambda x: x / 1.0,
        lambda x: x**1.0,
        lambda x: x[:, :, :],
        lambda x: x[:, :6],
        lambda x: tf.broadcast_to(x, tf.shape(x)),
        lambda x: tf.tile(x, [1, 1, 1]),
        lambda x: tf.where(tf.constant(True), x, tf.zeros_like(x)),
    ],
)
def test_what_gives_back_its_input_goes(function):
    c = check(lambda x: tf.nn.relu(function(tf.abs(x))), [f32(None, 6, 5)], RULE, None)
    assert [n.op for n in c.ops()] == ["Abs", "Relu"]


@pytest.mark.parametrize(
    "function, op",
    [
        (lambda x: tf.transpose(x, [0, 2, 1]), "Transpose"),
        (lambda x: x[:, 1:], "StridedSlice"),
        (lambda x: x[:, ::-1], "StridedSlice"),
        (lambda x: tf.reshape(x, [-1, 5, 6]), "Reshape"),
        (lambda x: tf.cast(x, tf.float64), "Cast"),
        (lambda x: x + 0.0, "AddV2"),  # -0 + 0 is +0
        (lambda x: x * 0.0, "Mul"),  # NaN and infinities stay
        (lambda x: x * -1.0, "Mul"),
        (lambda x: 1.0 / x, "RealDiv"),
        (lambda x: 1.0**x, "Pow"),
        (lambda x: x[:, :1] * np.ones((1, 6, 1), np.float32), "Mul"),  # it broadcasts
        (lambda x: tf.where(tf.constant([[[True]], [[False]]]), x[:1], x[1:2]), "SelectV2"),
    ],
)
def test_what_changes_anything_stays(function, op):
    c = check(lambda x: function(tf.negative(x)), [f32(2, 6, 5)], RULE, None)
    assert len(c.ops(op)) >= 1


def test_identity_on_a_result_goes_and_the_result_stays():
    c = check(lambda x: (tf.identity(x), tf.identity(x * 1.0)), [f32(None)], RULE, None)
    assert not c.ops() and len(c.graph.outputs) == 2

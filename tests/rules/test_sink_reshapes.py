import numpy as np
import pytest
import tensorflow as tf

from tests.rules.checks import check, f32, weight


@pytest.mark.parametrize("function", [tf.nn.relu, tf.tanh, tf.exp, tf.square, tf.abs, lambda x: tf.cast(x, tf.float64)])
def test_unary(function):
    c = check(
        lambda x: function(tf.reshape(x, [-1, 2, 3])),
        [f32(None, 6)],
        "SinkReshapeUnary",
        1,
        special=function not in (tf.exp, tf.tanh),
    )
    assert c.ops()[-1].op in ("Reshape", "Identity") and c.ops("Reshape")[-1].inputs[0].shape[-1] == 6


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)])
def test_bias(shape):
    flat = weight(*shape)
    if shape == (6,):
        c = check(
            lambda x: tf.reshape(x, [2, -1, 6]) + flat,
            [f32(None, 6)],
            "SinkReshapeBias",
            1,
            samples=[[np.ones((4, 6))]],
            generated=False,
        )
    else:
        c = check(lambda x: tf.reshape(x, [-1, 2, 3]) + flat, [f32(None, 6)], "SinkReshapeBias", 1)
    assert [n.op for n in c.ops() if n.op in ("BiasAdd", "AddV2")] == ["BiasAdd"]


def test_bias_add_scalar_and_order():
    b, matrix = weight(6), weight(2, 3)
    check(
        lambda x: tf.nn.bias_add(tf.reshape(x, [-1, 2, 6]), b),
        [f32(None, 12)],
        "SinkReshapeBias",
        0,
        reason="last axis",
    )
    check(lambda x: tf.nn.bias_add(tf.reshape(x, [-1, 1, 6]), b), [f32(None, 6)], "SinkReshapeBias", 1)
    c = check(lambda x: 3.0 - tf.reshape(x, [-1, 2, 3]), [f32(None, 6)], "SinkReshapeBias", 1)
    assert len(c.ops("Sub")) == 1
    check(lambda x: tf.reshape(x, [-1, 2, 3]) / matrix, [f32(None, 6)], "SinkReshapeBias", 1)


def test_bias_declines():
    row, rows = weight(3), weight(4, 6)
    check(lambda x: tf.reshape(x, [-1, 2, 3]) + row, [f32(None, 6)], "SinkReshapeBias", 0, reason="last axis")
    check(
        lambda x, y: tf.reshape(x, [-1, 2, 3]) + y,
        [f32(None, 6), f32(2, 3, name="y")],
        "SinkReshapeBias",
        0,
        reason="computed",
    )
    check(lambda x: tf.reshape(x, [-1, 1, 6]) + rows, [f32(None, 6)], "SinkReshapeBias", 0, reason="broadcasts")


def test_pair():
    c = check(
        lambda x, y: tf.reshape(x, [-1, 2, 3]) - tf.reshape(tf.nn.relu(x), [-1, 2, 3]),
        [f32(None, 6), f32(None, name="y")],
        ["SinkReshapePair", "MergeDuplicates"],
        {"SinkReshapePair": 1},
    )
    assert c.ops("Sub")[0].output.shape[1:] == (6,)
    check(
        lambda x, y: tf.reshape(x, [-1, 2, 3]) + tf.reshape(y, [-1, 2, 3]),
        [f32(4, 6), f32(8, 3, name="y")],
        "SinkReshapePair",
        0,
        reason="unlike shapes",
    )


def test_a_reshape_that_others_read_stays():
    def f(x):
        y = tf.reshape(x, [-1, 2, 3])
        return tf.nn.relu(y), tf.reduce_sum(y, 1)

    c = check(f, [f32(None, 6)], "SinkReshapeUnary", 1)
    assert len(c.ops("Reshape")) == 2


def test_residual_beside_its_product():
    w, b = weight(6, 6), weight(6)

    def f(x):
        y = tf.reshape(tf.nn.bias_add(tf.reshape(x, [-1, 6]) @ w, b), tf.shape(x))
        return x + y

    c = check(f, [f32(None, None, 6)], "SinkReshapeResidual", 1)
    assert c.ops("AddV2")[0].inputs[0].node.op == "BiasAdd"

    def two_products(x):
        y = tf.reshape(tf.nn.bias_add(tf.reshape(x, [-1, 6]) @ w, b), tf.shape(x))
        return x + y, y

    check(two_products, [f32(None, None, 6)], "SinkReshapeResidual", 0, reason="read elsewhere")

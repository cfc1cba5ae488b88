import numpy as np
import tensorflow as tf

from tests.rules.checks import check, f32


def test_two_reshapes_become_one():
    c = check(lambda x: tf.reshape(tf.reshape(x, [-1, 4]), [-1, 2, 6]), [f32(None, 12)], "CollapseReshapes", 1)
    assert len(c.ops("Reshape")) == 1


def test_expand_dims_counts_as_a_reshape():
    c = check(lambda x: tf.reshape(x[:, None], [-1]), [f32(None, 5)], "CollapseReshapes", 0)
    c = check(lambda x: tf.reshape(tf.expand_dims(x, 1), [-1]), [f32(None, 5)], "CollapseReshapes", 1)
    assert not c.ops("ExpandDims")


def test_a_reshape_that_others_read_stays():
    def f(x):
        y = tf.reshape(x, [-1, 4])
        return tf.reshape(y, [-1, 2]), tf.nn.relu(y)

    c = check(f, [f32(None, 4, 3)], "CollapseReshapes", 1)
    assert len(c.ops("Reshape")) == 2


def test_a_shape_given_at_run_time_declines():
    check(
        lambda x, n: tf.reshape(tf.reshape(x, [-1, 2]), n),
        [f32(6, 4), tf.TensorSpec([2], tf.int32, "n")],
        "CollapseReshapes",
        0,
        reason="computed from data",
        samples=[[np.ones((6, 4)), [4, 6]]],
        generated=False,
    )


def test_transposes_compose():
    def f(x):
        return tf.transpose(tf.transpose(x, [0, 2, 1, 3]), [1, 3, 0, 2])

    c = check(f, [f32(None, 3, 4, 5)], "CollapseTransposes", 1)
    (node,) = c.ops("Transpose")
    assert node.inputs[1].known_value == (2, 3, 0, 1)


def test_transpose_of_single_axes_is_a_reshape():
    c = check(lambda x: tf.transpose(x, [0, 2, 1, 3]), [f32(None, 1, None, 5)], "TransposeToReshape", 1)
    assert not c.ops("Transpose")
    check(lambda x: tf.transpose(x, [0, 2, 1]), [f32(None, 2, 5)], "TransposeToReshape", 0, reason="change places")

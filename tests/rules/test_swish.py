import numpy as np
import tensorflow as tf

from tests.rules.checks import check, f32


def test_swish_is_one_op():
    samples = [[np.linspace(-90, 90, 700).reshape(100, 7)]]
    c = check(lambda x: x * tf.sigmoid(x), [f32(None, 7)], "FuseSwish", 1, finite_only=True, samples=samples)
    assert [n.op for n in c.ops() if n.op != "Identity"] == ["_MklSwish"]
    check(lambda x: tf.sigmoid(x) * x, [f32(None, None, 7)], "FuseSwish", 1, finite_only=True)


def test_declines():
    def shared(x):
        gate = tf.sigmoid(x)
        return x * gate, gate

    check(shared, [f32(None, 7)], "FuseSwish", 0, reason="read elsewhere")
    check(lambda x, y: y * tf.sigmoid(x), [f32(7), f32(7, name="y")], "FuseSwish", 0)
    spec = tf.TensorSpec([None], tf.float64)
    check(lambda x: x * tf.sigmoid(x), [spec], "FuseSwish", 0, reason="float64", special=False)

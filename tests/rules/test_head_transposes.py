import tensorflow as tf

from tests.rules.checks import check, f32

RULE = "OneTransposeForHeads"


def heads(y, count=3, perm=(0, 2, 1, 3), shape=(2, 4)):
    batch, length = tf.shape(y)[0], tf.shape(y)[1]
    flat = tf.reshape(y, [-1, count * 8])
    return [tf.transpose(tf.reshape(part, [batch, length, *shape]), perm) for part in tf.split(flat, count, axis=1)]


def test_one_transpose():
    c = check(lambda y: heads(y), [f32(None, None, 24)], RULE, 1)
    assert len(c.ops("Transpose")) == 1 and len(c.ops("Unpack")) == 1 and not c.ops("Split")
    check(lambda y: heads(y, 2), [f32(None, 5, 16)], RULE, 1)
    check(lambda y: heads(y, 2), [f32(1, None, 16)], RULE, 1)


def test_other_orders_and_readers_stay():
    check(lambda y: heads(y, perm=(0, 2, 3, 1)), [f32(None, None, 24)], RULE, 0)
    check(lambda y: heads(y, shape=(4, 2)), [f32(None, None, 24)], RULE, 1)

    def shared(y):
        parts = tf.split(tf.reshape(y, [-1, 24]), 3, axis=1)
        return [tf.transpose(tf.reshape(p, [2, -1, 2, 4]), [0, 2, 1, 3]) for p in parts], parts[1]

    c = check(shared, [f32(2, None, 24)], RULE, 0)
    assert len(c.ops("Split")) == 1

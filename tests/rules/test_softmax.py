import tensorflow as tf

from tests.rules.checks import check, f32

RULE = "RecogniseSoftmax"


def by_hand(x, axis=-1, keepdims=True):
    e = tf.exp(x - tf.reduce_max(x, axis, keepdims=True))
    return e / tf.reduce_sum(e, axis, keepdims=keepdims)


def test_written_out():
    c = check(by_hand, [f32(None, 3, 11)], [RULE, "MergeDuplicates"], {RULE: 1}, finite_only=True)
    assert [n.op for n in c.ops() if n.op != "Identity"] == ["Softmax"]
    check(lambda x: by_hand(x, 1), [f32(None, 5)], [RULE, "MergeDuplicates"], {RULE: 1}, finite_only=True)


def test_declines():
    check(lambda x: by_hand(x, 1), [f32(None, 3, 11)], RULE, 0, reason="not over the last")
    check(lambda x: by_hand(x, -1, False), [f32(3, 3)], RULE, 0, reason="drops its axis")
    check(lambda x: tf.exp(x) / tf.reduce_sum(tf.exp(x), -1, keepdims=True), [f32(None, 3)], RULE, 0)

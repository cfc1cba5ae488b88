import tensorflow as tf

from tests.rules.checks import check, f32

RULE = "CollapseCasts"


def chain(*types):
    def f(x):
        for dtype in types:
            x = tf.raw_ops.Cast(x=x, DstT=dtype)
        return x

    return f


def test_through_a_wider_type():
    c = check(chain(tf.float64, tf.int32), [f32(None)], RULE, 1, special=False)
    assert len(c.ops("Cast")) == 1
    c = check(chain(tf.float64, tf.float32), [f32(None)], RULE, 1)
    assert not c.ops("Cast")
    check(chain(tf.int64, tf.float32), [tf.TensorSpec([None], tf.int32)], RULE, 1)
    check(chain(tf.int32, tf.float32), [tf.TensorSpec([None], tf.bool)], RULE, 1)


def test_through_a_narrower_type_stays():
    check(chain(tf.float16, tf.float32), [f32(None)], RULE, 0, reason="does not hold")
    check(chain(tf.int32, tf.float32), [f32(None)], RULE, 0, reason="does not hold", special=False)
    check(chain(tf.float32, tf.int64), [tf.TensorSpec([None], tf.int64)], RULE, 0, reason="does not hold")
    check(
        chain(tf.bfloat16, tf.float32),
        [tf.TensorSpec([None], tf.float16)],
        RULE,
        0,
        reason="does not hold",
        special=False,
    )
    check(chain(tf.bool, tf.float32), [tf.TensorSpec([None], tf.int32)], RULE, 0, reason="does not hold")

import tensorflow as tf

from tests.rules.checks import check, f32


def test_the_op_broadcasts_by_itself():
    c = check(
        lambda x, p: x + tf.broadcast_to(p, tf.shape(x)), [f32(None, 4, 3), f32(3, name="p")], "DropBroadcasts", 1
    )
    assert not c.ops("BroadcastTo")


def test_order_of_operands_is_kept():
    check(lambda x, p: tf.broadcast_to(p, tf.shape(x)) - x, [f32(None, 3), f32(1, 3, name="p")], "DropBroadcasts", 1)
    check(lambda x, p: tf.broadcast_to(p, tf.shape(x)) / x, [f32(None, 3), f32(1, 3, name="p")], "DropBroadcasts", 1)


def test_a_broadcast_that_widens_the_result_stays():
    c = check(
        lambda x, p: x + tf.broadcast_to(p, [4, 3]),
        [f32(1, 3), f32(3, name="p")],
        "DropBroadcasts",
        0,
        reason="not known to have the broadcast shape",
    )
    assert len(c.ops("BroadcastTo")) == 1


def test_a_broadcast_that_others_read_stays():
    def f(x, p):
        wide = tf.broadcast_to(p, tf.shape(x))
        return x * wide, wide

    c = check(f, [f32(None, 3), f32(3, name="p")], "DropBroadcasts", 1)
    assert len(c.ops("BroadcastTo")) == 1

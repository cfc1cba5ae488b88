import numpy as np
import tensorflow as tf

from tests.rules.checks import check, f32, weight

RULES = ["PlainLookup", "MergeDuplicates", "KnownRow", "RowIntoTable"]
I32 = tf.TensorSpec([None, None], tf.int32, "ids")


def wrapped(ids, size):
    """Keras's `take`: negative indices count from the end."""
    return tf.where(ids < 0, ids + size, ids)


def sums(words, positions, segments, segment_of):
    def function(ids):
        x = tf.gather(words, ids % 20)
        x = x + tf.slice(positions, [0, 0], [tf.shape(ids)[1], 8])
        return x + tf.gather(segments, wrapped(segment_of(ids), 2))

    return function


SAMPLES = [[np.arange(12, dtype=np.int32).reshape(3, 4)], [np.zeros([1, 1], np.int32)], [np.zeros([0, 3], np.int32)]]


def test_one_segment_goes_into_the_positions():
    for segment_of in (tf.zeros_like, tf.ones_like, lambda ids: tf.fill(tf.shape(ids), 1)):
        c = check(
            sums(weight(20, 8), weight(16, 8), weight(2, 8), segment_of), [I32], RULES,
            {"KnownRow": 1, "RowIntoTable": 1}, generated=False, samples=SAMPLES,
        )  # fmt: skip
        assert len(c.ops("GatherV2")) == 1 and len([n for n in c.ops("AddV2") if n.output.rank == 3]) == 1


def test_looked_up_positions():
    table, row = weight(16, 8), weight(8)
    check(
        lambda x, ids: x + tf.gather(table, ids % 16) + row,
        [f32(None, 8), tf.TensorSpec([None], tf.int32, "ids")],
        ["PlainLookup", "RowIntoTable"],
        {"PlainLookup": 1, "RowIntoTable": 1},
        generated=False,
        samples=[[np.ones([5, 8], np.float32), np.arange(5, dtype=np.int32)]],
    )


def test_unknown_segments_stay():
    function = sums(weight(20, 8), weight(16, 8), weight(2, 8), lambda ids: ids % 2)
    check(function, [I32], RULES, {"KnownRow": 0}, generated=False, samples=SAMPLES)


def test_a_row_that_is_not_there_stays_an_error():
    function = sums(weight(20, 8), weight(16, 8), weight(2, 8), lambda ids: tf.zeros_like(ids) + 2)
    check(function, [I32], RULES, {"KnownRow": 0}, reason="row 2 of a table of 2", generated=False)


def test_the_shape_may_come_from_the_lookup():
    table = weight(3, 8)
    check(
        lambda x, ids: x + tf.gather(table, tf.zeros_like(ids)), [f32(8), I32], RULES, {"KnownRow": 0},
        reason="shape of the lookup", generated=False, samples=[[np.ones(8, np.float32), SAMPLES[0][0]]],
    )  # fmt: skip


def test_tables_that_others_read_stay():
    table, row = weight(9000, 8), weight(8)  # what is small may be stored twice

    def shared(x, ids):
        part = tf.slice(table, [0, 0], [tf.shape(x)[0], 8])
        return x + part + row, tf.gather(table, ids)

    check(
        shared, [f32(None, 8), tf.TensorSpec([None], tf.int32, "ids")], RULES, {"RowIntoTable": 0},
        reason="stored twice", generated=False, samples=[[np.ones([4, 8], np.float32), np.arange(3, dtype=np.int32)]],
    )  # fmt: skip


def test_lookups_in_assigned_tables_stay():
    table = weight(4, 8)

    def function(ids):
        table.assign_add(tf.ones([4, 8]))
        return tf.gather(table, ids)

    check(function, [I32], "PlainLookup", 0, reason="assigned", generated=False)

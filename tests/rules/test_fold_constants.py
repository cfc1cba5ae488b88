import numpy as np
import tensorflow as tf

from tests.rules.checks import check, f32
from tfvllm.rules.fold_constants import MAX_ELEMENTS


def test_constant_expressions_are_computed():
    c = check(lambda x: x * tf.sqrt(tf.constant([2.0, 3.0])) ** 2, [f32(None, 2)], "FoldConstants", 1)
    assert [n.op for n in c.ops() if n.op != "Identity"] == ["Mul"]


def test_shapes_known_from_the_graph_fold():
    c = check(
        lambda x: tf.reshape(x, [tf.shape(x)[1], -1]),
        [f32(None, 3)],
        ["FoldConstants", "DeleteDead"],
        {"FoldConstants": 2},
    )
    assert not c.ops("Shape") and not c.ops("Pack")


def test_unknown_sizes_do_not_fold():
    c = check(lambda x: tf.shape(x)[0] * 2, [f32(None, 3)], "FoldConstants", 0)
    assert c.ops("Shape")


def test_large_results_are_not_stored():
    n = MAX_ELEMENTS + 1
    c = check(lambda x: x + tf.range(n, dtype=tf.float32) * 2.0, [f32(n)], "FoldConstants", 0)
    assert c.ops("Range")


def test_random_and_stateful_ops_do_not_fold():
    def f(x):
        return x + 0.0 * tf.random.uniform([2])

    c = check(f, [f32(None, 2)], "FoldConstants", 0, special=False)
    assert c.ops("RandomUniform")


def test_special_constants_keep_their_bits():
    check(lambda x: x + tf.constant([-0.0, np.nan, np.inf, 1e-45]) * 1.0, [f32(None, 4)], "FoldConstants", 1)

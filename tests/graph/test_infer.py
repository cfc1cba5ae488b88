"""Symbolic shapes against those that really come out."""

import numpy as np
import pytest
import tensorflow as tf

from tfvllm.graph import dims, importer

KERNEL = tf.Variable(np.ones((3, 2, 4, 5), np.float32))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: tf.nn.conv2d(x, KERNEL, 1, "SAME"),
        lambda x: tf.nn.conv2d(x, KERNEL, 2, "SAME"),
        lambda x: tf.nn.conv2d(x, KERNEL, 2, "VALID"),
        lambda x: tf.nn.conv2d(x, KERNEL, 1, "VALID", dilations=2),
        lambda x: tf.nn.conv2d(x, KERNEL, 2, [[0, 0], [1, 2], [0, 1], [0, 0]]),
        lambda x: tf.nn.depthwise_conv2d(x, KERNEL, [1, 2, 2, 1], "SAME"),
        lambda x: tf.nn.max_pool2d(x, 3, 2, "SAME"),
        lambda x: tf.nn.avg_pool2d(x, 2, 2, "VALID"),
        lambda x: tf.pad(x, [[0, 0], [1, 2], [0, 3], [0, 0]]),
        lambda x: tf.raw_ops.IdentityN(input=[x, x])[1],
    ],
)
def test_images_of_unknown_size(function):
    concrete = tf.function(function).get_concrete_function(tf.TensorSpec([None, None, None, 4]))
    graph = importer.from_concrete(concrete)
    (result,) = graph.outputs.values()
    symbols = [d.terms[0][0][0] for d in next(iter(graph.inputs.values())).shape[:3]]
    assert set().union(*(d.symbols() for d in result.shape[:1])) == {symbols[0]}
    for sizes in ((1, 9, 8), (3, 12, 7), (2, 16, 11)):
        actual = concrete(tf.ones([*sizes, 4])).shape.as_list()
        given = dict(zip(symbols, sizes))
        assert [dims.evaluate(d, given) for d in result.shape] == actual


def test_positions_counted_in_floating_point():
    @tf.function(input_signature=[tf.TensorSpec([None, None])])
    def f(x):
        return x + tf.range(tf.cast(tf.shape(x)[1], tf.float32))

    graph = importer.from_concrete(f.get_concrete_function())
    (result,) = graph.outputs.values()
    assert result.shape == next(iter(graph.inputs.values())).shape

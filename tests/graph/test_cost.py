"""What is counted where sizes are known at run time only."""

import tensorflow as tf

from tfvllm.graph import importer
from tfvllm.simplifier import cost


def test_chosen_positions_count_as_if_all_were_chosen():
    weight = tf.Variable(tf.ones([4, 3]))

    @tf.function(input_signature=[tf.TensorSpec([None, None, 4]), tf.TensorSpec([None, None], tf.bool)])
    def chosen(x, mask):
        rows = tf.reshape(tf.where(tf.reshape(mask, [-1])), [-1])
        return tf.gather(tf.reshape(x, [-1, 4]), rows) @ weight

    graph = importer.from_concrete(chosen.get_concrete_function())
    assert cost.count(graph)["flops"] == 128 * 3 * 2 * 4  # batch 1, length 128

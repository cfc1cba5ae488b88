"""Mixtures of experts: which expert a token goes to, and each expert once for all its tokens. Stock ops only."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf


def route(logits: tf.Tensor, top: int, normalized: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """logits [rows, experts] -> (weights float32[rows, top], experts int32[rows, top]), the best first.

    The weights are the softmax over all experts, or, `normalized`, over those chosen.
    """
    logits = tf.cast(logits, tf.float32)
    if normalized:
        best, chosen = tf.math.top_k(logits, top)
        return tf.nn.softmax(best), chosen
    best, chosen = tf.math.top_k(tf.nn.softmax(logits), top)
    return best, chosen


def each_for_its_own(
    x: tf.Tensor, chosen: tf.Tensor, compute: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
) -> tf.Tensor:
    """What the experts make of the rows that chose them. An expert that no row chose is not touched.

    Args:
        x: [rows, width].
        chosen: int32[rows, top].
        compute: (expert int32[], some rows [n, width], n at least 1) -> [n, width].

    Returns:
        [rows, top, width].
    """
    width, top = x.shape[1], chosen.shape[1]
    order = tf.argsort(tf.reshape(chosen, [-1]), stable=True)  # all that one expert gets lies together
    experts, _, counts = tf.unique_with_counts(tf.gather(tf.reshape(chosen, [-1]), order))
    rows, ends = order // top, tf.cumsum(counts)
    found = tf.TensorArray(x.dtype, tf.size(experts), element_shape=[None, width], infer_shape=False)

    def one(index, found):
        members = rows[ends[index] - counts[index] : ends[index]]
        return index + 1, found.write(index, compute(experts[index], tf.gather(x, members)))

    _, found = tf.while_loop(lambda index, found: index < tf.size(experts), one, (0, found))
    apart = tf.gather(found.concat(), tf.math.invert_permutation(order))
    return tf.reshape(apart, [-1, top, width])

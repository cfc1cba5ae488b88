"""Pieces of attention: masks, positions, products of one row."""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from tfvllm.families import spec as specs
from tfvllm.graph import onednn_costs

MASKED = -1e9  # finite, so that a fully masked row (an empty source) stays free of NaN


LONG = 256  # positions from which on causal attention goes by parts


PARTS = 4


def one_row_each(x: tf.Tensor, y: tf.Tensor, transpose_b: bool = False) -> tf.Tensor:
    """x [.., 1, k] @ y [.., k, n], not by oneDNN, which rearranges every y first.

    TensorFlow gives it BatchMatMulV2 and not BatchMatMulV3. With 12 heads of 64 channels and 128 positions the two
    products of an attention took, with and without it, 73 and 115 µs for 1 row, 461 and 899 µs for 32.
    """
    return tf.raw_ops.BatchMatMulV3(x=x, y=y, Tout=x.dtype, adj_y=transpose_b)


def softmax(scores: tf.Tensor) -> tf.Tensor:
    """Over the last axis. For few scores by ops that oneDNN does not prepare."""
    few = tf.size(scores) < onednn_costs.ATTENTION_SCORES
    return tf.cond(few, lambda: tf.exp(tf.nn.log_softmax(scores)), lambda: tf.nn.softmax(scores))


def causal_masks(stack: specs.Stack, query_positions: tf.Tensor, keys) -> dict[tuple, tf.Tensor]:
    """What is added to the scores of causal attention, by `masked_by` of each attention in the stack.

    query_positions int32[queries] -> float32[1 or heads, queries, keys]; int32[batch, 1] -> [batch, .., 1, keys]

    The mask of whole sequences has no axis for the batch: TensorFlow fuses the addition of four axes with scaled
    products before it, and oneDNN has nothing but its reference code for [1, 1, queries, keys]: 200 times as slow.
    """
    key_positions = tf.range(keys)
    distance = query_positions[..., :, tf.newaxis] - key_positions  # >= 0: the key is not in the future
    bias = relative_bias(stack, distance)
    masks = {}
    for window, slopes in dict.fromkeys(block.attention.masked_by for block in stack.blocks):
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        mask = tf.where(seen, 0.0, MASKED)[..., tf.newaxis, :, :]
        if bias is not None:
            mask += bias
        if slopes is not None:
            steps = tf.cast(distance, tf.float32)[..., tf.newaxis, :, :]
            mask -= tf.constant(slopes, tf.float32, [len(slopes), 1, 1]) * steps
        masks[window, slopes] = mask
    return masks


def window_mask(around: tuple[int, int], distance: tf.Tensor) -> tf.Tensor:
    """float32 of the shape of `distance` (query - key), to be added to scores: keys within `around` are seen."""
    before, after = around
    return tf.where((distance <= before) & (distance >= -after), 0.0, MASKED)


def relative_bias(stack: specs.Stack, distance: tf.Tensor) -> tf.Tensor | None:
    """distance int32[.., queries, keys] = query - key -> float32[.., heads, queries, keys], or None."""
    bias = stack.relative_bias
    if bias is None:
        return None
    bucket = relative_bucket(-distance, bias.table.shape[0], bias.max_distance, bias.bidirectional)
    values = tf.cast(tf.gather(bias.table, bucket), tf.float32)
    order = [0, 3, 1, 2] if values.shape.rank == 4 else [2, 0, 1]
    return tf.transpose(values, order)


def relative_bucket(relative_position: tf.Tensor, buckets: int, max_distance: int, bidirectional: bool) -> tf.Tensor:
    """T5's bucket of key position minus query position: exact while near, logarithmic further away, int32."""
    bucket = tf.zeros_like(relative_position)
    if bidirectional:
        buckets //= 2
        bucket += tf.cast(relative_position > 0, tf.int32) * buckets
        distance = tf.abs(relative_position)
    else:
        distance = tf.maximum(-relative_position, 0)
    exact = buckets // 2
    scaled = tf.math.log(tf.cast(tf.maximum(distance, 1), tf.float32) / exact) / math.log(max_distance / exact)
    far = tf.minimum(exact + tf.cast(scaled * (buckets - exact), tf.int32), buckets - 1)
    return bucket + tf.where(distance < exact, distance, far)


class Turns:
    """What rotary embeddings turn by at some positions, computed once for all blocks that turn alike.

    Args:
        positions: int32[length], or int32[rows, 1]: one of each row.
        dtype: of what is turned.
    """

    def __init__(self, positions: tf.Tensor, dtype: tf.DType):
        self._positions, self._dtype = positions, dtype
        self._angles: dict[tuple, tuple[tf.Tensor, tf.Tensor]] = {}

    def turn(self, rotary: specs.Rotary, x: tf.Tensor) -> tf.Tensor:
        """x [batch, heads, length, head_dim], or [rows, heads, 1, head_dim], turned; the same shape."""
        alike = (np.asarray(rotary.inverse_frequencies).tobytes(), rotary.magnitude)
        if alike not in self._angles:
            self._angles[alike] = angles(rotary, self._positions, self._dtype)
        return rotate(x, *self._angles[alike])


def angles(rotary: specs.Rotary, positions: tf.Tensor, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """cos and sin: positions int32[length] -> [length, head_dim / 2]; int32[rows, 1] -> [rows, 1, 1, head_dim / 2]."""
    angles = tf.cast(positions, tf.float32)[..., tf.newaxis] * tf.constant(rotary.inverse_frequencies)
    if positions.shape.rank == 2:
        angles = angles[:, tf.newaxis]
    return tf.cast(tf.cos(angles) * rotary.magnitude, dtype), tf.cast(tf.sin(angles) * rotary.magnitude, dtype)


def rotate(x: tf.Tensor, cos: tf.Tensor, sin: tf.Tensor) -> tf.Tensor:
    """Turns the pairs (first half, second half) of the last axis."""
    first, second = tf.split(x, 2, axis=-1)
    return tf.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)

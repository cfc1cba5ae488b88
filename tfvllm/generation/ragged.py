"""Rows of different lengths in few ops.

TensorFlow's own functions of ragged tensors check what they are given whenever they run, and padding one takes a
hundred nodes. These check nothing, for what they are given is right by the way it is made: of the nodes that reading
text has in a SavedModel three quarters fall away, and each takes time when it is loaded and made ready.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf
from tensorflow_text.python.ops.regex_split_ops import gen_regex_split_ops


def rows(values: tf.Tensor, splits: tf.Tensor) -> tf.RaggedTensor:
    """values [n], splits int64[rows + 1] from 0 to n -> [rows, (values)]."""
    return tf.RaggedTensor.from_row_splits(values, splits, validate=False)


def split(texts: tf.Tensor, pattern: str) -> tf.RaggedTensor:
    """string[n] -> string[n, (pieces)]: what `pattern` (RE2) matches, and what lies between; no empty pieces."""
    quoted = f"({pattern})".encode()
    pieces, _, _, splits = gen_regex_split_ops.regex_split_with_offsets(texts, quoted, quoted)
    return rows(pieces, splits)


def those(tokens: tf.RaggedTensor, keep: tf.Tensor) -> tf.RaggedTensor:
    """The values of which bool[n] says so, each in its row."""
    return rows(_where(tokens.flat_values, keep), tf.gather(_up_to(tf.cast(keep, tf.int64)), tokens.row_splits))


def of_padded(table: tf.Tensor, keep: tf.Tensor) -> tf.RaggedTensor:
    """table [rows, width] -> [rows, (values)]: those of which bool[rows, width] says so."""
    counts = tf.reduce_sum(tf.cast(keep, tf.int64), axis=1)
    return rows(_where(tf.reshape(table, [-1]), tf.reshape(keep, [-1])), _up_to(counts))


def padded(
    tokens: tf.RaggedTensor,
    pad: int,
    *,
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    most: int | None = None,
    last: bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:
    """int32[rows, (tokens)] -> int32[rows, longest], each row's tokens first, and lengths int32[rows].

    Args:
        tokens: with int64 row splits.
        pad: fills rows.
        before, after: tokens put at either end of each row.
        most: how many tokens of a row are kept; all where it is None.
        last: whether those are its last ones; else its first.
    """
    splits = tf.cast(tokens.row_splits, tf.int32)
    starts, ends = splits[:-1], splits[1:]
    lengths = ends - starts
    if most is not None:
        lengths = tf.minimum(lengths, most)
    if last:
        starts = ends - lengths
    every = lengths + (len(before) + len(after))
    place = tf.range(tf.reduce_max(tf.concat([every, [0]], 0))) - len(before)
    end, count = lengths[:, tf.newaxis], tf.size(tokens.flat_values)
    # Behind all tokens stand the others: the padding, `before` and `after`.
    index = tf.where(place < end, starts[:, tf.newaxis] + place, count)
    if before:
        index = tf.where(place < 0, count + (1 + len(before)) + place, index)
    if after:
        here = (place >= end) & (place < end + len(after))
        index = tf.where(here, count + (1 + len(before)) + place - end, index)
    return tf.gather(tf.concat([tokens.flat_values, [pad, *before, *after]], 0), index), every


def _where(values: tf.Tensor, keep: tf.Tensor) -> tf.Tensor:
    return tf.gather(values, tf.reshape(tf.where(keep), [-1]))


def _up_to(counts: tf.Tensor) -> tf.Tensor:
    """int64[n] -> int64[n + 1]: 0, and the sums up to each."""
    return tf.pad(tf.cumsum(counts), [[1, 0]])

"""From one value for each example or position to one number for the batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfvllm.errors import InputError


@dataclass
class Weights:
    """A batch's `sample_weight`: one for all of the loss, or `{"task": …, "divergence": …}`, each a part's own.

    Attributes:
        task, divergence: float [batch], [batch, length], or None.
        apart: whether each part has its own.
    """

    task: Any
    divergence: Any
    apart: bool = False

    @classmethod
    def of(cls, sample_weight: Any) -> "Weights":
        if not isinstance(sample_weight, Mapping):
            return cls(sample_weight, sample_weight)
        if set(sample_weight) != {"task", "divergence"}:
            raise InputError(
                f"sample_weight has the parts {sorted(sample_weight)}; expected one tensor, or 'task' and 'divergence'."
            )
        return cls(sample_weight["task"], sample_weight["divergence"], apart=True)

    def rows(self, x: Any, weights: Any) -> tf.Tensor:
        """How many rows a metric of this part counts: the batch's; none where its own weights are all 0."""
        count = tf.shape(tf.nest.flatten(x)[0])[0]
        if not self.apart or weights is None:
            return count
        return tf.where(tf.reduce_any(weights != 0), count, 0)


def weighted_mean(
    values: tf.Tensor, mask: tf.Tensor | None = None, sample_weight: tf.Tensor | None = None
) -> tf.Tensor:
    """Σ mask · sample_weight · values / Σ mask.

    Masked positions do not count at all: the mean equals that of the batch cut to its real positions. As in Keras,
    `sample_weight` scales a value but not the count. Values under the mask, or of weight zero, may be inf or NaN.

    Args:
        values: float32 [batch] or [batch, length].
        mask: bool, the shape of `values`, or None.
        sample_weight: float [batch], [batch, 1] or the shape of `values`, or None. Weights for positions that the
            values do not have (a decoder's, for values of an encoder) count by their largest in the row.
    Returns:
        A float32 scalar: this replica's share of the mean over all replicas (the shares add up to it).
    """
    weights = tf.ones_like(values)
    count = tf.cast(tf.size(values), tf.float32)
    if mask is not None:
        if mask.shape.rank != values.shape.rank:
            raise InputError(f"the mask has shape {mask.shape}, expected that of the values: {values.shape}.")
        weights *= tf.cast(mask, tf.float32)
        count = tf.reduce_sum(weights)
    if sample_weight is not None:
        weights *= _fitted(tf.cast(sample_weight, tf.float32), values)
    kept = weights != 0
    total = tf.reduce_sum(tf.where(kept, values, 0.0) * weights)
    if tf.distribute.get_strategy().num_replicas_in_sync > 1 and not tf.distribute.in_cross_replica_context():
        count = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, count)
    return tf.math.divide_no_nan(total, count)


def _fitted(weights: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """`weights` in a shape that multiplies `values`."""
    rank = values.shape.rank
    if weights.shape.rank == 2 and rank == 2:
        same = weights.shape[1] == values.shape[1] or weights.shape[1] == 1
        unknown = None in (weights.shape[1], values.shape[1])
        if same and not unknown:
            return weights
        if unknown:
            return tf.cond(
                tf.equal(tf.shape(weights)[1], tf.shape(values)[1]),
                lambda: weights,
                lambda: tf.repeat(tf.reduce_max(weights, axis=1, keepdims=True), tf.shape(values)[1], axis=1),
            )
        return tf.reduce_max(weights, axis=1, keepdims=True)
    if weights.shape.rank == 2 and rank == 1:
        return weights[:, 0] if weights.shape[1] == 1 else tf.reduce_max(weights, axis=1)
    if weights.shape.rank == 1 and rank == 2:
        return weights[:, None]
    return weights

"""Keys and values of what was read: how they are held, grown and handed through loops."""

from __future__ import annotations

import dataclasses
import functools

import tensorflow as tf


@dataclasses.dataclass
class EncoderOutput:
    """What a decoder attends to: for each block keys and values [sources, kv_heads, length, head_dim].

    mask: float32[sources, 1, 1, length], added to the scores.
    """

    keys: list[tf.Tensor]
    values: list[tf.Tensor]
    mask: tf.Tensor

    def gather(self, rows: tf.Tensor) -> EncoderOutput:
        return EncoderOutput(
            [tf.gather(key, rows) for key in self.keys],
            [tf.gather(value, rows) for value in self.values],
            tf.gather(self.mask, rows),
        )


def to_parts(context: EncoderOutput | None) -> list[tf.Tensor]:
    """A context as loop variables."""
    return [] if context is None else [*context.keys, *context.values, context.mask]


def to_context(parts: list[tf.Tensor]) -> EncoderOutput | None:
    if not parts:
        return None
    count = len(parts) // 2
    parts[-1].set_shape([None, 1, 1, None])  # known to be one for all heads: that spares grouped heads a reshape
    return EncoderOutput(list(parts[:count]), list(parts[count:-1]), parts[-1])


def relaxed_shapes(variables):
    """Shape invariants that let rows and room change: only the last axis of floating-point tensors stays known."""

    def loosen(tensor):
        tensor = tf.convert_to_tensor(tensor)
        shape = [None] * tensor.shape.rank
        if tensor.dtype.is_floating and tensor.shape.rank and tensor.shape[-1] and tensor.shape.rank in (2, 4):
            shape[-1] = tensor.shape[-1]
            if tensor.shape.rank == 4 and tensor.shape[1]:
                shape[1] = tensor.shape[1]
        return tf.TensorShape(shape)

    return tf.nest.map_structure(loosen, variables)


def allocate(keys: list[tf.Tensor], values: list[tf.Tensor], capacity) -> list[tf.Tensor]:
    """Caches of `capacity` positions that begin with `keys` and `values` ([rows, kv_heads, length, head_dim] each)."""
    return _grown([part for pair in zip(keys, values) for part in pair], capacity - tf.shape(keys[0])[2])


def grow_caches(caches: list[tf.Tensor], shapes: list[tuple[int, int]], capacity, wider, rows: tf.Tensor):
    """Fresh caches of the given rows (int32[kept]) with `wider` positions.

    caches: keys and values of each block in turn; shapes: (kv_heads, head_dim) of each block.
    """
    by_rows = functools.cache(lambda kv_heads, head_dim: tf.stack([-1, kv_heads, capacity, head_dim]))
    parts = []
    for index, cache in enumerate(caches):
        kv_heads, head_dim = shapes[index // 2]
        parts.append(tf.gather(tf.reshape(cache, by_rows(kv_heads, head_dim)), rows))
    return _grown(parts, None if wider is capacity else wider - capacity)


def _grown(parts: list[tf.Tensor], room) -> list[tf.Tensor]:
    """[rows, kv_heads, length, head_dim] each -> [rows * kv_heads * (length + room), head_dim]."""
    if room is not None:
        paddings = tf.stack([[0, 0], [0, 0], tf.stack([0, room]), [0, 0]])  # once: it is five nodes
        parts = [tf.pad(part, paddings) for part in parts]
    return [tf.reshape(part, [-1, part.shape[3]]) for part in parts]

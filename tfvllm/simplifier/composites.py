"""Ragged and sparse arguments: made-up values for them. A graph takes their components, one input each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf


def components(spec: Any, batch: int, length: int, make: Callable[[int, tuple[int, ...]], Any]) -> list[Any] | None:
    """The components of a made-up ragged or sparse tensor, in the order of a graph's inputs; None of other specs.

    Args:
        batch, length: for the first, and for other, free axes. Rows differ in length, and the last of several is empty.
        make: (position among the components, shape) -> values.
    """
    if isinstance(spec, tf.RaggedTensorSpec):
        made = _ragged(spec, batch, length, make)
    elif isinstance(spec, tf.SparseTensorSpec):
        made = _sparse(spec, batch, length, make)
    else:
        return None
    return [t.numpy() for t in tf.nest.flatten(made, expand_composites=True)]


def _ragged(spec: tf.RaggedTensorSpec, batch: int, length: int, make: Callable) -> tf.RaggedTensor:
    rank, sizes = spec.ragged_rank, spec.shape
    rows = sizes[0] if sizes.rank and sizes[0] is not None else batch
    nested = []
    for axis in range(1, rank + 1):
        fixed = sizes[axis] if sizes.rank else None
        lengths = np.full(rows, length if fixed is None else fixed, np.int64)
        if fixed is None:
            lengths = np.maximum(0, lengths - np.arange(rows) * max(1, length // 4))
            lengths[-1] = 0 if rows > 1 else lengths[-1]
        nested.append(lengths)
        rows = int(lengths.sum())
    inner = [length if d is None else d for d in (sizes[rank + 1 :] if sizes.rank else [])]
    values = tf.convert_to_tensor(make(0, (rows, *inner)), spec.dtype)
    return tf.RaggedTensor.from_nested_row_lengths(values, nested).with_row_splits_dtype(spec.row_splits_dtype)


def _sparse(spec: tf.SparseTensorSpec, batch: int, length: int, make: Callable) -> tf.SparseTensor:
    sizes = [(batch if axis == 0 else length) if d is None else d for axis, d in enumerate(spec.shape)]
    cells = np.argwhere(np.arange(int(np.prod(sizes))).reshape(sizes) % 3 == 1)  # in the order TensorFlow keeps
    return tf.SparseTensor(cells, tf.convert_to_tensor(make(1, (len(cells),)), spec.dtype), sizes)

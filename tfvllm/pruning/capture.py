"""Seeing what flows into a layer, without changing the model: `call` is wrapped for the length of a `with` block."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError


@contextlib.contextmanager
def recorded(layers: Mapping[Any, Any], see: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """While open, `see(key, first_input, output)` is called after each call of `layers[key]`."""
    originals = {}
    for key, layer in layers.items():
        originals[key] = layer.call

        def call(*args: Any, _key: Any = key, _call: Any = layer.call, **kwargs: Any) -> Any:
            outputs = _call(*args, **kwargs)
            first = args[0] if args else next(iter(kwargs.values()))
            see(_key, first, outputs)
            return outputs

        object.__setattr__(layer, "call", call)
    try:
        yield
    finally:
        for layer in layers.values():
            object.__delattr__(layer, "call")


def batches(model: Any, data: Any, batch_size: int = 8, limit: int | None = None) -> Iterator[tuple[Any, Any, Any]]:
    """(x, y, sample_weight) batches as tensors, preprocessed as `fit` would.

    Args:
        data: a `tf.data.Dataset` of batches, an iterable of batches, or arrays / strings: `x` or `(x, y)` or
            `(x, y, sample_weight)`, split here into `batch_size` rows.
        limit: stop after that many batches.

    Raises:
        InputError: no data.
    """
    if data is None:
        raise InputError("data is needed here and none was given. Pass data=, a few hundred rows are enough.")
    process = getattr(model, "preprocess_samples", None) if getattr(model, "preprocessor", None) is not None else None
    count = 0
    for element in _elements(data, batch_size):
        x, y, weight = keras.utils.unpack_x_y_sample_weight(element)
        if process is not None:
            x, y, weight = keras.utils.unpack_x_y_sample_weight(process(x, y, weight))
        to_tensor = tf.convert_to_tensor
        tensors = [None if part is None else tf.nest.map_structure(to_tensor, part) for part in (x, y, weight)]
        yield tensors[0], tensors[1], tensors[2]
        count += 1
        if count == limit:
            return
    if count == 0:
        raise InputError("data is empty: expected at least one batch.")


def _elements(data: Any, batch_size: int) -> Iterable[Any]:
    if isinstance(data, tf.data.Dataset):
        return data
    strings = isinstance(data, list) and bool(data) and isinstance(data[0], str)
    if not (strings or isinstance(data, tuple | dict | np.ndarray | tf.Tensor)):
        return data
    parts = tuple(_arrays(part) for part in (data if isinstance(data, tuple) else (data,)))
    rows = {len(leaf) for leaf in tf.nest.flatten(parts)}
    if len(rows) != 1:
        raise InputError(f"data has arrays of unlike length: {sorted(rows)}. Expected one row per example in each.")
    return (
        tf.nest.map_structure(lambda leaf, i=i: leaf[i : i + batch_size], parts)
        for i in range(0, rows.pop(), batch_size)
    )


def _arrays(part: Any) -> Any:
    part = np.asarray(part) if isinstance(part, list) else part
    return tf.nest.map_structure(_array, part)


def _array(leaf: Any) -> Any:
    leaf = np.asarray(leaf)
    return tf.constant(leaf) if leaf.dtype.kind == "U" else leaf  # tokenizers take tensors, not NumPy strings


def padding_mask(x: Any, kind: str) -> Any | None:
    """The padding mask of stack `kind` among the inputs of a keras-nlp model, or None."""
    if not isinstance(x, Mapping):
        return None
    for name in (f"{kind}_padding_mask", "padding_mask"):
        if name in x:
            return x[name]
    return None


def token_rows(values: Any, mask: Any | None) -> Any:
    """[batch, length, …] -> [tokens, …] float32, padded positions left out."""
    values = tf.cast(values, tf.float32)
    if mask is not None and values.shape.rank >= 2 and mask.shape[:2] == values.shape[:2]:
        return tf.boolean_mask(values, tf.cast(mask, tf.bool))
    return tf.reshape(values, tf.concat([[-1], tf.shape(values)[2:]], 0))

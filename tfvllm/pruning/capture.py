"""Calibration: batches as a model reads them, and what flows into its layers on them."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.models.products import flat_products
from tfvllm.models.taps import call_of, tapped


def traced(model: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which runs `model`, as a graph: TensorFlow then computes only what leads to its results.

    Models with `run_eagerly` are run as they are.
    """
    return function if getattr(model, "run_eagerly", False) else tf.function(function, reduce_retracing=True)


def listener(
    model: Any, layers: Mapping[Any, Any], measure: Callable[[Any, Any, Any, Any], Any]
) -> Callable[[Any], dict[Any, Any]]:
    """What flows into some layers of `model`, as a function of a batch.

    What lies above the uppermost of the layers costs nothing: see `traced`.

    Args:
        layers: the layers by a key of the caller's.
        measure: (key, first input, output, batch) -> tensors, for each call of a layer. Those of several calls are
            added up.

    Returns:
        A function from `x` to the measured tensors by key. Layers that are not called are left out.
    """
    order: list[Any] = []

    def listen(x: Any) -> list[Any]:
        found: dict[Any, Any] = {}

        def hook(key: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = method(*args, **kwargs)
            first = args[0] if args else next(iter(kwargs.values()))
            measured = measure(key, first, outputs, x)
            found[key] = tf.nest.map_structure(tf.add, found[key], measured) if key in found else measured
            return outputs

        with flat_products(model), contextlib.ExitStack() as taps:
            for key, layer in layers.items():
                taps.enter_context(tapped(layer, call_of(layer), functools.partial(hook, key)))
            model(x, training=False)
        order[:] = found
        return list(found.values())

    function = traced(model, listen)
    return lambda x: dict(zip(order, function(x)))


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
    """[batch, length, …] -> [tokens, …] float32, padded positions left out where `mask` fits.

    What is not of the mask's sizes (a cross-attention's other side) is taken whole.
    """
    values = tf.cast(values, tf.float32)
    flat = tf.reshape(values, tf.concat([[-1], tf.shape(values)[2:]], 0))
    flat.set_shape([None, *values.shape[2:]])
    if mask is None or values.shape.rank < 3:
        return flat
    mask = tf.cast(mask, tf.bool)
    fits = tf.reduce_all(tf.equal(tf.shape(values)[:2], tf.shape(mask)))
    kept = tf.cond(fits, lambda: tf.reshape(mask, [-1]), lambda: tf.ones(tf.shape(flat)[:1], tf.bool))
    return tf.boolean_mask(flat, kept)

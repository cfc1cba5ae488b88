"""Calibration: batches as a model reads them, and what flows into its layers on them."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.families.matmuls import einsum_as_matmul
from tfvllm.families.taps import call_of, first_of, hooked


def traced(model: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which runs `model`, as a graph: TensorFlow then computes only what leads to its results.

    Models with `run_eagerly` are run as they are.
    """
    return function if getattr(model, "run_eagerly", False) else tf.function(function, reduce_retracing=True)


def listener(
    model: Any,
    layers: Mapping[Any, Any],
    measure: Callable[[Any, Any, Any, Any], Any],
    run: Callable[[Any], Any] | None = None,
) -> Callable[[Any], dict[Any, Any]]:
    """What flows into some layers of `model`, as a function of a batch.

    What lies above the uppermost of the layers costs nothing: see `traced`.

    Args:
        layers: the layers by a key of the caller's.
        measure: (key, first input, output, batch) -> tensors, for each call of a layer. Those of several calls are
            added up.
        run: runs what holds the layers on a batch; default `model(batch, training=False)`.

    Returns:
        A function from `x` to the measured tensors by key. Layers that are not called are left out.
    """
    order: list[Any] = []

    def listen(x: Any) -> list[Any]:
        found: dict[Any, Any] = {}

        def hook(key: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = method(*args, **kwargs)
            measured = measure(key, first_of(args, kwargs), outputs, x)
            found[key] = tf.nest.map_structure(tf.add, found[key], measured) if key in found else measured
            return outputs

        with einsum_as_matmul(model), contextlib.ExitStack() as taps:
            for key, layer in layers.items():
                taps.enter_context(hooked(layer, call_of(layer), functools.partial(hook, key)))
            model(x, training=False) if run is None else run(x)
        order[:] = found
        return list(found.values())

    function = traced(model, listen)
    return lambda x: dict(zip(order, function(x)))


Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named arguments


@dataclass(frozen=True)
class _Given:
    """Stands for a tensor in a call: result `leaf` of block `block`, or `leaf` of what comes from elsewhere (None)."""

    block: int | None
    leaf: int


def block_calls(model: Any, layers: Sequence[Any], data: Sequence[Any]) -> Iterator[list[Call]] | None:
    """How a model calls its blocks, one block after another: for each the arguments on every batch.

    A block may be changed once its calls were told: the next one reads what it gives by then. All blocks together cost
    one run of the model. What else they read (embeddings, masks) is computed once, and anew where a block does not read
    what the one before it gave (the first of a decoder).

    Args:
        layers: the blocks in the order of the data.
        data: batches as the model reads them.

    Returns:
        None where this cannot be told: the model runs eagerly, or not every block is called once.
    """
    if getattr(model, "run_eagerly", False):
        return None
    calls: dict[int, list[Call]] = {}
    below: list[set[int]] = []  # of each tensor from elsewhere: the blocks it is made of

    def elsewhere(wanted: Sequence[int], x: Any) -> list[Any]:
        calls.clear()
        below.clear()
        known: dict[int, _Given] = {}
        results: list[Any] = []  # kept: `known` is by identity
        outside: list[Any] = []

        def told(leaf: Any) -> Any:
            if not tf.is_tensor(leaf):
                return leaf
            if id(leaf) not in known:
                known[id(leaf)] = _Given(None, len(outside))
                below.append(_blocks_below(leaf, known))
                outside.append(leaf)
            return known[id(leaf)]

        def hook(block: int, method: Any, *args: Any, **kwargs: Any) -> Any:
            calls.setdefault(block, []).append(tf.nest.map_structure(told, (args, kwargs)))
            outputs = method(*args, **kwargs)
            for leaf, tensor in enumerate(tf.nest.flatten(outputs)):
                known[id(tensor)] = _Given(block, leaf)
                results.append(tensor)
            return outputs

        with einsum_as_matmul(model), contextlib.ExitStack() as taps:
            for block, layer in enumerate(layers):
                taps.enter_context(hooked(layer, call_of(layer), functools.partial(hook, block)))
            model(x, training=False)
        return [outside[leaf] for leaf in wanted]

    tf.function(functools.partial(elsewhere, ())).get_concrete_function(data[0])
    if any(len(calls.get(block, ())) != 1 for block in range(len(layers))):
        return None
    return _walk(layers, data, [calls[block][0] for block in range(len(layers))], list(below), elsewhere)


def _blocks_below(tensor: Any, known: Mapping[int, _Given]) -> set[int]:
    """The blocks whose results `tensor` of a graph is computed from."""
    found: set[int] = set()
    seen: set[int] = set()
    rest = [tensor]
    while rest:
        tensor = rest.pop()
        given = known.get(id(tensor))
        if given is not None and given.block is not None:
            found.add(given.block)
        elif id(tensor) not in seen and hasattr(tensor, "op"):
            seen.add(id(tensor))
            rest += tensor.op.inputs
    return found


def _walk(
    layers: Sequence[Any],
    data: Sequence[Any],
    calls: list[Call],
    below: list[set[int]],
    elsewhere: Callable[[Sequence[int], Any], list[Any]],
) -> Iterator[list[Call]]:
    read = [{leaf for leaf in tf.nest.flatten(call) if isinstance(leaf, _Given)} for call in calls]
    # A run of the model begins at the blocks which read what is made of the blocks since the last such run.
    starts: list[int] = []
    for block, leaves in enumerate(read):
        made_of = set[int]().union(*(below[given.leaf] for given in leaves if given.block is None))
        if not starts or any(lower >= starts[-1] for lower in made_of):
            starts.append(block)
    values: list[dict[_Given, Any]] = [{} for _ in data]
    for block, layer in enumerate(layers):
        if block in starts:
            stop = min((start for start in starts if start > block), default=len(calls))
            wanted = sorted({given.leaf for leaves in read[block:stop] for given in leaves if given.block is None})
            function = tf.function(functools.partial(elsewhere, wanted), reduce_retracing=True)
            for known, x in zip(values, data):
                known.update({_Given(None, leaf): tensor for leaf, tensor in zip(wanted, function(x))})
        told = [_filled(calls[block], known) for known in values]
        yield told
        later = set[_Given]().union(*read[block + 1 :])
        for known, (args, kwargs) in zip(values, told):
            if any(given.block == block for given in later):
                with einsum_as_matmul(layer):
                    outputs = tf.nest.flatten(layer(*args, **kwargs))
                known.update({_Given(block, leaf): tensor for leaf, tensor in enumerate(outputs)})
            for given in set(known) - later:
                del known[given]


def _filled(call: Call, known: Mapping[_Given, Any]) -> Call:
    return tf.nest.map_structure(lambda leaf: known[leaf] if isinstance(leaf, _Given) else leaf, call)


def batches(model: Any, data: Any, batch_size: int = 8, limit: int | None = None) -> Iterator[tuple[Any, Any, Any]]:
    """(x, y, sample_weight) batches as tensors: strings preprocessed as `fit` would, batches of tokens as they are.

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
        if process is not None and _has_strings(x):
            x, y, weight = keras.utils.unpack_x_y_sample_weight(process(x, y, weight))
        to_tensor = tf.convert_to_tensor
        tensors = [None if part is None else tf.nest.map_structure(to_tensor, part) for part in (x, y, weight)]
        yield tensors[0], tensors[1], tensors[2]
        count += 1
        if count == limit:
            return
    if count == 0:
        raise InputError("data is empty: expected at least one batch.")


def _has_strings(x: Any) -> bool:
    """Whether a batch is raw text; what a preprocessor made of one is numbers throughout."""
    return any(
        isinstance(leaf, str | bytes) or getattr(leaf, "dtype", None) == tf.string or _is_text(leaf)
        for leaf in tf.nest.flatten(x)
    )


def _is_text(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "USO"


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

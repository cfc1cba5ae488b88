"""What a batch holds: raw strings that need a preprocessor, inputs by name, padding masks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError

Mask = str | Callable[[Any], tf.Tensor] | None


def has_strings(x: Any) -> bool:
    """Whether the inputs `x` (lists, arrays, tensors, dicts of these, or a dataset) hold raw strings."""
    if isinstance(x, tf.data.Dataset):
        spec = x.element_spec
        spec = spec[0] if isinstance(spec, tuple) else spec
        return any(getattr(leaf, "dtype", None) == tf.string for leaf in tf.nest.flatten(spec))
    if isinstance(x, (str, bytes)):
        return True
    if isinstance(x, Mapping):
        return any(has_strings(value) for value in x.values())
    if isinstance(x, (list, tuple)):
        return any(has_strings(part) for part in (x if _is_structure(x) else x[:1]))
    if isinstance(x, np.ndarray):
        return x.dtype.kind in "US" or (x.dtype.kind == "O" and x.size > 0 and isinstance(x.flat[0], (str, bytes)))
    return getattr(x, "dtype", None) == tf.string


def takes_strings(model: keras.Model) -> bool:
    """Whether a model reads raw strings itself (TextVectorization or StringLookup inside); of a model that has no
    preprocessor and does not say what it reads, it is taken for granted."""
    if getattr(model, "preprocessor", None) is not None:
        return False
    try:
        inputs = list(getattr(model, "inputs", None) or ())
    except (AttributeError, ValueError):
        inputs = []
    return not inputs or any(tensor.dtype == "string" for tensor in inputs)


def preprocess_of(model: keras.Model) -> Callable[..., Any]:
    """What makes (x, y, sample_weight) for `model` from raw strings: its preprocessor, or nothing at all.

    Raises:
        InputError: the model reads numbers and has no preprocessor.
    """
    if takes_strings(model):
        return keras.utils.pack_x_y_sample_weight
    if getattr(model, "preprocessor", None) is None:
        raise InputError(
            f"the data are raw strings, but {model.name} has no preprocessor and reads numbers. Give it one "
            "(model.preprocessor = ...), or pass preprocessed batches."
        )
    return model.preprocess_samples


class Reader:
    """`preprocess_of` a model, traced once for all batches and datasets: tracing a tokenizer takes seconds."""

    def __init__(self) -> None:
        self._traced: Callable[..., Any] | None = None
        self._of: tuple | None = None

    def of(self, model: keras.Model) -> Callable[..., Any]:
        """What makes (x, y, sample_weight) of raw strings.

        Traced anew where the preprocessor is another one, or where a setting of it has changed (its sequence_length).
        """
        preprocess = preprocess_of(model)
        state = _settings(getattr(model, "preprocessor", None))
        if self._traced is None or self._of != state:
            self._traced = tf.function(lambda *data: preprocess(*data), reduce_retracing=True)
            self._of = state
        return self._traced


def _settings(preprocessor: Any) -> tuple:
    """Which object it is, with the plain values that it and its parts (tokenizer, packers) hold."""
    parts = [preprocessor, *vars(preprocessor).values()] if hasattr(preprocessor, "__dict__") else [preprocessor]
    held = [part for part in parts if isinstance(part, keras.layers.Layer)] or [preprocessor]
    plain = (bool, int, float, str, type(None))
    return tuple(
        (id(part), tuple((name, value) for name, value in vars(part).items() if isinstance(value, plain)))
        for part in held
        if hasattr(part, "__dict__")
    )


def as_arrays(part: Any) -> Any:
    """Lists (of strings, numbers, rows) as arrays. Dicts, tuples of arrays or lists, and lists of arrays are structure:
    several inputs, as in Keras."""
    if isinstance(part, Mapping):
        return {name: as_arrays(value) for name, value in part.items()}
    if isinstance(part, (list, tuple)):
        return tuple(as_arrays(value) for value in part) if _is_structure(part) else np.asarray(part)
    return part


def rows_of(x: Any) -> int:
    """How many examples there are."""
    return len(tf.nest.flatten(as_arrays(x))[0])


def _is_structure(part: Any) -> bool:
    """Whether a list or tuple holds several inputs, not examples."""
    if isinstance(part, tuple):
        return bool(part) and all(
            hasattr(value, "shape") or isinstance(value, (list, tuple, Mapping)) for value in part
        )
    return bool(part) and all(getattr(value, "shape", ()) != () for value in part[:2])


def dataset_of(
    x: Any, y: Any, sample_weight: Any, batch_size: int | None, preprocess: Callable[..., Any], shuffle: bool
) -> tf.data.Dataset:
    """Batches of preprocessed (x, y, sample_weight) from raw strings. Arrays are shuffled anew every epoch if asked."""
    if isinstance(x, tf.data.Dataset):
        if y is not None or sample_weight is not None or batch_size is not None:
            raise InputError(
                "with a tf.data.Dataset as x, expected y, sample_weight and batch_size inside it, not beside."
            )
        batches = x if isinstance(x.element_spec, tuple) else x.map(lambda part: (part,))
    else:
        arrays = tuple(as_arrays(part) for part in _told(x, y, sample_weight))
        rows = tf.data.Dataset.from_tensor_slices(arrays)
        if shuffle:
            rows = rows.shuffle(max(1, int(rows.cardinality())))
        batches = rows.batch(batch_size or 32)
    return batches.map(lambda *data: preprocess(*data), num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def preprocess_batch(x: Any, y: Any, sample_weight: Any, preprocess: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """One batch of raw strings as (x, y, sample_weight) tensors, made in a graph as those of a dataset."""
    parts = [tf.nest.map_structure(tf.convert_to_tensor, as_arrays(part)) for part in _told(x, y, sample_weight)]
    return keras.utils.unpack_x_y_sample_weight(preprocess(*parts))


def _told(*parts: Any) -> tuple:
    """(x, y, sample_weight) up to the last one that there is."""
    while parts[-1] is None:
        parts = parts[:-1]
    return parts


def split_rows(parts: Sequence[Any], fraction: float) -> tuple[list[Any], list[Any]]:
    """The first 1 − `fraction` of the rows of each part, and the rest, as Keras does for `validation_split`."""
    arrays = [as_arrays(part) for part in parts]
    count = next(len(leaf) for leaf in tf.nest.flatten(arrays) if leaf is not None)
    at = int(count * (1.0 - fraction))
    if at in (0, count):
        raise InputError(f"validation_split={fraction} leaves nothing on one side of {count} rows; use another value.")
    cut = [
        tf.nest.map_structure(lambda leaf, s=s: None if leaf is None else leaf[s], arrays)
        for s in (slice(None, at), slice(at, None))
    ]
    return cut[0], cut[1]


def select(model: keras.Model, x: Any) -> Any:
    """The entries of `x` that `model` reads: a batch may carry more than one model needs.

    Raises:
        InputError: where an input of the model is not in the batch.
    """
    wanted = getattr(model, "input", None) if getattr(model, "inputs", None) else None
    if not isinstance(wanted, dict) or not isinstance(x, Mapping):
        return x
    missing = sorted(set(wanted) - set(x))
    if missing:
        raise InputError(
            f"{model.name} reads {sorted(wanted)}, but the batch has {sorted(x)}: {missing} missing. "
            "Use the preprocessor that both models share, or add the missing inputs to the data."
        )
    return {name: x[name] for name in wanted}


def padding_mask(x: Any, y_pred: Any, mask: Mask, kind: str = "decoder") -> tf.Tensor | None:
    """Which positions are real, bool [batch, length]; None where nothing says so.

    Args:
        x: the batch's inputs.
        y_pred: a tensor that may carry a Keras mask.
        mask: "auto" (the input named padding_mask, or else the Keras mask), the name of an input, a function of x, or
            None: all are real.
        kind: "encoder" or "decoder", for models with both.
    """
    if mask is None:
        return None
    if callable(mask):
        found = mask(x)
    elif mask != "auto":
        if not isinstance(x, Mapping) or mask not in x:
            names = sorted(x) if isinstance(x, Mapping) else "a single tensor"
            raise InputError(f"mask={mask!r} names no input; the batch has {names}.")
        found = x[mask]
    else:
        told = (f"{kind}_padding_mask", "padding_mask")
        found = next((x[name] for name in told if name in x), None) if isinstance(x, Mapping) else None
        if found is None:
            found = getattr(y_pred, "_keras_mask", None)
    return None if found is None else tf.cast(found, tf.bool)

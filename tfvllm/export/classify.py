"""`task="classify"`: strings in (or a model's own inputs), class names and scores out."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.export import float32
from tfvllm.export.text import NAMES, PROBES, SENTENCE, TextFeatures, as_bytes
from tfvllm.families.heads import head_of, look
from tfvllm.families.relative_positions import exact_positions
from tfvllm.savedmodel import write

ATOL = 1e-5  # scores against the model's own padded preprocessing


def export_task(
    model,
    directory: Path,
    *,
    labels: list[str] | None = None,
    max_length: int | None = None,
    precision: str = "float32",
    from_logits: bool | None = None,
    pad_to_multiple: int = 1,
    texts: int = 1,
    tokenizer: str | Mapping[str, bool] | None = None,
) -> dict[str, Any]:
    """Writes the SavedModel of a classifier into `directory` and returns its manifest entries.

    Args:
        model: a keras-nlp text classifier with a preprocessor (then strings come in), or any Keras model with one
            float output [batch, n] (then its own inputs come in).
        directory: an existing, empty folder.
        labels: n class names; default "0", "1", …
        max_length: tokens kept of each text, special tokens included; default the preprocessor's sequence length.
        precision: only "float32" here: `tfvllm simplify --precision` makes the others from this export.
        from_logits: whether the outputs are logits (a softmax, or a sigmoid of one output, is then put into the graph)
            or probabilities; default: found out, from the operations that make the output and from its values.
        pad_to_multiple: round the padded length of a batch up to a multiple of this.
        texts: 2 for a model that was trained on pairs of texts (a model does not tell), packed as its preprocessor
            packs a tuple of two.
        tokenizer: settings such as {"strip_accents": True} to tokenise with, or "as is"; default those of the Hugging
            Face folder the tokenizer was read from, where it was.

    Signatures: `serving_default` (predict) takes `text` string[batch] (and `text_pair`) and gives `classes`
    string[batch, n] and `scores` float32[batch, n]; `classify` takes `inputs` string[batch], serialised `tf.Example`s
    with the same features, with TF Serving's classify method.
    """
    if precision != "float32":
        raise InputError(
            f"task 'classify' exports float32; got precision={precision!r}. "
            f"Export in float32, then run: tfvllm simplify SRC DST --precision {precision}"
        )
    if pad_to_multiple < 1:
        raise InputError(f"pad_to_multiple must be at least 1; got {pad_to_multiple}.")
    head = _Head(model, labels, from_logits)
    preprocessor = getattr(model, "preprocessor", None)
    if preprocessor is None:
        for name, value in (("max_length", max_length), ("tokenizer", tokenizer), ("texts", None if texts == 1 else 2)):
            if value is not None:
                raise InputError(f"{name} needs a model with a preprocessor (a tokenizer); this model has none.")
        return _export_plain(model, directory, head)
    features = TextFeatures(model, preprocessor, max_length, texts=texts, tokenizer=tokenizer)
    return _export_text(model, features, directory, head, pad_to_multiple)


# --- text -------------------------------------------------------------------------------------------------------------


def _export_text(model, features: TextFeatures, directory, head, multiple) -> dict[str, Any]:
    def answer(found):
        return head(model(found, training=False))

    tolerance = float32.tolerance(model, ATOL)
    probes = features.probes
    expected = head.own(model(features.own(*probes.values()), training=False))
    serving_default = features.serve(answer, {"scores": expected}, tolerance, multiple)
    names = features.names

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def classify(inputs):
        parsed = tf.io.parse_example(inputs, {name: tf.io.FixedLenFeature([], tf.string) for name in names})
        return serving_default(*(parsed[name] for name in names))  # a call: graph and vocabulary are stored once

    write.save(
        features.held_by(model),
        {"serving_default": serving_default.get_concrete_function(), "classify": classify.get_concrete_function()},
        directory,
        {"classify": write.CLASSIFY},
    )
    check = {"signature": "serving_default", "inputs": probes, "expected": {"scores": expected}, **tolerance}
    warmup = _text_warmup(features.max_length, names)
    return {"labels": head.labels, **features.entries(), "check": check, "warmup": warmup}


def _text_warmup(max_length: int, names: Sequence[str]) -> list[dict]:
    long_text = " ".join([SENTENCE] * math.ceil(max_length / len(SENTENCE.split())))
    rows = [PROBES[0], PROBES[1], SENTENCE, long_text]
    return [
        {"signature_name": "serving_default", "inputs": {name: as_bytes(batch) for name in names}}
        for batch in ([PROBES[0]], [SENTENCE], [long_text], rows, rows * 2)
    ] + [
        {"signature_name": "classify", "method": "classify", "examples": [example_of(*[r] * len(names)) for r in batch]}
        for batch in ([SENTENCE], rows)
    ]


def example_of(*texts: str) -> bytes:
    """A serialised tf.Example with the feature `text`, and `text_pair` for a second text."""
    features = {
        name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()]))
        for name, text in zip(NAMES, texts, strict=False)
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


# --- any Keras model --------------------------------------------------------------------------------------------------


def _export_plain(model, directory, head) -> dict[str, Any]:
    inputs = _model_inputs(model)
    names = [name for name, _, _ in inputs]
    structure = getattr(model, "_inputs_struct", None)
    if structure is None:
        structure = model.inputs[0] if len(inputs) == 1 else list(model.inputs)

    def call(tensors: dict[str, tf.Tensor]):
        with exact_positions(model):
            return head(
                model(keras.tree.pack_sequence_as(structure, [tensors[name] for name in names]), training=False)
            )

    # A model that knows how many tokens it takes is tried on as many: a graph may go wrong at some distance only.
    length = getattr(getattr(model, "backbone", model), "max_sequence_length", None) or 5
    probe = {name: _probe(shape, dtype, length) for name, shape, dtype in inputs}
    flat = [tf.constant(probe[name]) for name in names]
    expected = head.own(model(keras.tree.pack_sequence_as(structure, flat), training=False))
    tolerance = float32.tolerance(model, ATOL)
    predict = tf.function(lambda **tensors: call(tensors))
    specs = {name: tf.TensorSpec([None, *shape], dtype, name=name) for name, shape, dtype in inputs}
    notes = []
    if any(None in shape for _, shape, _ in inputs):
        found = predict.get_concrete_function(**specs)(**{name: tf.constant(value) for name, value in probe.items()})
        if not np.allclose(found["scores"].numpy(), expected, rtol=tolerance["rtol"], atol=tolerance["atol"]):
            inputs = [(name, [size or length for size in shape], dtype) for name, shape, dtype in inputs]
            specs = {name: tf.TensorSpec([None, *shape], dtype, name=name) for name, shape, dtype in inputs}
            notes.append(f"the graph is wrong where the length of its inputs is unknown: it must be {length}")
    signatures = {"serving_default": predict.get_concrete_function(**specs)}
    methods = {}
    features = {name: _feature(name, shape, dtype) for name, shape, dtype in inputs}
    if all(feature is not None for feature in features.values()):

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
        def classify(inputs):
            parsed = tf.io.parse_example(inputs, features)
            return predict(**{name: _from_example(parsed[name], specs[name]) for name in names})

        signatures["classify"] = classify.get_concrete_function()
        methods["classify"] = write.CLASSIFY

    write.save(write.weights_module(model), signatures, directory, methods)
    check = {"signature": "serving_default", "inputs": probe, "expected": {"scores": expected}, **tolerance}
    batches = ({name: value[:1] for name, value in probe.items()}, probe)
    warmup = [{"signature_name": "serving_default", "inputs": batch} for batch in batches]
    return {"labels": head.labels, "check": check, "warmup": warmup, "notes": notes}


def _model_inputs(model) -> list[tuple[str, list[int | None], tf.DType]]:
    inputs = _tensors_of(model, "inputs")
    if not inputs:
        raise InputError(_WRAP.format(type(model).__name__, "inputs"))
    return [
        (tensor.name, list(tensor.shape[1:]), tf.as_dtype(keras.backend.standardize_dtype(tensor.dtype)))
        for tensor in inputs
    ]


_WRAP = (
    "{} has no known {}; expected a functional model or a Sequential one with an Input. Wrap a model class of your "
    "own: x = keras.Input(shape, dtype=...); model = keras.Model(x, your_model(x))."
)


def _tensors_of(model, name: str) -> list:
    """The `inputs` or `outputs` of a model as a flat list; empty where it does not know them."""
    try:
        found = getattr(model, name)
    except (AttributeError, ValueError):  # a subclassed model has no such attribute, an unbuilt one no such tensors
        return []
    return [] if found is None else keras.tree.flatten(found)


def _feature(name: str, shape: list[int | None], dtype: tf.DType):
    stored = tf.string if dtype == tf.string else tf.float32 if dtype.is_floating else tf.int64
    if None not in shape:
        return tf.io.FixedLenFeature(shape, stored)
    if len(shape) == 1:
        return tf.io.RaggedFeature(stored)
    return None


def _from_example(value, spec: tf.TensorSpec):
    if isinstance(value, tf.RaggedTensor):
        value = value.to_tensor()
    return value if value.dtype == spec.dtype else tf.cast(value, spec.dtype)


def _probe(shape: list[int | None], dtype: tf.DType, length: int) -> np.ndarray:
    full = [3, *(size or length for size in shape)]
    count = math.prod(full)
    if dtype == tf.string:
        return np.array([PROBES[i % len(PROBES)].encode() for i in range(count)], object).reshape(full)
    if dtype.is_floating:
        return np.linspace(-1.0, 1.0, count).reshape(full).astype(dtype.as_numpy_dtype)
    return (np.arange(count) % 2).reshape(full).astype(dtype.as_numpy_dtype)


# --- classes and scores -----------------------------------------------------------------------------------------------


class _Head:
    """A model's output tensor to `classes` and `scores`."""

    def __init__(self, model, labels: list[str] | None, from_logits: bool | None):
        outputs = _tensors_of(model, "outputs")
        if not outputs:
            raise InputError(_WRAP.format(type(model).__name__, "outputs"))
        if len(outputs) != 1 or len(outputs[0].shape) != 2 or outputs[0].shape[-1] is None:
            shapes = ", ".join(str(tuple(output.shape)) for output in outputs)
            raise InputError(
                f"task 'classify' needs a model with one output [batch, classes]; found {shapes}. "
                "Wrap the model so that it gives one row of scores per input."
            )
        width = int(outputs[0].shape[-1])
        self._binary = width == 1
        count = 2 if self._binary else width
        self.labels = [str(i) for i in range(count)] if labels is None else list(labels)
        if len(self.labels) != count:
            raise InputError(
                f"the model has {count} classes, but labels has {len(self.labels)}: {', '.join(self.labels)}. "
                "Pass one label per class, in the order of the model's outputs."
            )
        self._told = from_logits
        self._probabilities = head_of(model, from_logits=from_logits).kind != "logits"
        self._function: Callable = _FUNCTIONS[(self._binary, not self._probabilities)]

    def scores(self, outputs) -> tf.Tensor:
        """Model outputs [batch, width] to scores float32[batch, classes]."""
        return self._function(tf.cast(keras.tree.flatten(outputs)[0], tf.float32))

    def own(self, outputs) -> np.ndarray:
        """What the export must answer where the model gives `outputs`, from the values and in NumPy: rows that sum to
        one stand as they are, and what leaves [0, 1] is taken for logits, whatever the graph of this head does. (Of
        single probabilities the values do not tell; there the caller's word counts, or what was found out.)

        Returns:
            float32[batch, classes].
        """
        values = np.asarray(tf.convert_to_tensor(keras.tree.flatten(outputs)[0]))
        seen, values = look(values), values.astype(np.float64)
        probabilities = self._probabilities
        if self._told is None and seen is not None and seen.range != "unit":
            probabilities = seen.range == "simplex"
        if not probabilities and self._binary:
            values = 1.0 / (1.0 + np.exp(-values))
        elif not probabilities:
            values = np.exp(values - values.max(-1, keepdims=True))
            values /= values.sum(-1, keepdims=True)
        return (np.concatenate([1.0 - values, values], -1) if self._binary else values).astype(np.float32)

    def __call__(self, outputs) -> dict[str, tf.Tensor]:
        scores = self.scores(outputs)
        classes = tf.tile(tf.constant([self.labels]), [tf.shape(scores)[0], 1])
        return {"classes": classes, "scores": scores}


def _two_columns(p):
    return tf.concat([1.0 - p, p], axis=-1)


# (one output column, logits) -> outputs to scores
_FUNCTIONS: dict[tuple[bool, bool], Callable] = {
    (False, True): tf.nn.softmax,
    (False, False): tf.identity,
    (True, True): lambda logits: _two_columns(tf.sigmoid(logits)),
    (True, False): _two_columns,
}

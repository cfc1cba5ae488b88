"""`task="classify"`: strings in (or a model's own inputs), class names and scores out.

Text is tokenised inside the graph and padded to the longest row of the batch, not to a fixed length: a short request
pays for its own tokens only. Where a model's answer depends on the padded length (FNet mixes padding into every
position), the export keeps the fixed length and the manifest says so.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.export import savedmodel
from tfvllm.generation.text import byte_pair_codec
from tfvllm.models.heads import head_of, look

ATOL = 1e-5  # scores against the model's own padded preprocessing

# What every text export is compared on: short, long, empty, accented, Chinese, punctuation, a zero byte.
PROBES = (
    "a fine and moving film",
    "no",
    "",
    "It is not that the plot fails; it is that nobody, least of all the director, seems to have cared whether it did. "
    * 3,
    "很好的酒店，服务周到，下次还来！",
    "café déjà vu — naïve?! ¯\\_(ツ)_/¯",
    "tab\tand\nline\x00zero",
)


def export_task(
    model,
    directory: Path,
    *,
    labels: list[str] | None = None,
    max_length: int | None = None,
    precision: str = "float32",
    from_logits: bool | None = None,
    pad_to_multiple: int = 1,
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

    Signatures: `serving_default` (predict) gives `classes` string[batch, n] and `scores` float32[batch, n];
    `classify` takes `inputs` string[batch], serialised `tf.Example`s, with TF Serving's classify method.
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
        if max_length is not None:
            raise InputError("max_length needs a model with a preprocessor (a tokenizer); this model has none.")
        return _export_plain(model, directory, head)
    return _export_text(model, preprocessor, directory, head, max_length, pad_to_multiple)


# --- text -------------------------------------------------------------------------------------------------------------


def _export_text(model, preprocessor, directory, head, max_length, multiple) -> dict[str, Any]:
    features = TextFeatures(model, preprocessor, max_length)
    expected = head.own(model(features.own(tf.constant(PROBES)), training=False))
    features.choose_padding(model, head, expected, multiple)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def serving_default(text):
        return head(model(features(text), training=False))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def classify(inputs):
        parsed = tf.io.parse_example(inputs, {"text": tf.io.FixedLenFeature([], tf.string)})
        return serving_default(parsed["text"])  # a call, so that the graph and the vocabulary are stored once

    module = features.held_by(model)
    savedmodel.save(
        module,
        {"serving_default": serving_default.get_concrete_function(), "classify": classify.get_concrete_function()},
        directory,
        {"classify": savedmodel.CLASSIFY},
    )
    text = np.array([probe.encode() for probe in PROBES], object)
    return {
        "labels": head.labels,
        "max_length": features.max_length,
        "padding": features.padding,
        "check": {
            "signature": "serving_default",
            "inputs": {"text": text},
            "expected": {"scores": expected},
            "atol": ATOL,
        },
        "warmup": _text_warmup(features.max_length),
    }


def _text_warmup(max_length: int) -> list[dict]:
    sentence = "the film was not as bad as everyone said it would be and I liked it a lot"
    long_text = " ".join([sentence] * math.ceil(max_length / len(sentence.split())))
    rows = [PROBES[0], PROBES[1], sentence, long_text]
    return [
        {"signature_name": "serving_default", "inputs": {"text": np.array([row.encode() for row in batch], object)}}
        for batch in ([PROBES[0]], [sentence], [long_text], rows, rows * 2)
    ] + [
        {"signature_name": "classify", "method": "classify", "examples": [example_of(row) for row in batch]}
        for batch in ([sentence], rows)
    ]


def example_of(text: str) -> bytes:
    """A serialised tf.Example with the feature `text`."""
    feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()]))
    return tf.train.Example(features=tf.train.Features(feature={"text": feature})).SerializeToString()


class TextFeatures:
    """A keras-nlp text preprocessor as plain TensorFlow and TensorFlow Text ops.

    `own(text)` is the model's own preprocessing at `max_length`; calling the object gives the same features padded to
    the longest row of the batch, once `choose_padding` has found that the model's scores do not depend on it.
    """

    def __init__(self, model, preprocessor, max_length: int | None = None):
        self.preprocessor = preprocessor
        max_length = max_length or getattr(preprocessor, "sequence_length", None)
        if max_length is None:
            raise InputError(
                f"{type(preprocessor).__name__} has no sequence_length; expected a text classifier's preprocessor. "
                "Pass max_length=..., or export the model without its preprocessor."
            )
        self.max_length = int(max_length)
        limit = getattr(getattr(model, "backbone", None), "max_sequence_length", None)
        if limit is not None and self.max_length > limit:
            raise InputError(
                f"max_length is {self.max_length}, but the model has positions for {limit} tokens. "
                f"Pass max_length={limit} or less."
            )
        if preprocessor.packer is None:
            preprocessor.build(None)
        self.packer = preprocessor.packer
        # keras-nlp's byte-pair tokenizer keeps each word it has met in a mutable table, which would grow with every
        # request of a server; the codec gives the same tokens from static tables.
        self._codec = byte_pair_codec(preprocessor.tokenizer)
        self._tokenize = preprocessor.tokenizer if self._codec is None else self._codec.encode
        self.keys = sorted(keras.tree.map_structure(lambda _: None, preprocessor(["a"])))
        self.padding: dict[str, Any] = {"to": "max_length", "length": self.max_length}
        self._multiple: int | None = None
        special = len(self.packer.start_value or ()) + len(self.packer.end_value or ())
        if self.max_length <= special:
            raise InputError(f"max_length is {self.max_length}, but {special} tokens of it are special. Pass more.")

    def __call__(self, text) -> dict[str, tf.Tensor]:
        """`text` string[batch] to features int32/bool[batch, length]."""
        return self.fixed(text) if self._multiple is None else self.dynamic(text, self._multiple)

    def held_by(self, model) -> tf.Module:
        """A module that owns what the graph of `model` behind these features reads, for `savedmodel.save`."""
        if self._codec is None:
            return savedmodel.weights_module(model, self.preprocessor, self.preprocessor.tokenizer)
        module = savedmodel.weights_module(model)
        unused = {id(table) for table in savedmodel.resources(self.preprocessor, self.preprocessor.tokenizer)}
        module.resources = [table for table in module.resources if id(table) not in unused]
        module.codec = self._codec
        return module

    def choose_padding(self, model, head, expected: np.ndarray, multiple: int) -> None:
        """Pads to the longest row from now on, if that leaves the scores of the probes as they are."""
        alone = [[probe] for probe in PROBES]
        try:
            scores = [
                head.scores_of(model(self.dynamic(tf.constant(text), multiple), training=False)) for text in alone
            ]
        except Exception as error:
            self.padding["reason"] = f"the model does not take other lengths: {type(error).__name__}"
            return
        difference = float(np.max(np.abs(np.concatenate(scores) - expected)))
        if difference > ATOL or math.isnan(difference):
            self.padding["reason"] = f"the scores depend on the padded length (by {difference:.2g})"
            return
        self._multiple = multiple
        self.padding = {"to": "longest", "up_to": self.max_length, "multiple": multiple, "error": difference}

    def own(self, text) -> dict[str, tf.Tensor]:
        """The model's own preprocessor, run as in a tf.data pipeline, at `max_length`.

        A byte-pair tokenizer is asked for plain lists instead: in a pipeline it gives -1, which no model takes, for
        what its vocabulary lacks, and leaves it out (as the export does) otherwise. Both graphs end a text at a zero
        byte.
        """
        preprocessor, length = self.preprocessor, self.preprocessor.sequence_length
        preprocessor.sequence_length = self.max_length
        try:
            if self._codec is not None:
                return preprocessor([row.decode().split("\0")[0] for row in text.numpy()])
            return tf.function(lambda x: preprocessor(x))(text)
        finally:
            preprocessor.sequence_length = length

    def fixed(self, text) -> dict[str, tf.Tensor]:
        """The same features as `own`, padded to `max_length`."""
        return self._pack(text, tf.constant(self.max_length, tf.int64))

    def dynamic(self, text, multiple: int = 1) -> dict[str, tf.Tensor]:
        """The same, padded to the longest row rounded up to `multiple`, at most `max_length`."""
        return self._pack(text, multiple)

    @tf.function
    def _pack(self, text, length) -> dict[str, tf.Tensor]:
        # Same as MultiSegmentPacker for one segment: both of its truncation rules then keep the first tokens.
        packer = self.packer
        tokens = self._tokenize(text)
        if not isinstance(tokens, tf.RaggedTensor):
            raise InputError(
                "the tokenizer pads its rows (its sequence_length is set); expected ragged rows. "
                "Make the tokenizer without sequence_length."
            )
        start, end = list(packer.start_value or ()), list(packer.end_value or ())
        pad = packer.pad_value or 0
        # Few ops, for a short text costs little more than its ops: rows are padded and cut in one, and the end tokens
        # written over what stands behind each row.
        splits = tokens.row_splits
        counts = tf.minimum(splits[1:] - splits[:-1], self.max_length - len(start) - len(end))
        rows = tf.size(counts, tf.int64)
        if isinstance(length, int):
            longest = tf.maximum(tf.reduce_max(counts) + (len(start) + len(end)), 1)  # of no rows the least int64
            length = tf.minimum(longest if length == 1 else -(-longest // length) * length, self.max_length)
        ids = tokens.to_tensor(default_value=pad, shape=tf.stack([rows, length - len(start)]))
        if start:
            ids = tf.concat([tf.fill([rows, 1], tf.constant(value, ids.dtype)) for value in start] + [ids], axis=1)
        places = tf.range(length)
        for i, value in enumerate(end):
            here = places == (counts + (len(start) + i))[:, tf.newaxis]
            ids = tf.where(here, tf.constant(value, ids.dtype), ids)
        ids.set_shape([None, None])
        values = {
            "token_ids": ids,
            "padding_mask": ids != pad,
            "segment_ids": tf.zeros_like(ids),
        }
        unknown = set(self.keys) - set(values)
        if unknown:
            raise InputError(
                f"{type(self.preprocessor).__name__} makes {', '.join(sorted(unknown))}, unknown to the export; "
                "expected token_ids, padding_mask and segment_ids. Export the model without its preprocessor."
            )
        return {key: values[key] for key in self.keys}


# --- any Keras model --------------------------------------------------------------------------------------------------


def _export_plain(model, directory, head) -> dict[str, Any]:
    inputs = _model_inputs(model)
    names = [name for name, _, _ in inputs]
    structure = getattr(model, "_inputs_struct", None)
    if structure is None:
        structure = model.inputs[0] if len(inputs) == 1 else list(model.inputs)

    def call(tensors: dict[str, tf.Tensor]):
        return head(model(keras.tree.pack_sequence_as(structure, [tensors[name] for name in names]), training=False))

    specs = {name: tf.TensorSpec([None, *shape], dtype, name=name) for name, shape, dtype in inputs}
    predict = tf.function(lambda **tensors: call(tensors))
    signatures = {"serving_default": predict.get_concrete_function(**specs)}
    methods = {}
    features = {name: _feature(name, shape, dtype) for name, shape, dtype in inputs}
    if all(feature is not None for feature in features.values()):

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
        def classify(inputs):
            parsed = tf.io.parse_example(inputs, features)
            return predict(**{name: _from_example(parsed[name], specs[name]) for name in names})

        signatures["classify"] = classify.get_concrete_function()
        methods["classify"] = savedmodel.CLASSIFY

    savedmodel.save(savedmodel.weights_module(model), signatures, directory, methods)
    probe = {name: _probe(shape, dtype) for name, shape, dtype in inputs}
    entries: dict[str, Any] = {"labels": head.labels}
    if all(value is not None for value in probe.values()):
        flat = [tf.constant(probe[name]) for name in names]
        expected = head.own(model(keras.tree.pack_sequence_as(structure, flat), training=False))
        entries["check"] = {
            "signature": "serving_default",
            "inputs": probe,
            "expected": {"scores": expected},
            "atol": ATOL,
        }
        one = {name: value[:1] for name, value in probe.items() if value is not None}
        entries["warmup"] = [{"signature_name": "serving_default", "inputs": batch} for batch in (one, probe)]
    return entries


def _model_inputs(model) -> list[tuple[str, list[int | None], tf.DType]]:
    try:
        inputs = list(model.inputs or ())
    except (AttributeError, ValueError):
        inputs = []
    if not inputs:
        raise InputError(
            f"{type(model).__name__} does not say what it reads; expected a functional or built Sequential model. A "
            "subclassed model never does: wrap it, inputs = keras.Input(shape), keras.Model(inputs, model(inputs))."
        )
    return [
        (tensor.name, list(tensor.shape[1:]), tf.as_dtype(keras.backend.standardize_dtype(tensor.dtype)))
        for tensor in inputs
    ]


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


def _probe(shape: list[int | None], dtype: tf.DType) -> np.ndarray | None:
    full = [3, *(size or 5 for size in shape)]
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
        outputs = keras.tree.flatten(getattr(model, "outputs", None) or getattr(model, "output", None) or [])
        if len(outputs) != 1 or len(outputs[0].shape) != 2 or outputs[0].shape[-1] is None:
            if not outputs:
                _model_inputs(model)  # says what to do with a model that does not know its inputs
            shapes = ", ".join(str(tuple(output.shape)) for output in outputs) or "none known"
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

    def scores_of(self, outputs) -> np.ndarray:
        return self.scores(outputs).numpy()

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

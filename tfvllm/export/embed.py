"""`task="embed"`: one vector for each text (or row of ids), from any keras-nlp backbone.

The backbone's token outputs are pooled over the real tokens only, so that an answer does not depend on what else is in
the batch, and scaled to unit length: dot products are then cosines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.export import savedmodel
from tfvllm.export.classify import PROBES, TextFeatures

POOLINGS = ("mean", "max", "first", "last")
_ATOL = 1e-4


def export_task(
    model,
    directory: Path,
    *,
    preprocessor=None,
    max_length: int | None = None,
    pooling: str = "mean",
    normalize: bool = True,
) -> dict[str, Any]:
    """Writes the SavedModel of a text embedder into `directory` and returns its manifest entries.

    Args:
        model: a keras-nlp backbone, or a task that has one.
        directory: an existing, empty folder.
        preprocessor: a keras-nlp text preprocessor with one segment; default the model's own. Without one the export
            takes `token_ids` and `padding_mask`, int32[batch, length].
        max_length: tokens kept of each text, special tokens included; default the preprocessor's sequence length.
        pooling: "mean", "max", "first" (BERT's [CLS]) or "last", over the real tokens.
        normalize: scale each vector to Euclidean length 1.

    Signature: `serving_default` (text string[batch] -> embeddings float32[batch, width]). A row without any token gets
    zeros.
    """
    if pooling not in POOLINGS:
        raise InputError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}.")
    backbone = getattr(model, "backbone", model)
    inputs = {tensor.name for tensor in getattr(backbone, "inputs", None) or ()}
    if "token_ids" not in inputs or inputs - {"token_ids", "padding_mask", "segment_ids"}:
        raise InputError(
            f"{type(backbone).__name__} takes {', '.join(sorted(inputs)) or 'unknown inputs'}; expected a text "
            "backbone with token_ids and, if it has them, padding_mask and segment_ids."
        )
    preprocessor = preprocessor or getattr(model, "preprocessor", None)

    def embed(features):
        outputs = backbone({name: features[name] for name in inputs}, training=False)
        if isinstance(outputs, dict):
            outputs = outputs["sequence_output"]
        vectors = pool(tf.cast(outputs, tf.float32), tf.cast(features["padding_mask"], tf.bool), pooling)
        return tf.math.l2_normalize(vectors, axis=-1, epsilon=1e-24) if normalize else vectors

    if preprocessor is None:
        if max_length is not None:
            raise InputError("max_length needs a preprocessor (a tokenizer); this model has none.")
        signature, entries = _from_ids(embed)
        module = savedmodel.weights_module(backbone)
    else:
        features = TextFeatures(backbone, preprocessor, max_length)
        signature, entries = _from_text(embed, features)
        module = features.held_by(backbone)
    savedmodel.save(module, {"serving_default": signature}, directory)
    return {"pooling": pooling, "normalized": normalize, **entries}


def pool(outputs: tf.Tensor, mask: tf.Tensor, pooling: str) -> tf.Tensor:
    """outputs float32[batch, length, width], mask bool[batch, length] -> float32[batch, width]; no token: zeros."""
    weights = tf.cast(mask, tf.float32)[..., tf.newaxis]
    if pooling == "mean":
        return tf.reduce_sum(outputs * weights, axis=1) / tf.maximum(tf.reduce_sum(weights, axis=1), 1.0)
    some = tf.reduce_any(mask, axis=1, keepdims=True)
    if pooling == "max":
        highest = tf.reduce_max(tf.where(mask[..., tf.newaxis], outputs, outputs.dtype.min), axis=1)
        return tf.where(some, highest, 0.0)
    places = tf.range(tf.shape(mask)[1])
    wanted = tf.where(mask, places, -1)
    index = (
        tf.reduce_max(wanted, axis=1)
        if pooling == "last"
        else tf.argmax(tf.cast(mask, tf.int32), axis=1, output_type=tf.int32)
    )
    chosen = tf.cast(places == index[:, tf.newaxis], tf.float32)[..., tf.newaxis]
    return tf.where(some, tf.reduce_sum(outputs * chosen, axis=1), 0.0)


def _from_text(embed, features: TextFeatures):
    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")], autograph=False)
    def serving_default(text):
        return {"embeddings": embed(_with_mask(features.dynamic(text)))}

    # Held against the model's own preprocessing, padded to its full length.
    expected = embed(_with_mask(features.own(tf.constant(PROBES)))).numpy()
    text = np.array([probe.encode() for probe in PROBES], object)
    check = {"inputs": {"text": text}, "expected": {"embeddings": expected}, "atol": _ATOL}
    warmup = [{"signature_name": "serving_default", "inputs": {"text": text[:count]}} for count in (1, len(text))]
    entries = {"max_length": features.max_length, "interface": "text"}
    return serving_default, {**entries, "check": {"signature": "serving_default", **check}, "warmup": warmup}


def _from_ids(embed):
    spec = tf.TensorSpec([None, None], tf.int32)

    @tf.function(autograph=False)
    def serving_default(token_ids, padding_mask):
        features = {"token_ids": token_ids, "padding_mask": padding_mask, "segment_ids": tf.zeros_like(token_ids)}
        return {"embeddings": embed(features)}

    mask = (np.arange(6) < np.array([[6], [3]])).astype(np.int32)
    inputs = {"token_ids": np.arange(12, dtype=np.int32).reshape(2, 6) % 5 * mask, "padding_mask": mask}
    features = {**inputs, "segment_ids": np.zeros_like(mask)}
    expected = embed({name: tf.constant(value) for name, value in features.items()}).numpy()
    check = {"inputs": inputs, "expected": {"embeddings": expected}, "atol": _ATOL, "signature": "serving_default"}
    signature = serving_default.get_concrete_function(
        token_ids=tf.TensorSpec(spec.shape, spec.dtype, name="token_ids"),
        padding_mask=tf.TensorSpec(spec.shape, spec.dtype, name="padding_mask"),
    )
    warmup = [{"signature_name": "serving_default", "inputs": inputs}]
    return signature, {"interface": "ids", "check": check, "warmup": warmup}


def _with_mask(features: dict) -> dict:
    if "padding_mask" not in features:
        return {**features, "padding_mask": keras.ops.ones_like(features["token_ids"])}
    return {"segment_ids": tf.zeros_like(features["token_ids"]), **features}

"""`task="embed"`: one vector for each text (or row of ids), from any keras-nlp encoder.

The backbone's token outputs are pooled over the real tokens only, so that an answer does not depend on what else is in
the batch, and scaled to unit length: dot products are then cosines. A keras-nlp `TextEmbedder` answers as it does in
Keras.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.export import float32
from tfvllm.export.text import TextFeatures
from tfvllm.families.relative_positions import exact_positions
from tfvllm.models import tokenizer as tokenizers
from tfvllm.savedmodel import write

POOLINGS = ("mean", "max", "first", "last")
_ATOL = 1e-4  # of the largest magnitude, or of 1
_OF_KERAS = {"mean": "mean", "max": "max", "cls": "first", "last": "last"}


def export_task(
    model,
    directory: Path,
    *,
    preprocessor=None,
    max_length: int | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    tokenizer: str | Mapping[str, bool] | None = None,
) -> dict[str, Any]:
    """Writes the SavedModel of a text embedder into `directory` and returns its manifest entries.

    Args:
        model: a keras-nlp backbone, or a task that has one.
        directory: an existing, empty folder.
        preprocessor: a keras-nlp text preprocessor with one segment; default the model's own. Without one the export
            takes `token_ids` and `padding_mask`, int32[batch, length].
        max_length: tokens kept of each text, special tokens included; default the preprocessor's sequence length.
        pooling: "mean", "max", "first" (BERT's [CLS]) or "last", over the real tokens; default what a TextEmbedder
            does, else what the sentence-transformers folder says that the tokenizer was read from, else "mean".
        normalize: scale each vector to Euclidean length 1; default as for `pooling`, else True.
        tokenizer: settings such as {"strip_accents": True} to tokenise with, or "as is"; default those of the Hugging
            Face folder the tokenizer was read from, where it was.

    Signature: `serving_default` (text string[batch] -> embeddings float32[batch, width]). A row without any token gets
    zeros.
    """
    if pooling is not None and pooling not in POOLINGS:
        raise InputError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}.")
    backbone = getattr(model, "backbone", model)
    inputs = {tensor.name for tensor in getattr(backbone, "inputs", None) or ()}
    if "token_ids" not in inputs or inputs - {"token_ids", "padding_mask", "segment_ids"}:
        raise InputError(
            f"{type(backbone).__name__} takes {', '.join(sorted(inputs)) or 'unknown inputs'}; expected a text "
            "backbone with token_ids and, if it has them, padding_mask and segment_ids."
        )
    preprocessor = preprocessor or getattr(model, "preprocessor", None)
    embed, how = _embedding(model, backbone, inputs, pooling, normalize, getattr(preprocessor, "tokenizer", None))
    if preprocessor is None:
        if max_length is not None or tokenizer is not None:
            given = "tokenizer" if max_length is None else "max_length"
            raise InputError(f"{given} needs a preprocessor (a tokenizer); this model has none.")
        signature, entries = _from_ids(embed, backbone)
        module = write.weights_module(backbone, model)
    else:
        features = TextFeatures(model, preprocessor, max_length, tokenizer=tokenizer)
        signature, entries = _from_text(embed, features, model)
        module = features.held_by(model)
    write.save(module, {"serving_default": signature}, directory)
    return {**how, **entries}


def _embedding(model, backbone, inputs, pooling, normalize, tokenizer) -> tuple[Callable, dict[str, Any]]:
    """A function from features to vectors float32[batch, width], and what the manifest says of it."""
    from keras_hub.models import TextEmbedder

    if isinstance(model, TextEmbedder):
        if pooling is None and normalize is None:
            how = {"pooling": getattr(model, "pooling_mode", None), "normalized": getattr(model, "normalize", None)}
            return lambda found: tf.cast(model({n: found[n] for n in inputs}, training=False), tf.float32), how
        stated = {"pooling": _OF_KERAS.get(getattr(model, "pooling_mode", "")), "normalize": model.normalize}
    else:
        stated = _sentence_transformer(tokenizer)
    pooling = pooling or stated.get("pooling") or "mean"
    normalize = stated.get("normalize", True) if normalize is None else normalize

    def embed(features):
        outputs = backbone({name: features[name] for name in inputs}, training=False)
        if isinstance(outputs, dict):
            outputs = outputs["sequence_output"]
        vectors = pool(tf.cast(outputs, tf.float32), tf.cast(features["padding_mask"], tf.bool), pooling)
        return tf.math.l2_normalize(vectors, axis=-1, epsilon=1e-24) if normalize else vectors

    return embed, {"pooling": pooling, "normalized": normalize}


def _sentence_transformer(tokenizer) -> dict[str, Any]:
    """Pooling and normalization of the sentence-transformers folder that a tokenizer was read from; {}: none known."""
    folder, _ = tokenizers.source(tokenizer)
    if folder is None or not (folder / "1_Pooling" / "config.json").is_file():
        return {}
    modes = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    names = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "first",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_lasttoken": "last",
    }
    on = [name for name, value in modes.items() if name.startswith("pooling_mode_") and value is True]
    if len(on) != 1 or on[0] not in names:
        raise InputError(
            f"{folder.name}/1_Pooling pools by {', '.join(on) or 'nothing'}; expected one of {', '.join(names)}. "
            "Pass pooling=..."
        )
    stated: dict[str, Any] = {"pooling": names[on[0]]}
    if (folder / "modules.json").is_file():
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        stated["normalize"] = any("Normalize" in module.get("type", "") for module in modules)
    return stated


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


def _from_text(embed, features: TextFeatures, model):
    def answer(found):
        return {"embeddings": embed(_with_segments(features.with_mask(found)))}

    # Held against the model's own preprocessing, padded to its full length.
    probes = features.probes
    expected = {"embeddings": answer(features.own(*probes.values()))["embeddings"].numpy()}
    tolerance = _tolerance(model, expected["embeddings"])
    serving_default = features.serve(answer, expected, tolerance)
    check = {"signature": "serving_default", "inputs": probes, "expected": expected, **tolerance}
    batches = ({name: rows[:count] for name, rows in probes.items()} for count in (1, len(probes["text"])))
    warmup = [{"signature_name": "serving_default", "inputs": batch} for batch in batches]
    signature = serving_default.get_concrete_function()
    return signature, {"interface": "text", **features.entries(), "check": check, "warmup": warmup}


def _from_ids(embed, backbone):
    limit = getattr(backbone, "max_sequence_length", None) or 64

    @tf.function(autograph=False)
    def serving_default(token_ids, padding_mask):
        features = {"token_ids": token_ids, "padding_mask": padding_mask, "segment_ids": tf.zeros_like(token_ids)}
        with exact_positions(backbone):
            return {"embeddings": embed(features)}

    def traced(length):
        names = ("token_ids", "padding_mask")
        return serving_default.get_concrete_function(
            **{name: tf.TensorSpec([None, length], tf.int32, name=name) for name in names}
        )

    def rows(length):
        mask = (np.arange(length) < np.array([[length], [length // 2]])).astype(np.int32)
        ids = np.arange(2 * length, dtype=np.int32).reshape(2, length) % 5 * mask
        inputs = {"token_ids": ids, "padding_mask": mask}
        features = {"segment_ids": tf.zeros_like(ids)} | {name: tf.constant(value) for name, value in inputs.items()}
        return inputs, {"embeddings": embed(features).numpy()}

    inputs, expected = rows(limit)
    tolerance = _tolerance(backbone, expected["embeddings"])
    signature = traced(None)
    entries: dict[str, Any] = {"interface": "ids"}
    found = signature(**{name: tf.constant(value) for name, value in inputs.items()})["embeddings"].numpy()
    if not np.allclose(found, expected["embeddings"], rtol=tolerance["rtol"], atol=tolerance["atol"]):
        signature = traced(limit)
        entries["notes"] = [
            f"the graph of {type(backbone).__name__} is wrong where the length is unknown: rows must be {limit} long"
        ]
    check = {"inputs": inputs, "expected": expected, **tolerance, "signature": "serving_default"}
    warmup = [{"signature_name": "serving_default", "inputs": inputs}]
    return signature, {**entries, "check": check, "warmup": warmup}


def _tolerance(model, expected: np.ndarray) -> dict[str, float]:
    tolerance = float32.tolerance(model, _ATOL)
    return {**tolerance, "atol": tolerance["atol"] * max(1.0, float(np.max(np.abs(expected))))}


def _with_segments(features: dict) -> dict:
    return {"segment_ids": keras.ops.zeros_like(features["token_ids"]), **features}

"""What a teacher says of every token of the training rows, in arrays that training reads a batch of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.compress.batches import Batches, Tokens
from tfvllm.compress.console import Progress
from tfvllm.distillation.cache import TeacherCache
from tfvllm.distillation.teacher_logits import NONE, TopLogits
from tfvllm.families.matmuls import einsum_as_matmul

_PARTS = ("ids", "logits", "log_tails")
_PREFIX = "tfvllm_kept_"  # of entries among a batch's inputs, which the Distiller takes out for the student


class KeptAnswers(TeacherCache):
    """The `top_k` largest logits of each token, and the mass of all others, at one temperature.

    Rows are kept in their own lengths one after the other, 4 to 6 bytes a logit: a batch finds its own by number, so
    that batches are drawn as freely as without a cache. Logits are kept less the largest of their token, which no
    divergence sees, as float16: the probable ones, near 0, are then kept best (those within 4 to 0.002).
    """

    def __init__(self, folder: Path):
        told = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        self.path = folder
        self.temperatures: tuple[float, ...] = (told["temperature"],)
        self.classes: int = told["classes"]
        self.top_k: int = told["top_k"]
        self.rank, self.kind = 3, "logits"
        self.teacher = self.name = "kept"
        self._starts = np.load(folder / "starts.npy")
        self._arrays = {part: np.load(folder / f"{part}.npy", mmap_mode="r") for part in _PARTS}

    def among(self, tokens: Tokens) -> Tokens:
        """The rows with their answers among what is extra."""
        return _Answered(
            tokens.features, tokens.lengths, tokens.labels, {}, tokens.weights, tokens.sources, answers=self
        )

    def of_rows(self, rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """Entries of a batch: arrays [rows, length, …], padded with nothing known."""
        found = {}
        for part, kept in self._arrays.items():
            dtype = "int32" if part == "ids" else "float32"
            padded = np.zeros((len(rows), length, kept.shape[-1]), dtype)
            for at, row in enumerate(rows):
                some = kept[self._starts[row] : self._starts[row + 1]][:length]
                padded[at, : len(some)] = some
            found[_PREFIX + part] = padded
        return found

    def specs(self) -> dict[str, tf.TensorSpec]:
        """Of the entries of a batch."""
        dtypes = {"ids": tf.int32, "logits": tf.float32, "log_tails": tf.float32}
        return {_PREFIX + p: tf.TensorSpec([None, None, self._arrays[p].shape[-1]], dtypes[p]) for p in _PARTS}

    def outputs(self, x: Any) -> TopLogits:
        """The teacher's logits for a batch of `among`."""
        ids, logits, tails = (x[_PREFIX + part] for part in _PARTS)
        return TopLogits(ids, logits, tails, self.temperatures, self.classes, "logits")


class _Answered(Tokens):
    """Rows with answers that are read with the batch."""

    answers: KeptAnswers

    def __init__(self, *fields: Any, answers: KeptAnswers):
        super().__init__(*fields)
        object.__setattr__(self, "answers", answers)

    def batch(self, rows: np.ndarray) -> tuple[Any, ...]:
        features, labels, *weights = super().batch(rows)
        return ({**features, **self.answers.of_rows(rows, labels.shape[1])}, labels, *weights)

    def extra_specs(self) -> dict[str, tf.TensorSpec]:
        return {**super().extra_specs(), **self.answers.specs()}


def write_answers(
    teacher: keras.Model, tokens: Tokens, folder: Path, *, top_k: int, temperature: float, progress: Progress
) -> None:
    """Runs `teacher` once over the rows of `tokens` and keeps what it says in the empty `folder`.

    Args:
        teacher: gives logits [batch, length, classes] for the features of `tokens`.
        temperature: for which the mass of the others is kept.
    """
    classes = int(teacher.output_shape[-1])
    kept = min(top_k, classes)
    starts = np.concatenate([[0], np.cumsum(tokens.lengths)]).astype("int64")
    narrow = "uint16" if classes <= 1 << 16 else "uint32"
    shapes = {"ids": (narrow, kept), "logits": ("float16", kept), "log_tails": ("float32", 1)}
    arrays = {
        part: np.lib.format.open_memmap(folder / f"{part}.npy", "w+", dtype, (int(starts[-1]), width))
        for part, (dtype, width) in shapes.items()
    }
    wanted = list(teacher.input)

    @tf.function(reduce_retracing=True)
    def largest(features: dict[str, tf.Tensor], real: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        with einsum_as_matmul(teacher):
            logits = teacher({name: features[name] for name in wanted}, training=False)
        logits = tf.cast(tf.boolean_mask(logits, real), tf.float32)
        logits -= tf.reduce_max(logits, axis=-1, keepdims=True)
        logits = tf.maximum(logits, tf.float16.min)  # tokens that a teacher rules out, too
        top, ids = tf.math.top_k(logits, kept)
        if kept == classes:
            return ids, top, tf.fill([tf.shape(top)[0], 1], NONE)
        # Of the others: all but the largest, exactly, by taking those out.
        count = tf.shape(top)[0]
        at = tf.stack([tf.repeat(tf.range(count), kept), tf.reshape(ids, [-1])], axis=1)
        others = tf.tensor_scatter_nd_update(logits, at, tf.fill([count * kept], NONE))
        return ids, top, tf.reduce_logsumexp(others / temperature, axis=-1, keepdims=True)

    batches, done = Batches(tokens, 16), 0
    for rows, (features, *_) in zip(batches.rows(), batches):
        length = next(value for name, value in features.items() if not name.startswith("encoder_")).shape[1]
        real = np.arange(length) < tokens.lengths[rows][:, None]
        parts = [part.numpy() for part in largest(features, real)]
        at = 0
        for row in rows:
            size = int(tokens.lengths[row])
            for array, part in zip(arrays.values(), parts):
                array[starts[row] : starts[row] + size] = part[at : at + size]
            at += size
        done += len(rows)
        progress.at(done)
    for array in arrays.values():
        array.flush()
    np.save(folder / "starts.npy", starts)
    told = {"temperature": temperature, "classes": classes, "top_k": kept}
    (folder / "answers.json").write_text(json.dumps(told), encoding="utf-8")


def bytes_of(tokens: Tokens, top_k: int, classes: int) -> int:
    """What `write_answers` will put on the disk."""
    each: Sequence[int] = (2 if classes <= 1 << 16 else 4, 2)
    return int(tokens.lengths.sum()) * (min(top_k, classes) * sum(each) + 4)

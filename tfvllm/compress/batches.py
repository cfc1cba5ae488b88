"""A split of the data as tokens, in batches of like length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.data import Split


@dataclass(frozen=True)
class Tokens:
    """Tokenised sentences.

    Attributes:
        features: the model's inputs, arrays `[examples, max_length]` padded on the right.
        lengths: of the real tokens, `[examples]`.
        labels: `[examples]`, or of each position `[examples, max_length]`.
        extra: what else is known of each example, such as the teacher's logits `[examples, classes]`; where labels are
            of each position, so is what is extra.
        weights: of each position `[examples, max_length]`, 0 where nothing is to be learnt; None: 1 everywhere.
        sources: lengths `[examples]` of what the features `encoder_…` hold; None: they are as long as the others.
    """

    features: dict[str, np.ndarray]
    lengths: np.ndarray
    labels: np.ndarray
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    weights: np.ndarray | None = None
    sources: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def work(self) -> np.ndarray:
        """All tokens of each example, by which batches are made of like ones."""
        return self.lengths if self.sources is None else self.lengths + self.sources

    def batch(self, rows: np.ndarray) -> tuple[Any, ...]:
        """(features, labels) or (features, labels, weights) of some rows, cut to the longest, rounded up to 8."""
        most = next(iter(self.features.values())).shape[1]
        length = _rounded(self.lengths[rows], self.labels.shape[1] if self.labels.ndim > 1 else most)
        source = length if self.sources is None else _rounded(self.sources[rows], most)
        features = {
            name: value[rows, : source if name.startswith("encoder_") else length]
            for name, value in self.features.items()
        }
        each = self.labels.ndim > 1
        features |= {name: value[rows, :length] if each else value[rows] for name, value in self.extra.items()}
        labels = self.labels[rows, :length] if each else self.labels[rows]
        return (features, labels) if self.weights is None else (features, labels, self.weights[rows, :length])

    def arrays(self) -> tuple[Any, ...]:
        """All rows at their full length: (features, labels) or (features, labels, weights)."""
        return (self.features, self.labels) if self.weights is None else (self.features, self.labels, self.weights)

    def extra_specs(self) -> dict[str, tf.TensorSpec]:
        """Of what is extra in a batch."""
        each = self.labels.ndim > 1
        return {
            name: tf.TensorSpec([None, *([None] if each else []), *value.shape[1 + each :]], value.dtype)
            for name, value in self.extra.items()
        }


def _rounded(lengths: np.ndarray, most: int) -> int:
    return min(-(-int(lengths.max()) // 8) * 8, most)


def tokenize(split: Split, preprocessor: Any, *, chunk: int = 4096) -> Tokens:
    """Runs a keras-nlp preprocessor over a split once.

    Rows must be padded on the right for batches to be trimmed to their longest row; with any other padding, batches
    keep their full length.
    """
    parts = [
        {name: np.asarray(value) for name, value in preprocessor(tf.constant(split.texts[i : i + chunk])).items()}
        for i in range(0, len(split), chunk)
    ]
    features = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    mask = features["padding_mask"].astype(bool)
    lengths = mask.sum(axis=1)
    if not np.array_equal(mask, np.arange(mask.shape[1]) < lengths[:, None]):
        lengths = np.full(len(mask), mask.shape[1])
    return Tokens(features, lengths, np.asarray(split.labels, "int32"))


class Batches:
    """Batches of similar length, trimmed to the longest row (rounded up to 8), in an order fixed by seed and epoch.

    Short sentences then cost little: on SST-2, whose phrases have 13 tokens on average, an epoch takes a fifth of the
    time that padding to 66 tokens takes.

    Args:
        change: makes a batch into another, with a random generator of the epoch.
        weights_for: names of the weights that `change` gives, as a dict, in place of one array.
        ahead: batches are made while the step before runs; not where `change` reads the weights that are trained.
    """

    def __init__(
        self,
        tokens: Tokens,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        change: Callable[[tuple[Any, ...], np.random.Generator], tuple[Any, ...]] | None = None,
        ahead: bool = True,
        weights_for: Sequence[str] = (),
    ):
        self.tokens = tokens
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.change = change
        self.ahead = ahead
        self.weights_for = weights_for
        self.epoch = 0  # set before each epoch, so that a resumed run sees the batches it would have seen

    def __len__(self) -> int:
        return math.ceil(len(self.tokens) / self.batch_size)

    def rows(self) -> Iterator[np.ndarray]:
        """The example indices of each batch."""
        if not self.shuffle:
            order = np.argsort(self.tokens.work, kind="stable")
            yield from np.split(order, range(self.batch_size, len(order), self.batch_size))
            return
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.tokens))
        pool = self.batch_size * 64  # sorted by length within a pool only, so that batches differ between epochs
        sorted_order = np.concatenate(
            [
                part[np.argsort(self.tokens.work[part], kind="stable")]
                for part in np.split(order, range(pool, len(order), pool))
            ]
        )
        batches = np.split(sorted_order, range(self.batch_size, len(order), self.batch_size))
        for i in rng.permutation(len(batches)):
            yield batches[i]

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        rng = np.random.default_rng((self.seed, self.epoch, 1))
        for rows in self.rows():
            batch = self.tokens.batch(rows)
            yield batch if self.change is None else self.change(batch, rng)

    def dataset(self) -> tf.data.Dataset:
        """The batches, with unknown batch size and length."""
        tokens = self.tokens
        each = tokens.labels.ndim > 1
        inputs = {name: tf.TensorSpec([None, None], value.dtype) for name, value in tokens.features.items()}
        signature: tuple[Any, ...] = (
            {**inputs, **tokens.extra_specs()},
            tf.TensorSpec([None, None] if each else [None], tokens.labels.dtype),
        )
        if tokens.weights is not None:
            spec = tf.TensorSpec([None, None], tokens.weights.dtype)
            signature += ({name: spec for name in self.weights_for} if self.weights_for else spec,)
        dataset = tf.data.Dataset.from_generator(lambda: iter(self), output_signature=signature)
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(len(self)))
        if self.ahead:
            return dataset.prefetch(2)
        options = tf.data.Options()
        options.experimental_optimization.inject_prefetch = False  # TensorFlow's own
        return dataset.with_options(options)


def random_words(share: float, special: Sequence[int], mask_id: int | None) -> Callable:
    """Augmentation for distillation: replaces a share of the tokens by the mask token or by another token of the batch.

    The teacher judges the changed sentence, so no label is needed (Tang et al. 2019, arXiv:1903.12136, section 4.2).
    Tokens are drawn from the batch itself, that is, by their frequency in the data. Half of the sentences stay as they
    are, and the ids in `special` are never touched.
    """
    kept = np.asarray(list(special))

    def change(batch: tuple[Any, ...], rng: np.random.Generator) -> tuple[Any, ...]:
        features, *others = batch
        ids = features["token_ids"]
        free = ~np.isin(ids, kept) & features["padding_mask"].astype(bool)
        pool = ids[free]
        if not pool.size:
            return batch
        # half of the sentences stay as they are: the student is to meet real ones too
        chosen = free & (rng.random(ids.shape) < share) & (rng.random((len(ids), 1)) < 0.5)
        new = rng.choice(pool, ids.shape)
        if mask_id is not None:
            new = np.where(rng.random(ids.shape) < 0.5, mask_id, new)
        return ({**features, "token_ids": np.where(chosen, new, ids).astype(ids.dtype)}, *others)

    return change


def typed(features: dict) -> dict:
    return {
        name: tf.constant(value, tf.bool if name == "padding_mask" else tf.int32) for name, value in features.items()
    }

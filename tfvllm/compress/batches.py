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
    """Tokenised sentences: model inputs as arrays `[examples, max_length]`, true lengths and labels `[examples]`.

    `extra` holds what else is known of each example, such as the teacher's logits `[examples, classes]`.
    """

    features: dict[str, np.ndarray]
    lengths: np.ndarray
    labels: np.ndarray
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)


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
    """

    def __init__(
        self,
        tokens: Tokens,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        change: Callable[[dict, np.random.Generator], dict] | None = None,
    ):
        self.tokens = tokens
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.change = change
        self.epoch = 0  # set before each epoch, so that a resumed run sees the batches it would have seen

    def __len__(self) -> int:
        return math.ceil(len(self.tokens) / self.batch_size)

    def rows(self) -> Iterator[np.ndarray]:
        """The example indices of each batch."""
        if not self.shuffle:
            order = np.argsort(self.tokens.lengths, kind="stable")
            yield from np.split(order, range(self.batch_size, len(order), self.batch_size))
            return
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.tokens))
        pool = self.batch_size * 64  # sorted by length within a pool only, so that batches differ between epochs
        sorted_order = np.concatenate(
            [
                part[np.argsort(self.tokens.lengths[part], kind="stable")]
                for part in np.split(order, range(pool, len(order), pool))
            ]
        )
        batches = np.split(sorted_order, range(self.batch_size, len(order), self.batch_size))
        for i in rng.permutation(len(batches)):
            yield batches[i]

    def __iter__(self) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        rng = np.random.default_rng((self.seed, self.epoch, 1))
        for rows in self.rows():
            longest = int(self.tokens.lengths[rows].max())
            length = min(-(-longest // 8) * 8, next(iter(self.tokens.features.values())).shape[1])
            features = {name: value[rows, :length] for name, value in self.tokens.features.items()}
            if self.change is not None:
                features = self.change(features, rng)
            features |= {name: value[rows] for name, value in self.tokens.extra.items()}
            yield features, self.tokens.labels[rows]

    def dataset(self) -> tf.data.Dataset:
        """The batches as `(features, labels)` with unknown batch size and length."""
        inputs = {name: tf.TensorSpec([None, None], value.dtype) for name, value in self.tokens.features.items()}
        extra = {
            name: tf.TensorSpec([None, *value.shape[1:]], value.dtype) for name, value in self.tokens.extra.items()
        }
        signature = ({**inputs, **extra}, tf.TensorSpec([None], tf.int32))
        dataset = tf.data.Dataset.from_generator(lambda: iter(self), output_signature=signature)
        return dataset.apply(tf.data.experimental.assert_cardinality(len(self))).prefetch(2)


def random_words(share: float, special: Sequence[int], mask_id: int | None) -> Callable:
    """Augmentation for distillation: replaces a share of the tokens by the mask token or by another token of the batch.

    The teacher judges the changed sentence, so no label is needed (Tang et al. 2019, arXiv:1903.12136, section 4.2).
    Tokens are drawn from the batch itself, that is, by their frequency in the data. Half of the sentences stay as they
    are, and the ids in `special` are never touched.
    """
    kept = np.asarray(list(special))

    def change(features: dict, rng: np.random.Generator) -> dict:
        ids = features["token_ids"]
        free = ~np.isin(ids, kept) & features["padding_mask"].astype(bool)
        pool = ids[free]
        if not pool.size:
            return features
        # half of the sentences stay as they are: the student is to meet real ones too
        chosen = free & (rng.random(ids.shape) < share) & (rng.random((len(ids), 1)) < 0.5)
        new = rng.choice(pool, ids.shape)
        if mask_id is not None:
            new = np.where(rng.random(ids.shape) < 0.5, mask_id, new)
        return {**features, "token_ids": np.where(chosen, new, ids).astype(ids.dtype)}

    return change


def typed(features: dict) -> dict:
    return {
        name: tf.constant(value, tf.bool if name == "padding_mask" else tf.int32) for name, value in features.items()
    }

"""From logits to a token: penalties, temperature, top-k, top-p and the draw. Pure functions of tensors, stock ops only.

All take float32[rows, vocabulary] logits. A draw uses one uniform number per row and token (inverse of the cumulative
distribution), made before generation starts from `seed` alone: the same seed gives the same tokens
whatever finishes first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError

# How many of the most probable tokens top-p looks at before it sorts the whole vocabulary.
_NUCLEUS = 256


@dataclasses.dataclass
class SamplingParams:
    """How tokens are chosen; scalar tensors (or Python numbers) that may differ from call to call.

    Python numbers that make no sense raise an InputError here; tensors are looked at when they are used, see `valid`.

    temperature: float32. 0 (a tensor: or less) means greedy: always the most probable token.
    top_k: int32. Only the k most probable tokens; 0 means all.
    top_p: float32. Then only the fewest tokens that together reach this share of the probability; the most probable one
        always stays, so 0 is greedy; 1 means all (Holtzman et al. 2020).
    repetition_penalty: float32, above 0. Logits of tokens already in the row are divided by it where positive, and
        multiplied where negative (Keskar et al. 2019, section 4.1); 1 means none.
    no_repeat_ngram: int32. No run of this many tokens occurs twice in a row; 0 means no such rule.
    seed: int32.
    """

    temperature: tf.Tensor | float = 0.0
    top_k: tf.Tensor | int = 0
    top_p: tf.Tensor | float = 1.0
    repetition_penalty: tf.Tensor | float = 1.0
    no_repeat_ngram: tf.Tensor | int = 0
    seed: tf.Tensor | int = 0

    def __post_init__(self):
        for name, (holds, wanted) in _WANTED.items():
            value = getattr(self, name)
            if isinstance(value, (int, float, np.number)) and not holds(value):
                raise InputError(f"{name} must be {wanted}; got {value!r}.")


# Comparisons with NaN are false.
_WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: 0.0 <= value < math.inf, "a number, 0 (greedy) or more"),
    "top_k": (lambda value: value >= 0, "0 (all) or more"),
    "top_p": (lambda value: 0.0 <= value <= 1.0, "from 0 (greedy) to 1 (all)"),
    "repetition_penalty": (lambda value: 0.0 < value < math.inf, "a number above 0 (1: no penalty)"),
    "no_repeat_ngram": (lambda value: value >= 0, "0 (no such rule) or more"),
}


def valid(controls: SamplingParams) -> list[tf.Operation]:
    """Assertions for the graph: what would make every logit NaN is refused, not answered."""
    numbers = {name: tf.convert_to_tensor(getattr(controls, name), tf.float32) for name in ("temperature", "top_p")}
    penalty = tf.convert_to_tensor(controls.repetition_penalty, tf.float32)
    asserted = [
        tf.debugging.Assert(~tf.math.is_nan(value), [f"{name} must be a number; got", value])
        for name, value in numbers.items()
    ]
    meant = (penalty > 0.0) & tf.math.is_finite(penalty)
    asserted.append(tf.debugging.Assert(meant, ["repetition_penalty must be a number above 0; got", penalty]))
    return [operation for operation in asserted if operation is not None]  # None where it was asserted at once


def uniforms(seed, rows, length) -> tf.Tensor:
    """float32[rows, length] in [0, 1), a function of `seed` and the place alone."""
    seed = tf.stack([tf.cast(seed, tf.int32), 0])
    return tf.random.stateless_uniform(tf.stack([rows, length]), seed)


def sample_next(logits: tf.Tensor, uniform: tf.Tensor, controls: SamplingParams) -> tf.Tensor:
    """int32[rows]: the next token of each row. uniform float32[rows]."""
    temperature = tf.convert_to_tensor(controls.temperature, tf.float32)
    greedy = (temperature <= 0.0) | (tf.convert_to_tensor(controls.top_p, tf.float32) <= 0.0)
    return tf.cond(
        greedy,
        lambda: tf.argmax(logits, axis=-1, output_type=tf.int32),
        lambda: sample(logits / temperature, uniform, controls.top_k, controls.top_p),
    )


def sample(logits: tf.Tensor, uniform: tf.Tensor, top_k=0, top_p=1.0) -> tf.Tensor:
    """Draws from softmax(logits) cut by top-k, then by top-p of what top-k left. -> int32[rows]."""
    vocabulary = tf.shape(logits)[-1]
    top_k = tf.convert_to_tensor(top_k, tf.int32)
    top_p = tf.convert_to_tensor(top_p, tf.float32)

    def from_sorted(count):
        values, ids = tf.math.top_k(logits, count)
        return tf.gather(ids, draw(nucleus(tf.nn.softmax(values), top_p), uniform), batch_dims=1)

    def from_nucleus():
        # The most probable few usually hold the whole nucleus; their exact shares need the full sum, not the full sort.
        count = tf.minimum(vocabulary, _NUCLEUS)
        values, ids = tf.math.top_k(logits, count)
        shares = tf.exp(values - tf.reduce_logsumexp(logits, axis=-1, keepdims=True))
        enough = tf.reduce_all(tf.reduce_sum(shares, axis=-1) >= top_p)
        return tf.cond(
            enough,
            lambda: tf.gather(ids, draw(nucleus(shares, top_p), uniform), batch_dims=1),
            lambda: from_sorted(vocabulary),
        )

    cut_k = (top_k > 0) & (top_k < vocabulary)
    return tf.cond(
        cut_k,
        lambda: from_sorted(tf.clip_by_value(top_k, 1, vocabulary)),
        lambda: tf.cond(top_p < 1.0, from_nucleus, lambda: draw(tf.nn.softmax(logits), uniform)),
    )


def nucleus(shares: tf.Tensor, top_p) -> tf.Tensor:
    """Zeroes what lies beyond the nucleus. shares float32[rows, n], falling along the last axis."""
    before = tf.cumsum(shares, axis=-1, exclusive=True)
    first = tf.range(tf.shape(shares)[-1]) == 0
    return tf.where((before < top_p) | first, shares, 0.0)


def draw(shares: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
    """The index where the cumulative share passes uniform * total. shares float32[rows, n] >= 0 -> int32[rows]."""
    cumulative = tf.cumsum(shares, axis=-1)
    target = uniform[:, tf.newaxis] * cumulative[:, -1:]
    index = tf.reduce_sum(tf.cast(cumulative <= target, tf.int32), axis=-1)
    # Rounding can carry `target` up to the total; the last token with a share takes it.
    positive = tf.cast(tf.range(tf.shape(shares)[-1]), tf.int32) * tf.cast(shares > 0.0, tf.int32)
    return tf.minimum(index, tf.reduce_max(positive, axis=-1))


def apply_penalties(logits: tf.Tensor, history: tf.Tensor, lengths: tf.Tensor, controls: SamplingParams) -> tf.Tensor:
    """Applies the repetition penalty and the n-gram rule.

    history int32[rows, capacity]: prompt and new tokens of each row, the first `lengths` (int32[rows]) count.
    """
    penalty = tf.convert_to_tensor(controls.repetition_penalty, tf.float32)
    size = tf.convert_to_tensor(controls.no_repeat_ngram, tf.int32)
    logits = tf.cond(
        tf.not_equal(penalty, 1.0), lambda: repetition_penalty(logits, history, lengths, penalty), lambda: logits
    )
    return tf.cond(size > 0, lambda: forbid_repeated_ngrams(logits, history, lengths, size), lambda: logits)


def repetition_penalty(logits: tf.Tensor, history: tf.Tensor, lengths: tf.Tensor, penalty) -> tf.Tensor:
    """Logits of seen tokens are divided by `penalty` where positive and multiplied where negative."""
    rows, vocabulary = tf.shape(logits)[0], tf.shape(logits)[1]
    counts = tf.sequence_mask(lengths, tf.shape(history)[1])
    flat = tf.where(counts, history + tf.range(rows)[:, tf.newaxis] * vocabulary, -1)
    flat = tf.boolean_mask(flat, flat >= 0)
    seen = tf.tensor_scatter_nd_update(
        tf.zeros([rows * vocabulary], tf.bool), flat[:, tf.newaxis], tf.ones_like(flat, tf.bool)
    )
    seen = tf.reshape(seen, [rows, vocabulary])
    return tf.where(seen, tf.where(logits > 0.0, logits / penalty, logits * penalty), logits)


def forbid_repeated_ngrams(logits: tf.Tensor, history: tf.Tensor, lengths: tf.Tensor, size) -> tf.Tensor:
    """Forbids every token that would make the row's last `size` tokens occur for a second time."""
    rows, vocabulary = tf.shape(logits)[0], tf.shape(logits)[1]
    capacity = tf.shape(history)[1]
    places = tf.range(capacity)
    # A place p is the end of an earlier run when history[p - j] equals history[length - j] for j = 1 .. size - 1.
    earlier = (places >= size - 1) & (places < lengths[:, tf.newaxis]) & (lengths[:, tf.newaxis] >= size - 1)

    def compare(back, matches):
        tail = tf.gather(history, tf.maximum(lengths - back, 0), batch_dims=1)
        shifted = tf.gather(history, tf.maximum(places - back, 0), axis=1)
        return back + 1, matches & tf.equal(shifted, tail[:, tf.newaxis])

    _, matches = tf.while_loop(lambda back, _: back < size, compare, [1, earlier])
    flat = tf.where(matches, history + tf.range(rows)[:, tf.newaxis] * vocabulary, -1)
    flat = tf.boolean_mask(flat, flat >= 0)
    banned = tf.tensor_scatter_nd_update(
        tf.zeros([rows * vocabulary], tf.bool), flat[:, tf.newaxis], tf.ones_like(flat, tf.bool)
    )
    return tf.where(tf.reshape(banned, [rows, vocabulary]), logits.dtype.min, logits)


def log_probability(logits: tf.Tensor, tokens: tf.Tensor) -> tf.Tensor:
    """float32[rows]: the model's own log-probability (temperature 1, no cut) of tokens int32[rows]."""
    return -tf.nn.sparse_softmax_cross_entropy_with_logits(labels=tokens, logits=logits)

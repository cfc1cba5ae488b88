"""Draws follow the exact distribution; penalties are those of their papers."""

import numpy as np
import pytest
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.generation import sampling
from tfvllm.generation.sampling import SamplingParams

LOGITS = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0])


def exact(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution after temperature, then top-k, then top-p, written out."""
    p = np.exp(logits / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0.0
        p /= p.sum()
    kept, mass = np.zeros_like(p, bool), 0.0
    for index in order:
        if mass >= top_p and kept.any():
            break
        kept[index], mass = True, mass + p[index]
    p = np.where(kept, p, 0.0)
    return p / p.sum()


def chi_square(counts, expected):
    used = expected > 0
    assert counts[~used].sum() == 0
    total = counts.sum()
    return ((counts[used] - total * expected[used]) ** 2 / (total * expected[used])).sum(), used.sum() - 1


# The 99.9 % points of the chi-square distribution.
LIMIT = {0: 1e-9, 1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.7},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 100},
    ],
    ids=str,
)
def test_frequencies(settings):
    rows = 20000
    uniform = sampling.uniforms(3, rows, 1)[:, 0]
    logits = tf.tile(tf.constant([LOGITS], tf.float32), [rows, 1])
    tokens = sampling.sample_next(logits, uniform, SamplingParams(**settings)).numpy()
    greedy = settings["temperature"] == 0.0 or settings.get("top_p") == 0.0
    expected = exact(
        LOGITS,
        **{
            **settings,
            "temperature": settings["temperature"] or 1.0,
            "top_k": 1 if greedy else settings.get("top_k", 0),
        },
    )
    statistic, freedom = chi_square(np.bincount(tokens, minlength=8), expected)
    assert statistic <= LIMIT[freedom]


def test_the_chi_square_test_can_fail():
    counts = np.bincount(np.random.default_rng(0).choice(8, 20000, p=exact(LOGITS)), minlength=8)
    statistic, freedom = chi_square(counts, exact(LOGITS, temperature=1.1))
    assert statistic > LIMIT[freedom]


def test_top_p_beyond_the_first_few_tokens(monkeypatch):
    monkeypatch.setattr(sampling, "_NUCLEUS", 2)
    rows = 20000
    logits = tf.tile(tf.constant([LOGITS], tf.float32), [rows, 1])
    tokens = sampling.sample(logits, sampling.uniforms(1, rows, 1)[:, 0], 0, 0.9).numpy()
    statistic, freedom = chi_square(np.bincount(tokens, minlength=8), exact(LOGITS, top_p=0.9))
    assert statistic <= LIMIT[freedom]


def test_draw_at_the_edges():
    shares = tf.constant([[0.0, 0.5, 0.0, 0.5, 0.0]] * 3)
    np.testing.assert_array_equal(sampling.draw(shares, tf.constant([0.0, 0.49999, 0.9999999])), [1, 1, 3])
    np.testing.assert_array_equal(sampling.draw(shares, tf.constant([0.5, 0.75, 1.0])), [3, 3, 3])


def test_seed_and_place_decide_the_uniforms():
    first = sampling.uniforms(7, 4, 5).numpy()
    np.testing.assert_array_equal(first, sampling.uniforms(7, 4, 5))
    np.testing.assert_array_equal(first[:2], sampling.uniforms(7, 2, 5))  # a row does not depend on those after it
    assert (first != sampling.uniforms(8, 4, 5).numpy()).all()
    assert first.min() >= 0.0 and first.max() < 1.0


def test_repetition_penalty():
    logits = tf.constant([[1.0, -1.0, 2.0, 0.0], [1.0, -1.0, 2.0, 0.0]])
    history = tf.constant([[0, 1, 1], [2, 3, 3]])
    found = sampling.repetition_penalty(logits, history, tf.constant([3, 1]), 2.0)
    np.testing.assert_allclose(found, [[0.5, -2.0, 2.0, 0.0], [1.0, -1.0, 1.0, 0.0]])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_repeated_ngrams(size):
    random = np.random.default_rng(size)
    history = random.integers(0, 4, [6, 12]).astype(np.int32)
    lengths = np.array([12, 9, 5, 2, 1, 7], np.int32)
    found = sampling.forbid_repeated_ngrams(tf.zeros([6, 4]), tf.constant(history), tf.constant(lengths), size).numpy()
    for row, length in enumerate(lengths):
        words = history[row, :length].tolist()
        tail = words[length - size + 1 :] if size > 1 else []
        grams = [words[i : i + size] for i in range(length - size + 1)]
        banned = {gram[-1] for gram in grams if gram[:-1] == tail} if length >= size - 1 else set()
        assert {token for token in range(4) if found[row, token] < -1e30} == banned


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": float("nan")}, "temperature must be a number, 0 \\(greedy\\) or more; got nan"),
        ({"temperature": -0.5}, "temperature must be a number, 0 \\(greedy\\) or more; got -0.5"),
        ({"temperature": float("inf")}, "temperature must be a number"),
        ({"top_k": -1}, "top_k must be 0 \\(all\\) or more; got -1"),
        ({"top_p": 1.5}, "top_p must be from 0"),
        ({"top_p": np.float32("nan")}, "top_p must be from 0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0"),
        ({"repetition_penalty": -1.2}, "repetition_penalty must be a number above 0"),
        ({"no_repeat_ngram": -2}, "no_repeat_ngram must be 0"),
    ],
    ids=str,
)
def test_numbers_without_sense_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"top_p": float("nan")}, "top_p must be a number"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be a number above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be a number above 0"),
    ],
    ids=str,
)
def test_a_graph_refuses_what_would_make_every_logit_nan(wrong, message):
    given = {"temperature": -1.0, "top_p": 1.0, "repetition_penalty": 1.0}  # documented: 0 or less is greedy

    @tf.function(autograph=False)
    def checked(**numbers):
        with tf.control_dependencies(sampling.valid(SamplingParams(**numbers))):
            return tf.constant(1)

    assert checked(**{name: tf.constant(value) for name, value in given.items()}) == 1
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        checked(**{name: tf.constant(value) for name, value in {**given, **wrong}.items()})

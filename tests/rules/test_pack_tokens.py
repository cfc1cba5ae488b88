from functools import cache

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import tfvllm
from tests.rules.checks import Checked, check, weight
from tests.tiny_models import TEXTS, bert_classifier
from tfvllm.graph import executable

RULE = "PackTokens"
WIDTH, HEADS, WORDS = 8, 2, 11
TABLE, PLACES = weight(WORDS, WIDTH, seed=1), weight(16, WIDTH, seed=2)
W = [weight(WIDTH, WIDTH, seed=s) for s in range(3, 12)]
SPECS = [tf.TensorSpec([None, None], tf.int32, "ids"), tf.TensorSpec([None, None], tf.bool, "mask")]


def dense(x, w):
    return tf.reshape(tf.reshape(x, [-1, WIDTH]) @ w, tf.shape(x))


def zeroed(mask, scores):
    return tf.where(mask, tf.nn.softmax(tf.where(mask, scores, -1e9)), 0.0)


def chosen(mask, scores):
    return tf.nn.softmax(tf.where(mask, scores, -1e9))


def added(mask, scores):
    return tf.nn.softmax(scores + (1.0 - tf.cast(mask, tf.float32)) * -1e9)


def layer(x, mask, w, softmax=zeroed):
    """One layer of attention (two heads) and a feed-forward step on [batch, positions, 8]."""

    def heads(y):
        return tf.transpose(tf.reshape(y, [tf.shape(x)[0], tf.shape(x)[1], HEADS, WIDTH // HEADS]), [0, 2, 1, 3])

    scores = tf.matmul(heads(dense(x, w[0])), heads(dense(x, w[1])), transpose_b=True)
    mixed = tf.matmul(softmax(mask[:, None, None, :], scores), heads(dense(x, w[2])))
    x += tf.reshape(tf.transpose(mixed, [0, 2, 1, 3]), [tf.shape(mixed)[0], tf.shape(x)[1], WIDTH])
    return x + tf.nn.gelu(dense(x, w[0]))


def encoder(ids, mask, softmax=zeroed, layers=2):
    x = tf.gather(tf.convert_to_tensor(TABLE), ids) + PLACES[: tf.shape(ids)[1]]
    for i in range(layers):
        x = layer(x, mask, W[3 * i : 3 * i + 3], softmax)
    return x


def first(ids, mask, softmax=zeroed):
    return encoder(ids, mask, softmax)[:, 0] @ W[8]


def mean(ids, mask, softmax=zeroed):
    weights = tf.cast(mask, tf.float32)[:, :, None]
    return tf.reduce_sum(encoder(ids, mask, softmax) * weights, 1) / (tf.reduce_sum(weights, 1) + 1e-6)


def batch(lengths, length, left=False, seed=0):
    ids = np.random.default_rng(seed).integers(0, WORDS, (len(lengths), length))
    mask = np.arange(length)[None] < np.array(lengths, int).reshape(-1, 1)
    return [ids, mask[:, ::-1] if left else mask]


SAMPLES = [
    batch([5, 2, 7, 1], 7),
    batch([5, 2, 7, 1], 7, left=True),
    batch([0, 3, 0], 4),
    batch([4], 4),
    batch([0], 1),
    batch([], 5),
    [*batch([3, 5], 6)[:1], np.array([[0, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 1]], bool)],
]


def packed(function, fires=1, **options) -> Checked:
    return check(function, SPECS, RULE, fires, samples=SAMPLES, generated=False, special=False, **options)


@pytest.mark.parametrize("softmax", [zeroed, chosen, added])
@pytest.mark.parametrize("pool", [first, mean])
def test_every_product_reads_packed_tokens(pool, softmax):
    c = packed(lambda ids, mask: pool(ids, mask, softmax))
    tokens = c.ops("Where")[0].output.shape[0]
    by_token = [p for p in c.ops("MatMul") if p.inputs[0].shape[0] == tokens]
    assert len(by_token) == 8  # query, key, value and feed-forward, twice
    assert len(c.ops("MatMul")) == 8 + (pool is first)
    assert len(c.ops("Where")) == 1


def test_one_mask_of_sequences_and_one_of_ids():
    """A mask that broadcasts over the batch, or ids that do: nothing is left out, and the result is the same."""
    ids, mask = batch([3, 5], 6)
    c = packed(first)
    function = executable.to_concrete(c.graph, (tuple(SPECS), {}), pack=list)
    for a, b in ((ids[:1], mask), (ids, mask[:1]), (ids[:1], mask[:1])):
        a, b = tf.constant(a, tf.int32), tf.constant(b)
        np.testing.assert_allclose(function(a, b)[0], first(a, b), rtol=1e-5, atol=1e-5)


@cache
def both_pools():
    return {pool: executable.to_concrete(packed(pool).graph, (tuple(SPECS), {}), pack=list) for pool in (first, mean)}


@settings(max_examples=40)
@given(data=st.data())
def test_any_mask(data):
    rows, length = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 9))
    bits = data.draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    ids, _ = batch([0] * rows, length, seed=data.draw(st.integers(0, 99)))
    ids, mask = tf.constant(ids, tf.int32), tf.constant(np.array(bits, bool).reshape(rows, length))
    for pool, function in both_pools().items():
        np.testing.assert_allclose(function(ids, mask)[0], pool(ids, mask), rtol=0, atol=2e-5)
        other = tf.where(mask | (tf.range(length) == 0) | ~tf.reduce_any(mask, 1, keepdims=True), ids, 0)
        np.testing.assert_array_equal(function(ids, mask)[0], function(other, mask)[0])  # padding does not count


def test_a_nan_goes_nowhere_the_original_does_not_take_it():
    def function(x, mask):
        return layer(layer(x, mask, W[:3]), mask, W[3:6])[:, 0]

    specs = [tf.TensorSpec([None, None, WIDTH], tf.float32, "x"), SPECS[1]]
    c = check(function, specs, RULE, 1, generated=False)
    new = executable.to_concrete(c.graph, (tuple(specs), {}), pack=list)
    _, mask = batch([3, 5, 2, 6], 6)
    for row, position in ((0, 1), (0, 4), (1, 0), (2, 5), (3, 5)):
        x = np.random.default_rng(0).normal(size=(4, 6, WIDTH)).astype(np.float32)
        x[row, position] = np.nan
        old, found = (f(tf.constant(x), tf.constant(mask)) for f in (function, lambda *a: new(*a)[0]))
        bad, was = np.isnan(found).any(1), np.isnan(old).any(1)
        assert not np.any(bad & ~was)  # never more than before
        assert np.array_equal(bad, [row == i and mask[row, position] for i in range(4)])
        np.testing.assert_allclose(found[~was], old[~was], rtol=1e-4, atol=1e-5)


def test_tokens_as_results_decline():
    def function(ids, mask):
        x = encoder(ids, mask)
        return {"all": x, "first": x[:, 0] @ W[8]}

    c = packed(function, 0)
    assert c.reasons == ["padded positions are part of the result 'output_0'"]


def test_a_mean_over_padding_declines():
    packed(lambda ids, mask: tf.reduce_mean(encoder(ids, mask), 1), 0, reason="Mean may bring padded positions")


def test_the_last_position_declines():
    packed(lambda ids, mask: encoder(ids, mask)[:, -1], 0, reason="StridedSlice may bring padded positions")


@pytest.mark.parametrize(
    "softmax",
    [
        lambda mask, s: tf.nn.softmax(tf.where(mask, s, -10.0)),  # too weak
        lambda mask, s: tf.nn.softmax(tf.where(mask, -1e9, s)),  # the wrong way round
        lambda mask, s: tf.nn.softmax(s + tf.cast(mask, tf.float32) * -1e9),
        lambda mask, s: tf.nn.softmax(tf.where(mask, s, -1e9)) + 1e-3,
        lambda mask, s: tf.where(mask, tf.nn.softmax(s), 1.0),
        # A window beside the mask: a query may see no key but padding.
        lambda mask, s: tf.nn.softmax(tf.where(mask, tf.where(s > 0, s, -1e9), -1e9)),
    ],
)
def test_what_is_not_silenced_stays(softmax):
    packed(lambda ids, mask: first(ids, mask, softmax), 0)


def test_without_a_mask_nothing_is_said():
    c = packed(lambda ids, mask: first(ids, mask, lambda mask, s: tf.nn.softmax(s)), 0)
    assert not c.reasons


@pytest.mark.parametrize(
    "target, precision",
    [
        ("portable", "float32"),
        *(pytest.param("onednn", p, marks=pytest.mark.thorough) for p in ("float32", "bfloat16")),
    ],
)
def test_strings_to_scores(tmp_path, target, precision):
    model = bert_classifier(layers=2)
    tfvllm.export(model, tmp_path / "base", task="classify", labels=["a", "b"])
    report = tfvllm.simplify_saved_model(tmp_path / "base", tmp_path / "fast", target=target, precision=precision)
    for section in report.signatures.values():
        assert section.fired[RULE]["count"] == 1 and not section.rolled_back and section.verification["ok"]
    old, new = (tf.saved_model.load(tmp_path / n).signatures["serving_default"] for n in ("base", "fast"))
    for texts in (TEXTS, TEXTS[:1], [""], TEXTS[3:]):
        a, b = old(tf.constant(texts))["scores"], new(tf.constant(texts))["scores"]
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 if precision == "float32" else 0.2)

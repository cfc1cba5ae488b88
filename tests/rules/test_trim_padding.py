import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.rules.checks import check
from tests.rules.test_pack_tokens import SPECS, added, chosen, encoder, first, mean, zeroed

RULE = "TrimPadding"


def samples():
    """Padding at the right, at the left, in the middle; sequences of padding alone; one token; none."""
    rng = np.random.default_rng(0)
    masks = [
        np.arange(14) < np.array([[3], [7], [1]]),
        np.arange(14) >= np.array([[9], [2]]),
        np.array([[1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]], bool),
        np.arange(13) < np.array([[3], [0], [5]]),
        np.arange(16) < np.array([[8]]),
        np.ones((1, 1), bool),
        np.zeros((0, 5), bool),
    ]
    return [[rng.integers(0, 11, m.shape).astype(np.int32), m] for m in masks]


@pytest.mark.parametrize("pool", [first, mean])
@pytest.mark.parametrize("softmax", [zeroed, chosen, added])
def test_columns_of_padding_alone_are_cut(pool, softmax):
    if pool is mean and softmax is not zeroed:
        pytest.skip("sequences of padding alone give NaN in the original")
    kept = [s for s in samples() if pool is first or s[1].any(1).all()]
    check(lambda ids, mask: pool(ids, mask, softmax), SPECS, RULE, 1, generated=False, samples=kept)


def test_tokens_as_results_decline():
    check(encoder, SPECS, RULE, 0, reason="part of the result", generated=False, samples=samples()[:1])


def test_what_counts_positions_declines():
    def scaled(ids, mask):
        return first(ids, mask) / tf.cast(tf.shape(ids)[1], tf.float32)

    check(scaled, SPECS, RULE, 0, reason="computes with the number of positions", generated=False)

    def backwards(ids, mask):
        return first(ids + tf.range(tf.shape(ids)[1] - 1, -1, -1) % 2, mask)

    check(backwards, SPECS, RULE, 0, reason="computes with the number of positions", generated=False)


def test_a_cumulative_sum_declines():
    check(
        lambda ids, mask: first(tf.cumsum(ids, axis=1, reverse=True) % 11, mask), SPECS, RULE, 0,
        reason="seen at padding", generated=False,
    )  # fmt: skip


@pytest.mark.parametrize("target", ["portable", "onednn"])
def test_a_classifier_with_arguments_of_several_sizes(target):
    backbone = keras_nlp.models.BertBackbone(
        vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32, intermediate_dim=64
    )
    model = keras_nlp.models.BertTextClassifier(backbone, num_classes=2, preprocessor=None)
    fast = tfvllm.simplify(model, target=target)
    assert fast.report.rules[RULE] == fast.report.rules["PackTokens"] == 1
    rng = np.random.default_rng(0)
    for lengths, width in (([3, 17, 1, 9], 40), ([0, 5], 11), ([7], 7), ([20, 2], 33)):
        ids = rng.integers(1, 100, (len(lengths), width)).astype("int32")
        mask = (np.arange(width) < np.array(lengths)[:, None]).astype("int32")
        x = {"token_ids": ids, "padding_mask": mask, "segment_ids": 0 * ids}
        np.testing.assert_allclose(fast(x), model(x), atol=2e-6)
        one = {**x, "segment_ids": np.zeros((len(lengths), 1), "int32")}  # broadcast to the positions
        np.testing.assert_allclose(fast(one), model(x), atol=2e-6)

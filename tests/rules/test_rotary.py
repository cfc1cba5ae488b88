import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.rules.checks import check, f32


def angles(x, wave=1.0):
    """cos and sin, [1, length, 1, size], of as many positions as x has."""
    position = tf.cast(tf.range(tf.shape(x)[1]), tf.float32)[None, :, None, None]
    angle = position * wave * tf.constant([1.0, 0.1, 0.01, 1.0, 0.1, 0.01])
    return tf.cos(angle), tf.sin(angle)


def turned(x, stacked=False, axis=-1):
    first, second = tf.split(x, 2, axis=-1)
    if stacked:
        return tf.reshape(tf.stack([-second, first], axis=-2), tf.shape(x))
    return tf.concat([-second, first], axis=axis)


def rotate(x, stacked=False, wave=1.0):
    cosine, sine = angles(x, wave)
    return x * cosine + turned(x, stacked) * sine


def test_signs_into_sine():
    for stacked in (False, True):
        c = check(lambda x, s=stacked: rotate(x, s), [f32(None, None, 3, 6)], "SignsIntoSine", 1)
        assert not c.ops("Neg") and len(c.ops("ConcatV2")) == 1
        assert [n.output.shape[2] for n in c.ops("Mul") if n.inputs[0].node.op == "Sin"] == [1]


def test_what_is_no_rotation_stays():
    def half_read(x):
        first, second = tf.split(x, 2, axis=-1)
        negative = -second
        return tf.concat([negative, first], -1) * angles(x)[1], negative

    check(half_read, [f32(2, None, 3, 6)], "SignsIntoSine", 0, reason="read elsewhere")
    # Interleaved pairs (GPT-J): not the halves of one axis.
    check(
        lambda x: tf.reshape(tf.stack([-x[..., 1::2], x[..., ::2]], axis=-1), tf.shape(x)) * angles(x)[1],
        [f32(2, None, 3, 6)],
        "SignsIntoSine",
        0,
    )
    check(lambda x: turned(x) * tf.abs(x), [f32(2, None, 3, 6)], "SignsIntoSine", 0, reason="as large")
    check(lambda x: tf.concat([-x, x], 0) * 2.0, [f32(2, 6)], "SignsIntoSine", 0)


def attention(widths, wave=1.0):
    """Queries and keys rotated, values as they are: from one product, split."""

    def function(y):
        batch, length = tf.shape(y)[0], tf.shape(y)[1]
        parts = tf.split(tf.reshape(y, [-1, sum(widths) * 6]), [n * 6 for n in widths], axis=1)
        heads = [tf.reshape(p, [batch, length, n, 6]) for p, n in zip(parts, widths)]
        return [rotate(heads[0]), rotate(heads[1], wave=wave), *heads[2:]]

    return function


RULES = ["MergeDuplicates", "DeleteDead", "SignsIntoSine", "RotateTogether"]


def test_query_and_key_together():
    for widths in ((4, 2, 2), (2, 2, 2), (4, 2)):
        for batch in (None, 1):
            c = check(
                attention(widths), [f32(batch, None, sum(widths) * 6)], RULES, {"SignsIntoSine": 2, "RotateTogether": 1}
            )
            assert len(c.ops("ConcatV2")) == 1 and len(c.ops("AddV2")) == 1 and not c.ops("Neg")


def test_different_angles_stay_apart():
    c = check(attention((4, 2, 2), wave=2.0), [f32(None, None, 48)], RULES, {"RotateTogether": 0})
    assert any("different angles" in reason for reason in c.reasons)


@pytest.mark.thorough
def test_families_with_rotary_embeddings():
    sizes = dict(
        vocabulary_size=50, num_layers=2, num_query_heads=4, num_key_value_heads=2, hidden_dim=32, intermediate_dim=40
    )
    for family in (keras_nlp.models.LlamaBackbone, keras_nlp.models.MistralBackbone, keras_nlp.models.QwenBackbone):
        model = family(**sizes)
        fast = tfvllm.simplify(model)
        assert fast.report.rules["SignsIntoSine"] == 4 and fast.report.rules["RotateTogether"] == 2, family.__name__
        ids = np.random.default_rng(0).integers(0, 50, (3, 7)).astype("int32")
        mask = np.arange(7) < np.array([[7], [4], [1]])
        x = {"token_ids": ids, "padding_mask": mask.astype("int32")}
        np.testing.assert_allclose(fast(x), model(x), atol=2e-5)

"""Values that are easy to get wrong: odd padding masks under every pooling, and what else reads inside a pattern."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests import encoders
from tests.graph.conftest import run_saved

LENGTH = 10
# One row for each: full, padded right, padded left, with holes, the first token masked, one token, nothing at all.
MASKS = np.array(
    [
        [1] * 10,
        [1] * 6 + [0] * 4,
        [0] * 4 + [1] * 6,
        [1, 0, 1, 1, 0, 0, 1, 0, 1, 0],
        [0] + [1] * 9,
        [0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
        [0] * 10,
    ],
    np.int32,
)


def first(states, mask):
    return states[:, 0]


def mean(states, mask):
    weights = tf.cast(mask, tf.float32)[..., None]
    return tf.reduce_sum(states * weights, 1) / tf.maximum(tf.reduce_sum(weights, 1), 1.0)


def largest(states, mask):
    return tf.reduce_max(tf.where(tf.cast(mask, tf.bool)[..., None], states, -1e4), 1)


def last(states, mask):
    places = tf.maximum(tf.reduce_max(tf.range(tf.shape(mask)[1]) * mask, 1), 0)
    return tf.gather(states, places, batch_dims=1)


POOLINGS = (first, mean, largest, last)
THOROUGH = [("deberta_v3", mean)]
OTHERS = [
    (family, pooling)
    for family in encoders.FAMILIES
    for pooling in POOLINGS
    if family != "bert" and (family, pooling) not in THOROUGH
]


def _inputs(model, masks):
    rng = np.random.default_rng(0)
    given = {
        "token_ids": rng.integers(1, 40, masks.shape).astype(np.int32),
        "padding_mask": masks,
        "segment_ids": np.zeros(masks.shape, np.int32),
    }
    return {tensor.name: given[tensor.name] for tensor in model.inputs}


@pytest.mark.parametrize("target", ["portable", "onednn"])
@pytest.mark.parametrize(
    "family, pooling",
    [
        ("bert", POOLINGS[0]),
        *(pytest.param("bert", pooling, marks=pytest.mark.thorough) for pooling in POOLINGS[1:]),
        *(pytest.param(*pair, marks=pytest.mark.thorough) for pair in THOROUGH),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS),
    ],
)
def test_every_kind_of_padding(family, pooling, target):
    backbone = encoders.backbone(family)

    def call(inputs):
        states = backbone(inputs, training=False)
        states = states["sequence_output"] if isinstance(states, dict) else states
        mask = inputs.get("padding_mask", tf.cast(inputs["token_ids"] != 0, tf.int32))
        return pooling(states, mask)

    inputs = _inputs(backbone, MASKS)
    spec = {name: tf.TensorSpec([None, None], tf.int32, name=name) for name in inputs}
    fast = tfvllm.simplify(tf.function(call, input_signature=[spec]), target=target)
    assert fast.report.verification["status"] == "verified"
    expected = call(inputs).numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(fast(inputs).numpy(), expected, rtol=0, atol=2e-5 * scale)
    for row in range(len(MASKS)):  # a row alone is what it is in company
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        np.testing.assert_allclose(fast(alone).numpy(), call(alone).numpy(), rtol=0, atol=2e-5 * scale)


# What else reads inside a pattern -------------------------------------------------------------------------------------


def _random(model):
    rng = np.random.default_rng(1)
    for variable in model.variables:
        if variable.dtype == "float32":
            variable.assign(np.abs(rng.normal(1.0, 0.3, variable.shape)) * rng.choice([1.0, 1.0, 0.5], variable.shape))
    return model


def _same(a, b, atol=1e-5):
    a, b = tf.nest.flatten(a), tf.nest.flatten(b)
    assert len(a) == len(b)
    for expected, found in zip(a, b):
        expected, found = np.asarray(expected), np.asarray(found)
        assert expected.shape == found.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("target", ["portable", "onednn"])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_batch_norm_before_a_convolution(padding, target, tmp_path):
    """Its shift cannot move past zeros that SAME puts around the picture."""
    model = _random(
        keras.Sequential(
            [
                keras.Input((7, 9, 3)),
                keras.layers.BatchNormalization(),
                keras.layers.Conv2D(5, 3, padding=padding),
                keras.layers.BatchNormalization(),
                keras.layers.Conv2D(4, 3, padding=padding, strides=2, use_bias=False),
            ]
        )
    )
    x = np.random.default_rng(0).normal(2.0, 1.0, (2, 7, 9, 3)).astype(np.float32)
    fast = tfvllm.simplify(model, target=target)
    _same(model(x, training=False), fast(x))
    model.export(str(tmp_path / "1"), verbose=False)
    tfvllm.simplify_saved_model(tmp_path / "1", tmp_path / "2", target=target)
    (found,) = run_saved(tmp_path / "2", {_name_of_input(tmp_path / "2"): x}).values()
    _same(model(x, training=False), found)


def _name_of_input(path):
    (name,) = tf.saved_model.load(str(path)).signatures["serving_default"].structured_input_signature[1]
    return name


@pytest.mark.parametrize("target", ["portable", "onednn"])
def test_one_convolution_before_two_batch_norms(target):
    """Neither may take the shared weights for its own; nor where the convolution itself is a result."""
    x = keras.Input((6, 6, 3))
    shared = keras.layers.Conv2D(4, 3, padding="same")
    twice = shared(x), shared(keras.ops.flip(x, axis=1))
    norms = [keras.layers.BatchNormalization(scale=bool(i))(y) for i, y in enumerate((*twice, twice[0]))]
    value = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    for outputs in (norms, [*norms, twice[0]]):
        model = _random(keras.Model(x, outputs))
        _same(model(value, training=False), tfvllm.simplify(model, target=target)(value))


@pytest.mark.parametrize("target", ["portable", "onednn"])
def test_attention_scores_and_hidden_states_as_outputs(target):
    x = keras.Input((None, 16))
    mask = keras.Input((None,), dtype="bool")
    attention = keras.layers.MultiHeadAttention(2, 8)
    mixed, scores = attention(x, x, attention_mask=mask[:, None, :], return_attention_scores=True)
    hidden = keras.layers.LayerNormalization()(x + mixed)
    inner = keras.layers.Dense(24, activation="gelu")(hidden)
    outputs = keras.layers.LayerNormalization()(hidden + keras.layers.Dense(16)(inner))
    model = keras.Model([x, mask], {"scores": scores, "hidden": hidden, "inner": inner, "last": outputs})
    rng = np.random.default_rng(2)
    for variable in model.variables:
        variable.assign(rng.normal(0, 0.4, variable.shape))
    fast = tfvllm.simplify(model, target=target)
    value = rng.normal(size=(7, LENGTH, 16)).astype(np.float32)
    expected, found = model([value, MASKS.astype(bool)], training=False), fast([value, MASKS.astype(bool)])
    assert set(found) == set(expected)
    for name in expected:
        _same(expected[name], found[name])


@pytest.mark.parametrize("target", ["portable", "onednn"])
@pytest.mark.parametrize("form", ["no kept axis", "a column for gamma", "an axis in the middle"])
def test_norms_of_other_shapes(form, target):
    """Batch and width are both 6, so that what broadcasts wrongly has the right shape."""
    rng = np.random.default_rng(0)
    column, row = (tf.constant(rng.normal(1, 0.5, shape), tf.float32) for shape in ((6, 1), (6,)))

    def call(x):
        axis = 1 if form == "an axis in the middle" else -1
        kept = form != "no kept axis"
        mean = tf.reduce_mean(x, axis, keepdims=kept)
        variance = tf.reduce_mean(tf.math.squared_difference(x, mean if kept else mean[:, None]), axis, keepdims=kept)
        inverse = tf.math.rsqrt(variance + 1e-3) * (column if form == "a column for gamma" else 1.0)
        if form == "no kept axis":  # [6] against [6, 6]: along the last axis, whatever was meant
            return (x - mean) * inverse * row + row
        return (x - mean) * inverse + row

    shape = [None, None, 6] if form == "an axis in the middle" else [None, 6]
    x = rng.normal(1.0, 2.0, [6 if size is None else size for size in shape]).astype(np.float32)
    fast = tfvllm.simplify(
        tf.function(call, input_signature=[tf.TensorSpec(shape)]), inputs=tf.constant(x), target=target
    )
    _same(call(x), fast(tf.constant(x)))

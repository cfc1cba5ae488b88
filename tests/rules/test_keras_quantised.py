import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.rules.checks import check, f32
from tfvllm.graph import loading
from tfvllm.rules.keras_quantised import DequantiseProducts

UNPACK = DequantiseProducts(unpack=True)
RULE = UNPACK.name


def layer(x, q, columns, equation=None, axes=(-1,), shape=None, largest=127.0):
    """What Keras makes of a dense layer in int8; `shape`: what brings one scale a row beside the result's axes."""
    scale = 127.0 / (tf.reduce_max(tf.abs(x), axes, keepdims=True) + 1e-7)
    rounded = tf.cast(tf.clip_by_value(tf.round(x * scale), -largest, largest), tf.int8)
    rows = scale if shape is None else tf.reshape(scale, shape(tf.shape(x)))
    if equation is None:
        product = tf.matmul(rounded, q, output_type=tf.int32)
    else:
        product = tf.cast(tf.einsum(equation, tf.cast(rounded, tf.float32), tf.cast(q, tf.float32)), tf.int32)
    return tf.cast(product, tf.float32) / (rows * columns)


def int8(*shape, seed=0):
    return tf.Variable(np.random.default_rng([seed, *shape]).integers(-127, 128, shape).astype(np.int8))


def columns(*shape):
    return tf.Variable(np.random.default_rng(shape).uniform(50, 500, shape).astype(np.float32))


def test_dense():
    q, c = int8(24, 16), columns(16)
    found = check(lambda x: layer(x, q, c), [f32(None, 24)], UNPACK, 1, special=False)
    assert len(found.ops("MatMul")) == 1 and not found.ops("BatchMatMulV3") and not found.ops("Round")
    check(lambda x: layer(x, q, c), [f32(None, None, 24)], UNPACK, 1, special=False)


def test_einsum_dense():
    q, c = int8(24, 2, 8), columns(1, 1, 2, 8)
    ones = lambda s: [s[0], s[1], 1, 1]  # noqa: E731
    check(lambda x: layer(x, q, c, "abc,cde->abde", (2,), ones), [f32(None, None, 24)], UNPACK, 1, special=False)
    q, c = int8(2, 24, 8), columns(1, 1, 2, 8)  # the heads first, as Llama and Gemma have them
    check(lambda x: layer(x, q, c, "btd,ndh->btnh", (2,), ones), [f32(None, None, 24)], UNPACK, 1, special=False)
    q, c = int8(2, 12, 16), columns(1, 1, 16)
    last = lambda s: [s[0], s[1], 1]  # noqa: E731
    found = check(
        lambda x: layer(x, q, c, "abcd,cde->abe", (2, 3), last), [f32(None, None, 2, 12)], UNPACK, 1, special=False
    )
    assert not found.ops("Einsum")


def test_declines():
    q, c, big = int8(24, 16), columns(16), int8(300, 300)
    x = [f32(None, 24)]
    check(lambda x: layer(x, q, c), x, RULE, 0, reason="kept in int8 as Keras made it", special=False)
    check(lambda x: layer(x, q, c, largest=100.0), x, UNPACK, 0, special=False)
    # A small weight may be there twice.
    check(lambda x: (layer(x, q, c), tf.gather(q, [1])), x, UNPACK, 1, special=False)
    c300, wrong = columns(300), columns(1, 1)
    both = lambda x: (layer(x, big, c300), tf.gather(big, [1]))  # noqa: E731
    check(both, [f32(None, 300)], UNPACK, 0, reason="others read the weight too", special=False)
    # One range for all rows is no range of a row.
    check(lambda x: layer(x, q, c, axes=(0, 1)), x, UNPACK, 0, reason="its sizes are unknown", special=False)
    check(lambda x: layer(x, q, wrong), x, UNPACK, 0, reason="one scale for each", special=False)


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantised(request):
    """A classifier that Keras quantised, what it was before, and inputs."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((None, 96))
    heads = keras.layers.EinsumDense("abc,cde->abde", (None, 4, 24), bias_axes="de")(inputs)
    joined = keras.layers.EinsumDense("abcd,cde->abe", (None, 96), bias_axes="e")(heads)
    hidden = keras.layers.Dense(128, "relu")(keras.layers.LayerNormalization()(joined + inputs))
    model = keras.Model(inputs, keras.layers.Dense(64)(hidden))
    x = np.random.default_rng(0).normal(size=(5, 7, 96)).astype(np.float32)
    plain = model(x).numpy()
    model.quantize(request.param)
    return request.param, model, plain, x


def test_models_that_keras_quantised_become_int8(quantised):
    mode, model, plain, x = quantised
    fast = tfvllm.simplify(model, target="onednn", precision="int8", inputs=x)
    kept = model(x).numpy()
    report = fast.report
    assert report.rules["QuantizeProducts"] == 4
    assert report.rules.get(RULE, 0) == (4 if mode == "int8" else 0)  # int4 rounds the weights alone
    assert report.after["ops"]["_QuantizedMatMul"] == 4 and "BatchMatMulV3" not in report.after["ops"]
    assert not {"BitwiseAnd", "RightShift", "Round"} & set(report.after["ops"])
    limit = 0.02 * np.abs(kept).max()
    np.testing.assert_allclose(fast(x).numpy(), kept, atol=limit)
    # Not further from what the model was before Keras rounded it than Keras's own.
    assert np.abs(fast(x).numpy() - plain).mean() < 1.2 * np.abs(kept - plain).mean()


@pytest.mark.parametrize("target", ["portable", "onednn"])
def test_models_that_keras_quantised_in_other_precisions(quantised, target):
    mode, model, _, x = quantised
    kept = model(x).numpy()
    lowered = tfvllm.simplify(model, target=target, precision="bfloat16", inputs=x)
    np.testing.assert_allclose(lowered(x).numpy(), kept, atol=0.04 * np.abs(kept).max())
    assert lowered.report.rules["LowerProducts"] >= 3  # two linear layers in a row may be one
    plain = tfvllm.simplify(model, target=target, inputs=x)
    np.testing.assert_allclose(plain(x).numpy(), kept, atol=1e-4 * np.abs(kept).max())
    if mode == "int8":
        declined = [d for d in plain.report.declined if d["rule"] == RULE]
        assert "precision int8" in declined[0]["reason"] and RULE not in plain.report.rules


def test_saved_weights_are_int8(quantised, tmp_path):
    _, model, _, x = quantised
    model.export(tmp_path / "plain", format="tf_saved_model", verbose=False)
    report = tfvllm.simplify_saved_model(
        tmp_path / "plain",
        tmp_path / "fast",
        target="onednn",
        precision="int8",
        calibration=[{model.inputs[0].name: x}],
    )
    graph = loading.load(tmp_path / "fast").signatures["serving_default"].graph
    held = [c.owner for c in graph.captures.values()]
    # 96·96 + 96·96 + 96·128 + 128·64 weights of a byte; scales and biases beside them.
    assert sum(np.prod(v.shape) for v in held if v.dtype in (tf.int8, tf.qint8)) == 38912
    assert report.after["bytes"] < 1.2 * 38912

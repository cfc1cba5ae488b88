"""Models that compute in bfloat16 or float16: an export in float32 is held against the same weights in float32."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.generation.models import bart, build, gemma2, gpt2, llama, opt, prompts, t5
from tfvllm.errors import VerificationError
from tfvllm.export import float32, generate
from tfvllm.export.translate import translator_for
from tfvllm.generation.generator import Generator
from tfvllm.models import read
from tfvllm.pruning import shrink
from tfvllm.savedmodel import manifest


@pytest.fixture
def policy(request):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


low = pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16", "float16", "mixed_float16"], indirect=True)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", {"atol": 1e-5, "rtol": 0.0}),
        ("float64", {"atol": 1e-5, "rtol": 0.0}),
        ("mixed_float16", {"atol": 4 * 2**-10, "rtol": 4 * 2**-10}),
        ("bfloat16", {"atol": 4 * 2**-7, "rtol": 4 * 2**-7}),
    ],
)
def test_tolerance_of_the_coarsest_type(dtype, expected):
    layers = [keras.Input([3]), keras.layers.Dense(2, dtype=dtype), keras.layers.Dense(2, dtype="float32")]
    assert float32.tolerance(keras.Sequential(layers, name="outer")) == expected


@low
def test_the_same_weights_in_float32(policy):
    model = build(llama)
    twin = float32.in_float32(model)
    assert float32.coarsest_type(model).name == policy.removeprefix("mixed_")
    assert float32.coarsest_type(twin) == tf.float32
    for own, wide in zip(model.weights, twin.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(wide), np.asarray(keras.ops.cast(own, "float32")))
    assert float32.in_float32(twin) is twin


def scores_of(model, precision="float32"):
    """(what the engine finds, what is expected of it): log-probabilities."""
    ids, mask = prompts([9, 4])
    lengths = tf.constant(mask.sum(1), tf.int32)
    features = {"token_ids": tf.constant(ids), "padding_mask": tf.constant(mask)}
    if "encoder_token_ids" in {tensor.name for tensor in model.inputs}:
        features = {f"{side}_{name}": value for name, value in features.items() for side in ("encoder", "decoder")}
        translator = translator_for(read(model), None, start_token_ids=[0], max_length=20)
        source = translator.read_source_ids(tf.constant(ids), tf.constant(mask))
        found = translator.score(*source, tf.constant(ids), lengths)
    else:
        found = Generator(read(model), dtype=precision).score(tf.constant(ids), lengths)
    return found["log_probs"], generate.expected_log_probs(model, features, ids, mask, precision)


thorough = pytest.mark.thorough


@pytest.mark.parametrize(
    ("make", "policy"),
    [
        (llama, "bfloat16"),
        (bart, "mixed_float16"),
        pytest.param(gpt2, "float16", marks=thorough),
        pytest.param(gemma2, "mixed_bfloat16", marks=thorough),
        pytest.param(bart, "bfloat16", marks=thorough),
    ],
    indirect=["policy"],
)
def test_scores_are_held_against_float32(make, policy):
    found, check = scores_of(build(make))
    assert (check["atol"], check["rtol"]) == (2e-3, 1e-4)
    np.testing.assert_allclose(found, check["expected"]["log_probs"], atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
def test_a_model_beyond_float16_is_still_compared(policy):
    model = build(t5)
    ids, mask = prompts([5])
    features = {f"{side}_token_ids": ids for side in ("encoder", "decoder")}
    features |= {f"{side}_padding_mask": mask for side in ("encoder", "decoder")}
    assert np.isnan(np.asarray(model(features))).any()  # keras-nlp's own, in float16
    found, check = scores_of(model)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, check["expected"]["log_probs"], atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["mixed_bfloat16"], indirect=True)
def test_a_model_with_blocks_of_its_own(policy):
    model = shrink(build(gpt2), heads=[2, 4, 4], ffn=[48, 32, 32])
    found, check = scores_of(model)
    assert check["atol"] == 2e-3
    np.testing.assert_allclose(found, check["expected"]["log_probs"], atol=1e-4)


@pytest.mark.parametrize("policy", ["bfloat16"], indirect=True)
def test_where_none_can_be_built_the_types_say_how_near(policy, monkeypatch):
    model = build(opt)
    exact = scores_of(model)[1]["expected"]["log_probs"]
    monkeypatch.setattr(type(model.backbone), "get_config", lambda self: {})
    assert float32.in_float32(model) is None
    found, check = scores_of(model)
    assert (check["atol"], check["rtol"]) == (8 * 2**-7, 8 * 2**-7)
    np.testing.assert_allclose(found, check["expected"]["log_probs"], atol=check["atol"], rtol=check["rtol"])
    assert np.abs(check["expected"]["log_probs"] - exact).max() > 1e-3  # the model's own, rounded


@pytest.mark.parametrize("policy", ["bfloat16"], indirect=True)
def test_a_config_that_forgets_is_no_measure(policy, monkeypatch):
    model = build(gemma2)
    whole = type(model.backbone).get_config
    monkeypatch.setattr(type(model.backbone), "get_config", lambda self: {**whole(self), "final_logit_soft_cap": None})
    assert float32.in_float32(model) is not None
    found, check = scores_of(model)
    assert check["atol"] == 8 * 2**-7
    np.testing.assert_allclose(found, check["expected"]["log_probs"], atol=check["atol"], rtol=check["rtol"])


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["bfloat16", "mixed_float16"], indirect=True)
def test_a_model_in_less_than_float32_is_exported(policy, tmp_path):
    model = build(llama)
    path = tfvllm.export(model, tmp_path / "1", task="generate", max_length=32, warmup=False)
    assert manifest.read(path)["measured_error"]["max_abs_error"] < 1e-4


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["bfloat16"], indirect=True)
def test_a_wrong_export_of_such_a_model_is_refused(policy, tmp_path, monkeypatch):
    honest = generate.read

    def forgetful(*asked):
        spec = honest(*asked)
        spec.decoder.blocks[0].attention.scale *= 1.05
        return spec

    monkeypatch.setattr(generate, "read", forgetful)
    with pytest.raises(VerificationError, match="differs from the model"):
        tfvllm.export(build(llama), tmp_path / "1", task="generate", max_length=32)
    assert not (tmp_path / "1").exists()

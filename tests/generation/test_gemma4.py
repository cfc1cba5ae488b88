"""Gemma 4: blocks that attend to others' keys and values, token gates, and what its reader does not take."""

import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tfvllm.errors import InputError
from tfvllm.generation import layers
from tfvllm.generation.generator import Generator
from tfvllm.generation.kernels import Portable
from tfvllm.models import read
from tfvllm.savedmodel import manifest, parity

from .general_models import COUNT, ROOM, gemma4_experts, keras_greedy
from .models import build, gemma4, gemma4_wide, prompts
from .reference import keras_generate, log_probs
from .test_causal import caches_of, generate
from .test_families_export import asks, assert_same, exported, own_tokens

M = keras_nlp.models


def few(**options):
    """One block of either kind, and one of either that attends to its keys and values."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return gemma4(layers=4, layer_types=kinds, **options)


@pytest.fixture(scope="module")
def small():
    model = build(few)
    return model, Generator(read(model))


def test_answers_and_log_probabilities_are_those_of_the_forward_pass(small):
    model, generator = small
    ids, mask = prompts([3, 9, 1])
    found, _, _, scores = generate(generator, ids, mask, 6, log_probs=True)
    assert len(np.unique(found)) > 3
    for row, length in enumerate(mask.sum(1)):
        table = log_probs(model, [*ids[row, :length], *found[row]])[length - 1 : -1]
        np.testing.assert_array_equal(found[row], table.argmax(-1))
        np.testing.assert_allclose(scores[row], table.max(-1), atol=1e-4)


def test_only_blocks_with_keys_and_values_of_their_own_have_caches(small):
    model, generator = small
    assert generator.network.cache_shapes == [(2, 8), (2, 12)]
    assert set(generator.cache_specs()) == {"key_0", "value_0", "key_1", "value_1"}
    assert read(model).cache_bytes_per_token(4) == 2 * 2 * (8 + 12) * 4
    blocks = read(model).decoder.blocks
    assert [block.attention.shared for block in blocks] == [None, None, 0, 1]
    widths = [block.attention.query_key_value.kernel.shape[1] for block in blocks]
    assert widths == [(4 + 2 + 2) * 8, (4 + 2 + 2) * 12, 4 * 8, 4 * 12]


def test_a_prompt_owes_one_position_past_the_last_keys_and_values(small, monkeypatch):
    model, _ = small
    rows, linear = [], Portable.linear

    def counted(self, x, *more):
        count = tf.numpy_function(lambda size: rows.append(int(size)), [tf.shape(x)[0]], [])
        with tf.control_dependencies([count]):
            return linear(self, x, *more)

    monkeypatch.setattr(Portable, "linear", counted)
    ids, mask = prompts([16, 4])
    Generator(read(model)).network.prefill(tf.constant(ids), tf.constant(mask.sum(1), tf.int32))
    # The token inputs; query, keys and values, output, up, down, and two of the token gate of each block.
    assert rows.count(2 * 16) == 1 + 6 + 1 and rows.count(2) == 5 + 2 * 6


def test_streaming_from_the_callers_caches_gives_the_same_tokens(small):
    _, generator = small
    ids, mask = prompts([3, 9, 5])
    expected = generate(generator, ids, mask, 6)[0]
    state = generator.prefill(*generator.read_ids(tf.constant(ids), tf.constant(mask)), tf.constant(6))
    tokens = [state["token_ids"].numpy()]
    for _ in range(5):
        state = generator.decode(state["token_ids"], state["positions"], caches_of(state))
        tokens.append(state["token_ids"].numpy())
    np.testing.assert_array_equal(np.stack(tokens, axis=1), expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"enable_moe_block": True, "num_experts": 2, "expert_intermediate_dim": 8}, "experts beside a feed-forward"),
        ({"use_bidirectional_attention": True}, "embedding model"),
        ({"num_kv_shared_layers": 2}, "another model's keys and values"),
        ({"task": {"final_logit_cap": 3.0}}, "caps its logits twice"),
    ],
)
def test_what_the_reader_leaves_is_named(options, said):
    if "num_kv_shared_layers" in options:  # keras-nlp cannot build it without that other model
        model = gemma4(layers=2, num_kv_shared_layers=0)
        model.backbone.num_kv_shared_layers = 2
    else:
        model = gemma4(layers=2, **options)
    with pytest.raises(InputError, match=said):
        read(model)


def test_the_tasks_own_cap():
    model = build(gemma4, layers=2, final_logit_soft_cap=None, task={"final_logit_cap": 3.0})
    assert read(model).logit_soft_cap == 3.0 and read(model.backbone).logit_soft_cap is None
    ids, _ = prompts([5])
    scores = Generator(read(model)).score(tf.constant(ids), tf.constant([5]))["log_probs"].numpy()[0]
    expected = np.take_along_axis(log_probs(model, ids[0])[:-1], ids[0, 1:, np.newaxis], axis=1)[:, 0]
    np.testing.assert_allclose(scores[1:], expected, atol=1e-4)


@pytest.mark.thorough
def test_the_general_path_takes_what_the_reader_leaves_and_says_why(tmp_path):
    model = build(gemma4_experts)
    why = r"the reader of Gemma4Backbone does not take this one \(its blocks have experts"
    with pytest.warns(UserWarning, match="general path: " + why):
        path = tfvllm.export(model, tmp_path / "1", task="generate", max_length=ROOM)
    assert manifest.read(path)["path"] == "general"
    ids, mask = prompts([3, 8, 1])
    request = {"token_ids": ids, "padding_mask": mask, "max_new_tokens": np.int32(COUNT)}
    found = parity.run_here(path, [("serving_default", request)])[0]
    model.compile(sampler="greedy", jit_compile=False)
    assert found["token_ids"].tolist() == keras_greedy(model, ids, mask).tolist()
    with pytest.raises(InputError, match=why):
        tfvllm.export(model, tmp_path / "2", task="generate", max_length=ROOM, precision="bfloat16", target="portable")


@pytest.mark.thorough
@pytest.mark.parametrize("make", [gemma4, gemma4_wide])
def test_a_saved_model_in_a_fresh_process(make, tmp_path):
    model = build(make)
    path = tfvllm.export(model, tmp_path / "1", task="generate", max_length=32)  # held against the Keras model
    batches = [prompts(lengths) for lengths in ([5], [3, 8, 1, 2, 9, 4, 4, 7], [31])]
    name, count = "serving_default", np.int32(6)
    requests = [(name, {"token_ids": i, "padding_mask": m, "max_new_tokens": count}) for i, m in batches]
    for (ids, mask), found in zip(batches, parity.run_fresh(path, requests)):
        room = min(6, 32 - ids.shape[1])
        expected = keras_generate(model, ids, mask, room)
        np.testing.assert_array_equal(found["token_ids"][:, :room], expected)
        assert found["lengths"].tolist() == [room] * len(ids)


@pytest.mark.thorough
@pytest.mark.parametrize("make", [gemma4, gemma4_wide])
def test_prompts_long_enough_for_attention_by_parts(make, monkeypatch):
    monkeypatch.setattr(layers, "LONG", 4)
    model = build(make)
    ids, mask = prompts([3, 33, 17, 1])
    expected = keras_generate(model, ids, mask, 6)
    np.testing.assert_array_equal(generate(Generator(read(model)), ids, mask, 6)[0], expected)


@pytest.mark.thorough
def test_text_stops_where_keras_does(tmp_path):
    model, path = exported(gemma4, tmp_path / "1")
    tokenizer, stops = model.preprocessor.tokenizer, manifest.read(path)["stop_token_ids"]
    assert stops == [tokenizer.end_token_id, tokenizer.token_to_id("<turn|>")] and stops[0] != stops[1]
    (found,) = parity.run_here(path, [asks(gemma4)])
    assert_same(found, own_tokens(gemma4, model, path)[3], stops)


@pytest.mark.thorough
def test_a_preset_with_images_and_sound_is_loaded_as_a_model_of_text(tmp_path):
    towers = {"num_layers": 1, "num_heads": 2}
    sizes = {"image_size": 16, "patch_size": 4, "pool_size": 2, "head_dim": 8, "num_key_value_heads": 2}
    vision = M.Gemma4VisionEncoder(hidden_dim=16, intermediate_dim=24, output_dim=32, **sizes, **towers)
    audio = M.Gemma4AudioEncoder(hidden_size=16, output_proj_dims=16, output_dim=32, **towers)
    model = build(few, vision_encoder=vision, audio_encoder=audio)
    with pytest.raises(InputError, match="it reads images: vision_encoder"):
        read(model)
    with pytest.raises(InputError, match=r"reads .*pixel_values.* beside text"):
        tfvllm.export(model, tmp_path / "1", task="generate", max_length=ROOM)
    model.backbone.save_to_preset(tmp_path / "preset")
    alone = M.Gemma4Backbone.from_preset(str(tmp_path / "preset"), vision_encoder=None, audio_encoder=None)
    held = {variable.path: np.asarray(variable) for variable in model.backbone.variables}
    assert len(alone.variables) > 60
    for variable in alone.variables:
        np.testing.assert_array_equal(np.asarray(variable), held[variable.path])
    ids, mask = prompts([3, 9])
    found = generate(Generator(read(alone)), ids, mask, 4)[0]
    model_of_text = M.Gemma4CausalLM(preprocessor=None, backbone=alone)
    np.testing.assert_array_equal(found, keras_generate(model_of_text, ids, mask, 4))

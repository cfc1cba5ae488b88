"""The decoder of a shrunk model is read like any other: the tokens are those of the shrunk Keras model."""

import numpy as np
import pytest

import tfvllm
from tests.models import zoo
from tfvllm.generation.generator import Generator
from tfvllm.models import adapter_for, read
from tfvllm.savedmodel import manifest, parity

from .models import bloom, build, falcon, gpt_neo_x, gpt_oss, mixtral, phi3, qwen3_moe, qwen_moe, smollm3
from .reference import filled_by_forward_passes, keras_generate, keras_prompts, log_probs
from .small_tokenizers import text_options
from .test_causal import generate
from .test_families_export import COUNT, TEXTS, asks

NAMES = ("bloom", "phi3", "gpt_neo_x", "falcon", "smollm3", *zoo.EXPERTS)


def shrunk(name):
    heads = [2, 4] if name in zoo.GROUPED else [3, 2]
    more = {"experts": [1, 3]} if name in zoo.EXPERTS else {}
    model = tfvllm.shrink(zoo.build(name), layers=[0, 2], heads=heads, ffn=[7, 8], width=10, round_to=2, **more)
    assert [block.heads for block in adapter_for(model).blocks(model)] == heads
    return model


def test_shrunk_bloom_is_read_with_the_slopes_of_the_heads_that_stayed():
    model = shrunk("bloom")
    first, second = (block.attention.alibi for block in read(model).decoder.blocks)
    assert len(first) == 3 and len(second) == 2
    assert set(first) < {2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8} > set(second)
    check_against_forward_passes(model)


def check_against_forward_passes(model):
    ids = np.zeros([2, 9], np.int32)
    ids[:, :5] = zoo.inputs("gpt2")["token_ids"][:2, :5] + 1
    mask = np.asarray([[1] * 5, [1] * 3 + [0] * 2], np.int32)
    filled = filled_by_forward_passes(model, ids, [5, 3])
    found, _, _, scores = generate(Generator(read(model)), ids[:, :5] * mask, mask, 4, log_probs=True)
    np.testing.assert_array_equal(found, [filled[0, 5:], filled[1, 3:7]])
    for row, length in enumerate([5, 3]):
        table = log_probs(model, filled[row, : length + 4])
        expected = [table[length - 1 + step, token] for step, token in enumerate(found[row])]
        np.testing.assert_allclose(scores[row], expected, atol=1e-4)


@pytest.mark.parametrize("name", zoo.families(quick=(), names=NAMES))
def test_tokens_and_their_probabilities_are_those_of_the_shrunk_model(name):
    model, found = shrunk(name), zoo.inputs(name)
    check_against_forward_passes(model)
    ids, mask = found["token_ids"], found["padding_mask"]
    np.testing.assert_array_equal(
        generate(Generator(read(model)), ids, mask, 6)[0], keras_generate(model, ids, mask, 6)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    (bloom, phi3, gpt_neo_x, falcon, smollm3, mixtral, qwen_moe, qwen3_moe, gpt_oss),
    ids=lambda make: make.__name__,
)
def test_a_shrunk_model_is_exported_with_its_tokenizer(make, tmp_path):
    whole = build(make, **text_options(make.__name__))
    sizes = {"heads": 2, "ffn": 24, "width": 24, "round_to": 8}
    if make in (mixtral, qwen3_moe, gpt_oss):  # of Qwen-MoE keras-nlp builds the layer without experts for both
        sizes["experts"] = 3
    model = tfvllm.shrink(whole, **sizes)
    path = tfvllm.export(model, tmp_path / "1", task="generate", max_length=40, warmup=False, check=None)
    ids, mask = keras_prompts(model, TEXTS)
    expected = keras_generate(model, ids, mask, COUNT)
    (found,) = parity.run_fresh_each([(path, [asks(make)])])[0]
    stops = manifest.read(path)["stop_token_ids"]
    for row, tokens in enumerate(expected):
        hits = np.flatnonzero(np.isin(tokens, stops))
        length = hits[0] + 1 if len(hits) else COUNT
        np.testing.assert_array_equal(found["token_ids"][row, :length], tokens[:length])

"""Families that no reader knows: keras-nlp's own step inside the loop, through SavedModels in a fresh process.

Some of these have a reader; here it is not looked for.
"""

import functools
import types

import keras
import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tfvllm.errors import InputError
from tfvllm.families import registry
from tfvllm.generation.model_generator import ModelGenerator
from tfvllm.savedmodel import manifest, parity, protos

from .general_models import (
    COUNT,
    EXPERTS,
    FIXED,
    GROUPED,
    ROOM,
    SMALL,
    WRONG,
    built,
    forward_greedy,
    gemma3n,
    gemma4_experts,
    keras_greedy,
    qwen3_5,
    qwen3_5_moe,
    rwkv7,
)
from .models import falcon, gemma4, gpt_oss, mixtral, prompts, qwen3_moe, qwen_moe
from .small_tokenizers import text_options


@pytest.fixture(scope="module", autouse=True)
def no_readers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "READERS", {})
        yield


FAMILIES = (
    *(falcon, mixtral, qwen_moe, qwen3_moe, gpt_oss, rwkv7),
    *(qwen3_5, qwen3_5_moe, gemma3n, gemma4, gemma4_experts),
)
QUICK = (falcon,)
THOROUGH = (rwkv7, gemma3n, gemma4_experts)


def marked(make):
    marks = () if make in QUICK else pytest.mark.thorough if make in THOROUGH else pytest.mark.slow
    return pytest.param(make, marks=marks, id=make.__name__)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function of a model's builder: (the model, its SavedModel on ids); each is exported once."""

    @functools.cache
    def export(make):
        model = built(make)
        own = model.sampler
        path = tmp_path_factory.mktemp("general") / "1"
        with pytest.warns(UserWarning, match="general path"):
            tfvllm.export(model, path, task="generate", max_length=ROOM)
        assert model.sampler is own
        return model, path

    yield export
    export.cache_clear()


@pytest.mark.parametrize("make", map(marked, FAMILIES))
def test_greedy_tokens_are_keras_own_in_a_fresh_process(exported, make):
    model, path = exported(make)
    batches = [prompts(lengths) for lengths in ([5], [3, 8, 1], [7, 7])]
    count = np.int32(COUNT)
    requests = [
        ("serving_default", {"token_ids": ids, "padding_mask": mask, "max_new_tokens": count}) for ids, mask in batches
    ]
    if make is rwkv7:
        model.generate_function = model.make_generate_function()
    for (ids, mask), found in zip(batches, parity.run_fresh(path, requests)):
        room = ROOM - ids.shape[1] if make in FIXED else COUNT
        expected = forward_greedy(model, ids, mask) if make in WRONG else keras_greedy(model, ids, mask, room)
        assert found["token_ids"].tolist() == expected.tolist()
        assert found["lengths"].tolist() == [COUNT] * len(ids)
    document = manifest.read(path)
    assert document["path"] == "general" and document["family"] == type(model.backbone).__name__
    if make not in WRONG:
        assert ("every request computes" in document["notes"][0]) == (make in FIXED)
    assert ("a forward pass over its whole row" in document["notes"][0]) == (make in WRONG)
    assert set(document["signatures"]) == {"serving_default", "generate", "score"}


@pytest.fixture
def small(exported):
    """(model, the SavedModel) of one family."""
    return exported(falcon)


def test_controls_limits_and_empty_rows(small):
    model, path = small
    ids, mask = prompts([4, 6])
    neutral = {
        "temperature": np.float32(0),
        "top_k": np.int32(0),
        "top_p": np.float32(1),
        "repetition_penalty": np.float32(1),
        "no_repeat_ngram": np.int32(0),
        "seed": np.int32(0),
    }

    def ask(ids, mask, count=COUNT, **controls):
        given = {"token_ids": ids, "padding_mask": mask, "max_new_tokens": np.int32(count), **neutral, **controls}
        return "generate", given

    warm = {"temperature": np.float32(3.0), "seed": np.int32(5)}
    long_ids, long_mask = prompts([ROOM + 5])
    found = parity.run_here(
        path,
        [
            ask(ids, mask),
            ask(ids, mask, **warm),
            ask(ids, mask, **warm),
            ask(ids, mask, **{**warm, "seed": np.int32(6)}),
            ask(ids, mask, no_repeat_ngram=np.int32(1)),
            ask(ids, mask * np.array([[1], [0]], np.int32)),
            ask(ids[:0], mask[:0]),
            ask(ids, mask, count=0),
            ask(long_ids, long_mask),
            ask(np.flip(ids, 1), np.flip(mask, 1)),
        ],
    )
    greedy, once, again, other, no_repeat, empty, none, nothing, long_row, left = found
    assert once["token_ids"].tolist() == again["token_ids"].tolist() != other["token_ids"].tolist()
    for row, prompt in zip(no_repeat["token_ids"], ids):
        new = row[row != 0].tolist()
        assert not set(new) & set(prompt[prompt != 0].tolist()) and len(set(new)) == len(new)
    assert empty["finish_reasons"].tolist()[1] == b"empty" and empty["lengths"][1] == 0
    assert empty["token_ids"][0].tolist() == greedy["token_ids"][0].tolist()
    assert none["token_ids"].shape == (0, COUNT) and nothing["token_ids"].shape == (2, 0)
    assert long_row["lengths"].tolist() == [1] and long_row["finish_reasons"].tolist() == [b"length"]
    flipped = np.flip(ids, 1)  # padding in front
    reference = keras_greedy(
        model, *(np.stack([np.roll(r, -n) for r, n in zip(part, [2, 0])]) for part in (flipped, np.flip(mask, 1)))
    )
    assert left["token_ids"].tolist() == reference.tolist()
    scored = parity.run_here(
        path,
        [("score", {"token_ids": np.c_[ids[1:], greedy["token_ids"][1:]], "padding_mask": np.ones([1, 12], np.int32)})],
    )[0]
    np.testing.assert_allclose(scored["log_probs"][:, 6:], greedy["log_probs"][1:], atol=1e-4)


def stopping(model):
    """(request, a stop token, the answers that end with it)."""
    ids, mask = prompts([4, 6])
    plain = keras_greedy(model, ids, mask)
    stop = int(plain[0][2])
    lengths = [row.index(stop) + 1 if stop in row else COUNT for row in plain.tolist()]
    assert lengths[0] < COUNT
    answers = [row[:length] + [0] * (COUNT - length) for row, length in zip(plain.tolist(), lengths)]
    request = {"token_ids": ids, "padding_mask": mask, "max_new_tokens": np.int32(COUNT)}
    return request, stop, answers, lengths


def test_a_stop_token_ends_its_row_alone(small):
    model, _ = small
    request, stop, answers, lengths = stopping(model)
    generator = ModelGenerator(model, max_length=ROOM, stop_ids=(stop,))

    @tf.function(autograph=False)
    def run(token_ids, padding_mask, max_new_tokens):
        result = generator.generate(*generator.read_ids(token_ids, padding_mask), max_new_tokens)
        return result.token_ids, result.lengths

    found = run(**{name: tf.constant(value) for name, value in request.items()})
    assert found[0].numpy().tolist() == answers and found[1].numpy().tolist() == lengths


@pytest.mark.thorough
def test_stop_tokens_are_stored(small, tmp_path):
    model, _ = small
    request, stop, answers, lengths = stopping(model)
    path = tmp_path / "1"
    tfvllm.export(model, path, task="generate", max_length=ROOM, stop_token_ids=[stop], check=None, warmup=False)
    found = parity.run_here(path, [("serving_default", request)])[0]
    assert found["token_ids"].tolist() == answers and found["lengths"].tolist() == lengths
    assert manifest.read(path)["stop_token_ids"] == [stop]


@pytest.mark.thorough
def test_text_in_text_out(tmp_path):
    options = text_options("llama")
    model = keras_nlp.models.MixtralCausalLM(
        keras_nlp.models.MixtralBackbone(
            **{**SMALL, "vocabulary_size": options["preprocessor"].tokenizer.vocabulary_size()}, **GROUPED, **EXPERTS
        ),
        None,
    )
    model.preprocessor = options["preprocessor"]
    path = tfvllm.export(model, tmp_path / "1", task="generate", max_length=24, max_new_tokens=5)
    assert not [node for node in protos.read_proto(path).meta_graphs[0].graph_def.node if node.op.startswith("Xla")]
    found = parity.run_fresh(path, [("serving_default", {"prompts": np.array([b"a quick brown fox", b""], object)})])[0]
    assert found["texts"][0].startswith(b"a quick brown fox") and found["texts"][0].endswith(found["completions"][0])


@pytest.mark.parametrize(
    "options, said",
    [
        ({"precision": "bfloat16"}, "no reader knows FalconBackbone, so that it runs as it is"),
        ({"target": "onednn"}, "its public ops stay"),
    ],
)
def test_what_needs_a_reader_is_refused(small, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        tfvllm.export(small[0], tmp_path / "1", task="generate", max_length=ROOM, **options)
    assert not (tmp_path / "1").exists()


def test_where_the_step_computes_something_else_forward_passes_do(tmp_path):
    class Forgetful(keras_nlp.models.FalconCausalLM):
        def call_with_cache(self, token_ids, cache, cache_update_index):
            return super().call_with_cache(token_ids, cache * 0.0, cache_update_index)

    keras.utils.set_random_seed(1)
    model = Forgetful(keras_nlp.models.FalconBackbone(num_attention_heads=4, **{**SMALL, "num_layers": 1}), None)
    for weight in model.backbone.weights:
        weight.assign(weight * 8.0)
    with pytest.warns(UserWarning, match="each token takes a forward pass over its whole row"):
        path = tfvllm.export(model, tmp_path / "1", task="generate", max_length=ROOM, check=None, warmup=False)
    ids, mask = prompts([3, 8, 1])
    request = {"token_ids": ids, "padding_mask": mask, "max_new_tokens": np.int32(COUNT)}
    found = parity.run_here(path, [("serving_default", request)])[0]["token_ids"]
    expected = forward_greedy(model, ids, mask).tolist()
    assert found.tolist() == expected != keras_greedy(model, ids, mask).tolist()


@pytest.mark.parametrize(
    "inputs, said",
    [
        (["token_ids", "padding_mask", "images"], r"reads images beside text"),
        (["encoder_token_ids", "decoder_token_ids"], r"is sequence to sequence"),
    ],
)
def test_what_reads_more_than_text_is_refused_by_name(inputs, said, tmp_path):
    model = types.SimpleNamespace(input=dict.fromkeys(inputs), generate_step=None, sampler=None, backbone=None)
    with pytest.raises(InputError, match=said):
        tfvllm.export(model, tmp_path / "1", task="generate")


def test_what_is_no_causal_model_is_refused(text_classifier, tmp_path):
    with pytest.raises(InputError, match="cannot generate with BertTextClassifier; expected a keras-nlp CausalLM"):
        tfvllm.export(text_classifier, tmp_path / "1", task="generate")

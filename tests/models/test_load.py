"""Models from where they are: GGUF files as llama.cpp writes them, inside packages, and what is none."""

import sys

import gguf
import keras
import keras_nlp
import numpy as np
import pytest

import tfvllm
from tests.generation.small_tokenizers import preprocessor_of
from tfvllm.cli import main
from tfvllm.errors import InputError
from tfvllm.models.gguf import chat_template
from tfvllm.savedmodel import parity

M = keras_nlp.models
TEXTS = ["a quick brown fox", "the dog, caf\u00e9 \u4f60\u597d"]


def sizes(tokenizer):
    grouped = {"num_query_heads": 4, "num_key_value_heads": 2}
    width = {"hidden_dim": 32, "intermediate_dim": 64, "num_layers": 2}
    return {"vocabulary_size": tokenizer.vocabulary_size(), "layer_norm_epsilon": 3e-5, **grouped, **width}


GEMMA = {
    "gemma": {},
    "gemma2": {
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "attention_logit_soft_cap": 50.0,
        "final_logit_soft_cap": 30.0,
        "use_sliding_window_attention": True,
        "sliding_window_size": 6,
    },
}


def model_of(family: str):
    """A tiny model of a family with the tokenizer of `small_tokenizers`."""
    keras.utils.set_random_seed(5)
    preprocessor = preprocessor_of(family)
    given = sizes(preprocessor.tokenizer)
    if family == "llama":
        return M.LlamaCausalLM(M.LlamaBackbone(**given), preprocessor)
    if family == "llama3":
        backbone = M.Llama3Backbone(tie_word_embeddings=True, rope_max_wavelength=500.0, **given)
        return M.Llama3CausalLM(backbone, preprocessor)
    if family.startswith("gemma"):
        given["intermediate_dim"] *= 2
        model = M.GemmaCausalLM(M.GemmaBackbone(head_dim=12, **given, **GEMMA[family]), preprocessor)
    elif family == "qwen":
        model = M.QwenCausalLM(M.QwenBackbone(tie_word_embeddings=False, **given), preprocessor)
    elif family == "qwen3":
        model = M.Qwen3CausalLM(M.Qwen3Backbone(head_dim=16, sliding_window_size=None, **given), preprocessor)
    else:
        for name in ("num_key_value_heads", "layer_norm_epsilon"):
            given.pop(name)
        heads = given.pop("num_query_heads")
        model = M.GPT2CausalLM(M.GPT2Backbone(num_heads=heads, max_sequence_length=48, **given), preprocessor)
    random = np.random.default_rng(2)
    for weight in model.backbone.weights:  # biases and norms too
        weight.assign(weight + random.normal(size=weight.shape) * 0.1)
    return model


def write(model, path, *, kind="F32", leave_out=(), **fields):
    """Writes `model` as llama.cpp's converter lays it out."""
    backbone, tokenizer = model.backbone, model.preprocessor.tokenizer
    architecture = {"Llama": "llama", "Qwen": "qwen2", "Qwen3": "qwen3", "GPT2": "gpt2", "Gemma": "gemma"}[
        type(backbone).__name__.removesuffix("Backbone").replace("Llama3", "Llama")
    ]
    if getattr(backbone, "use_post_ffw_norm", False):
        architecture = "gemma2"
    writer = gguf.GGUFWriter(path, fields.pop("architecture", architecture))
    writer.add_block_count(backbone.num_layers)
    writer.add_embedding_length(backbone.hidden_dim)
    writer.add_feed_forward_length(backbone.intermediate_dim // (2 if architecture.startswith("gemma") else 1))
    writer.add_context_length(getattr(backbone, "max_sequence_length", 64))
    heads = getattr(backbone, "num_query_heads", None) or backbone.num_heads
    writer.add_head_count(heads)
    if architecture != "gpt2":
        writer.add_head_count_kv(backbone.num_key_value_heads)
        writer.add_layer_norm_rms_eps(backbone.layer_norm_epsilon)
        writer.add_rope_freq_base(float(getattr(backbone, "rope_max_wavelength", 10000)))
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(backbone.attention_logit_soft_cap)
        writer.add_final_logit_softcapping(backbone.final_logit_soft_cap)
        writer.add_sliding_window(backbone.sliding_window_size)
    if architecture in ("qwen3", "gemma", "gemma2"):
        writer.add_key_length(backbone.head_dim)
    _write_words(writer, tokenizer, fields)
    for name, value in _tensors(architecture, backbone).items():
        if name not in leave_out:
            wide = np.ascontiguousarray(value, "float32")
            as_kind = gguf.GGMLQuantizationType[kind if wide.ndim == 2 else "F32"]
            writer.add_tensor(name, gguf.quantize(wide, as_kind), raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_words(writer, tokenizer, fields):
    words = [tokenizer.id_to_token(i) for i in range(tokenizer.vocabulary_size())]
    if hasattr(tokenizer, "merges"):
        special = set(tokenizer.unsplittable_tokens or []) | set(tokenizer.special_tokens)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges(list(tokenizer.merges))
        writer.add_token_types([3 if word in special else 1 for word in words])
    else:
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.proto)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([piece.score for piece in proto.pieces])
        writer.add_token_types([piece.type for piece in proto.pieces])
        writer.add_unk_token_id(tokenizer._unk_token_id)
    writer.add_token_list(words)
    for name in ("bos", "eos"):
        index = tokenizer.token_to_id(fields[name]) if name in fields else None
        own = tokenizer.start_token_id if name == "bos" else tokenizer.end_token_id
        if (own if index is None else index) is not None:
            getattr(writer, f"add_{name}_token_id")(int(own if index is None else index))
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")


def _tensors(architecture, backbone) -> dict[str, np.ndarray]:
    """llama.cpp's names and layouts ([outputs, inputs]) of a keras-nlp backbone's weights."""

    def flat(dense, outputs_first=True):
        kernel = np.asarray(dense.kernel)
        return kernel.reshape(backbone.hidden_dim, -1).T if outputs_first else kernel.reshape(-1, backbone.hidden_dim).T

    def turned(rows, count):  # what llama.cpp does to Llama's queries and keys
        return rows.reshape(count, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)

    found = {"token_embd.weight": np.asarray(backbone.token_embedding.embeddings)}
    if architecture == "gpt2":
        found["position_embd.weight"] = np.asarray(backbone.position_embedding.position_embeddings)
        norm = backbone.get_layer("layer_norm")
        found |= {"output_norm.weight": norm.gamma, "output_norm.bias": norm.beta}
        for i, layer in enumerate(backbone.transformer_layers):
            attention, at = layer._self_attention_layer, f"blk.{i}."
            three = [attention.query_dense, attention.key_dense, attention.value_dense]
            found[f"{at}attn_qkv.weight"] = np.concatenate([flat(dense) for dense in three])
            found[f"{at}attn_qkv.bias"] = np.concatenate([np.asarray(dense.bias).ravel() for dense in three])
            found[f"{at}attn_output.weight"] = flat(attention.output_dense, outputs_first=False)
            found[f"{at}attn_output.bias"] = attention.output_dense.bias
            for name, norm in (("attn", layer._self_attention_layer_norm), ("ffn", layer._feedforward_layer_norm)):
                found |= {f"{at}{name}_norm.weight": norm.gamma, f"{at}{name}_norm.bias": norm.beta}
            up, down = layer._feedforward_intermediate_dense, layer._feedforward_output_dense
            found |= {f"{at}ffn_up.weight": np.asarray(up.kernel).T, f"{at}ffn_up.bias": up.bias}
            found |= {f"{at}ffn_down.weight": np.asarray(down.kernel).T, f"{at}ffn_down.bias": down.bias}
        return found
    if architecture.startswith("gemma"):
        found["output_norm.weight"] = 1 + np.asarray(backbone.get_layer("final_normalization").scale)
        for i, layer in enumerate(backbone.transformer_layers):
            attention, at = layer.attention, f"blk.{i}."
            for name in ("query", "key", "value"):  # [heads, width, head_dim]
                kernel = np.asarray(getattr(attention, f"{name}_dense").kernel)
                found[f"{at}attn_{name[0]}.weight"] = kernel.swapaxes(1, 2).reshape(-1, backbone.hidden_dim)
            found[f"{at}attn_output.weight"] = (
                np.asarray(attention.output_dense.kernel).reshape(-1, backbone.hidden_dim).T
            )
            for name, dense in (("gate", layer.gating_ffw), ("up", layer.gating_ffw_2), ("down", layer.ffw_linear)):
                found[f"{at}ffn_{name}.weight"] = np.asarray(dense.kernel).T
            norms = {"attn_norm": layer.pre_attention_norm, "ffn_norm": layer.pre_ffw_norm}
            if architecture == "gemma2":
                norms |= {"post_attention_norm": layer.post_attention_norm, "post_ffw_norm": layer.post_ffw_norm}
            found |= {f"{at}{name}.weight": 1 + np.asarray(norm.scale) for name, norm in norms.items()}
        return found
    found["output_norm.weight"] = backbone.get_layer("sequence_output_layernorm").scale
    if not backbone.tie_word_embeddings:
        found["output.weight"] = np.asarray(backbone.token_embedding.reverse_embeddings).T
    for i in range(backbone.num_layers):
        layer, at = backbone.get_layer(f"transformer_layer_{i}"), f"blk.{i}."
        attention = layer._self_attention_layer
        for letter, dense, count in (
            ("q", attention._query_dense, backbone.num_query_heads),
            ("k", attention._key_dense, backbone.num_key_value_heads),
            ("v", attention._value_dense, None),
        ):
            rows = flat(dense)
            found[f"{at}attn_{letter}.weight"] = turned(rows, count) if architecture == "llama" and count else rows
            if architecture == "qwen2":
                found[f"{at}attn_{letter}.bias"] = np.asarray(dense.bias).ravel()
        if architecture == "qwen3":
            found[f"{at}attn_q_norm.weight"] = attention._query_dense_layer_norm.scale
            found[f"{at}attn_k_norm.weight"] = attention._key_dense_layer_norm.scale
        found[f"{at}attn_output.weight"] = flat(attention._output_dense, outputs_first=False)
        found[f"{at}attn_norm.weight"] = layer._self_attention_layernorm.scale
        found[f"{at}ffn_norm.weight"] = layer._feedforward_layernorm.scale
        for name, dense in (("gate", "gate"), ("up", "intermediate"), ("down", "output")):
            found[f"{at}ffn_{name}.weight"] = np.asarray(getattr(layer, f"_feedforward_{dense}_dense").kernel).T
    return found


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen", "qwen3", "gpt2", "gemma", "gemma2"])
def test_a_gguf_file_is_the_model_that_was_written(family, tmp_path):
    model = model_of(family)
    loaded = tfvllm.models.load(write(model, tmp_path / "model.gguf"))
    features = {"token_ids": np.array([[5, 9, 7, 3], [8, 4, 0, 0]]), "padding_mask": np.array([[1] * 4, [1, 1, 0, 0]])}
    np.testing.assert_allclose(loaded(features), model(features), atol=1e-5)
    ours, theirs = (each.preprocessor.tokenizer for each in (loaded, model))
    for text in TEXTS:
        assert list(ours(text)) == list(theirs(text))
    assert (ours.start_token_id, ours.end_token_id) == (theirs.start_token_id, theirs.end_token_id)
    assert loaded.preprocessor.sequence_length == getattr(model.backbone, "max_sequence_length", 64)
    assert chat_template(tmp_path / "model.gguf") == "{{ messages }}"


def test_weights_of_few_bits_become_what_they_stand_for(tmp_path):
    model = model_of("llama3")
    loaded = tfvllm.models.load(write(model, tmp_path / "model.gguf", kind="Q8_0"))
    for own, found in zip(model.weights, loaded.weights):
        own, found = np.asarray(own), np.asarray(found)
        assert np.abs(own - found).max() <= np.abs(own).max() / 127


def test_another_end_token_ends_texts_too(tmp_path):
    model = model_of("qwen")
    end = model.preprocessor.tokenizer.id_to_token(4)
    tokenizer = tfvllm.models.load(write(model, tmp_path / "model.gguf", eos=end)).preprocessor.tokenizer
    assert tokenizer.end_token_id == model.preprocessor.tokenizer.end_token_id and tokenizer.end_token2_id == 4


def test_what_is_no_such_model_is_refused_in_one_line(tmp_path):
    model = model_of("gpt2")
    whole = write(model, tmp_path / "whole.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    text = tmp_path / "text.gguf"
    text.write_text("not a model")
    unknown = write(model, tmp_path / "unknown.gguf", architecture="mamba")
    without = write(model, tmp_path / "without.gguf", leave_out=("blk.1.ffn_up.bias",))
    for path, said in (
        (cut, "is no whole GGUF file"),
        (text, "is no whole GGUF file"),
        (unknown, "architecture 'mamba'; expected one of llama, qwen2, qwen3, gemma, gemma2, gpt2"),
        (without, "has no weight 'blk.1.ffn_up.bias'"),
    ):
        with pytest.raises(InputError, match=said) as refused:
            tfvllm.models.load(path)
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="expected task 'generate', found 'classify'"):
        tfvllm.models.load(whole, "classify")
    for where, said in (
        ("nowhere.keras", "no file nowhere.keras; expected"),
        ("no_such_preset_en", "nor a keras-nlp preset of that name"),
        ("no_such_package:model.gguf", "no package no_such_package is installed"),
        ("tfvllm:*.gguf", "expected one file or folder in tfvllm, found 0; it holds"),
    ):
        with pytest.raises(InputError, match=said):
            tfvllm.models.load(where)


def test_inside_a_package_which_is_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "holds_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write(model_of("gpt2"), package / "small.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(tfvllm.models.load("holds_a_model:*.gguf"), M.GPT2CausalLM)
    assert "holds_a_model" not in sys.modules


@pytest.mark.thorough
def test_exported_it_writes_keras_nlps_texts(tmp_path):
    path = write(model_of("llama3"), tmp_path / "model.gguf")
    with pytest.raises(SystemExit) as ended:
        main(["export", str(path), str(tmp_path / "1"), "--task", "generate", "--max-length", "24"])
    assert not ended.value.code
    found = parity.run_fresh(tmp_path / "1", [("serving_default", {"prompts": np.array([b"a quick"], object)})])[0]
    model = tfvllm.models.load(path)
    model.compile(sampler="greedy", jit_compile=False)
    assert found["texts"][0].decode() == model.generate(["a quick"], max_length=24)[0]

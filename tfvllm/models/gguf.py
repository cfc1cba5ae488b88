"""Language models from llama.cpp's GGUF files, as keras-nlp models with their tokenizers.

A GGUF file holds a model's sizes, its vocabulary and its weights, mostly in 4 to 8 bits: they become what these bits
stand for, in float32. keras-nlp's own converters of Hugging Face models put them in their places; here their names, and
what llama.cpp changes of them, are undone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np

from tfvllm.errors import InputError

# Kinds of tokens, as in SentencePiece's model files.
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6


def load_gguf(path: Path, length: int | None = None) -> keras.Model:
    """The keras-nlp `CausalLM` of a GGUF file, with a preprocessor.

    Args:
        path: the file.
        length: tokens of prompt and answer for the preprocessor; default 1,024, or the model's context if that is less.

    Raises:
        InputError: it is no whole GGUF file, its architecture is none of those known here, a weight is missing or
            stored in an unknown type, or the package gguf is not installed.
    """
    file = _File(path)
    build = _ARCHITECTURES.get(file.architecture)
    if build is None:
        raise InputError(
            f"{path} holds the architecture {file.architecture!r}; expected one of {', '.join(_ARCHITECTURES)}. Load "
            "the model from a Hugging Face folder, if keras-nlp knows it."
        )
    context = int(file.value("context_length", 1024))
    model = build(file, min(length or 1024, context))
    # What keras-nlp's tokenizers have no place for; kept for `save_huggingface`.
    tokenizer = model.preprocessor.tokenizer
    tokenizer.chat_template = file.fields.get("tokenizer.chat_template")
    tokenizer.cuts_words_as = file.fields.get("tokenizer.ggml.pre")
    return model


def chat_template(path: str | os.PathLike) -> str | None:
    """The Jinja template of a conversation that a GGUF file holds, or None."""
    return _File(Path(path)).fields.get("tokenizer.chat_template")


class _File:
    """What a GGUF file says, by name, and its weights."""

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            raise InputError(f"reading {path} needs the package gguf: pip install gguf") from None
        self.path, self._gguf = path, gguf
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:  # whatever the reader makes of other bytes
            said = " ".join(str(error).split())[:200]
            raise InputError(f"{path} is no whole GGUF file: {said}. Download or convert it again.") from None
        self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self.fields.get("general.architecture"))

    def value(self, name: str, default: Any = None) -> Any:
        """A number of the architecture's, such as "block_count"; InputError where it is missing and has no default."""
        found = self.fields.get(f"{self.architecture}.{name}", default)
        if found is None:
            raise InputError(f"{self.path} does not say {self.architecture}.{name}. Convert it again.")
        return found

    def holds(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> np.ndarray:
        """A weight as float32, its axes as in Hugging Face's files."""
        if name not in self._tensors:
            raise InputError(f"{self.path} has no weight {name!r}. Convert it again.")
        stored = self._tensors[name]
        try:
            return self._gguf.dequantize(stored.data, stored.tensor_type).astype("float32")
        except (NotImplementedError, ValueError) as error:
            kind = getattr(stored.tensor_type, "name", stored.tensor_type)
            raise InputError(
                f"{self.path}: {name} is stored as {kind}, which cannot be read ({error}). Use another quantisation, "
                "such as Q8_0 or Q4_K."
            ) from None

    def named(self, name: str) -> str:
        """llama.cpp's name of Hugging Face's weight `name`."""
        architecture = next(key for key, value in self._gguf.MODEL_ARCH_NAMES.items() if value == self.architecture)
        stem, _, suffix = name.rpartition(".")
        found = self._gguf.get_tensor_name_map(architecture, self.value("block_count")).get_name(stem)
        if found is None:
            raise InputError(f"{self.path}: no weight of {self.architecture} is called {name!r}.")
        return f"{found}.{suffix}"


class _Loader:
    """In the place of keras-nlp's loader of safetensors: `port_weight` is all that its converters call.

    `undo(name, weight)` brings a weight back to how Hugging Face has it.
    """

    def __init__(self, file: _File, undo: Callable[[str, np.ndarray], np.ndarray]):
        self._file, self._undo = file, undo

    def port_weight(self, keras_variable, hf_weight_key: str, hook_fn=None) -> None:
        weight = self._undo(hf_weight_key, self._file.tensor(self._file.named(hf_weight_key)))
        if hook_fn is not None:
            weight = hook_fn(weight, list(keras_variable.shape))
        if tuple(weight.shape) != tuple(keras_variable.shape):
            raise InputError(
                f"{self._file.path}: {hf_weight_key} has shape {tuple(weight.shape)}; expected "
                f"{tuple(keras_variable.shape)}. Convert it again."
            )
        keras_variable.assign(weight)


# --- architectures ----------------------------------------------------------------------------------------------------


def _llama(file: _File, length: int) -> keras.Model:
    import keras_nlp
    from keras_hub.src.utils.transformers import convert_llama3

    scaled = [name for name in ("rope.scaling.type", "rope.scale_linear") if f"llama.{name}" in file.fields]
    if scaled or file.holds("rope_freqs.weight"):
        raise InputError(f"{file.path} stretches its rotary positions, which is not read from GGUF files.")
    sizes = _sizes(file)
    heads, groups = sizes["num_query_heads"], sizes["num_key_value_heads"]
    head_dim = sizes["hidden_dim"] // heads
    if file.value("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{file.path} turns a part of each head's channels only; expected all {head_dim}.")
    words = _Words(file)
    pieces = words.kind == "llama"
    backbone = (keras_nlp.models.LlamaBackbone if pieces else keras_nlp.models.Llama3Backbone)(**sizes)

    def undo(name: str, weight: np.ndarray) -> np.ndarray:
        """llama.cpp turns neighbouring channels, Keras those of the two halves."""
        if not re.search(r"self_attn\.[qk]_proj\.weight$", name):
            return weight
        rows = weight.reshape(heads if ".q_proj" in name else groups, -1, 2, weight.shape[1])
        return rows.swapaxes(1, 2).reshape(weight.shape)

    convert_llama3.convert_weights(backbone, _Loader(file, undo), {})
    if pieces:
        tokenizer = keras_nlp.models.LlamaTokenizer(words.sentence_piece())
        preprocessor = keras_nlp.models.LlamaCausalLMPreprocessor(tokenizer, length, add_start_token=words.starts(True))
        return keras_nlp.models.LlamaCausalLM(backbone, preprocessor)
    tokenizer = keras_nlp.models.Llama3Tokenizer(
        words.vocabulary(),
        words.merges(),
        bos_token=words.special("bos"),
        eos_token=words.special("eos"),
        misc_special_tokens=words.unsplittable(),
    )
    preprocessor = keras_nlp.models.Llama3CausalLMPreprocessor(tokenizer, length, add_start_token=words.starts(False))
    return keras_nlp.models.Llama3CausalLM(backbone, preprocessor)


def _qwen2(file: _File, length: int) -> keras.Model:
    import keras_nlp
    from keras_hub.src.utils.transformers import convert_qwen

    backbone = keras_nlp.models.QwenBackbone(**_sizes(file))
    convert_qwen.convert_weights(backbone, _Loader(file, _as_it_is), {})
    tokenizer = _Words(file).byte_pairs(keras_nlp.models.QwenTokenizer)
    return keras_nlp.models.QwenCausalLM(backbone, keras_nlp.models.QwenCausalLMPreprocessor(tokenizer, length))


def _qwen3(file: _File, length: int) -> keras.Model:
    import keras_nlp
    from keras_hub.src.utils.transformers import convert_qwen3

    head_dim = file.value("attention.key_length", file.value("embedding_length") // file.value("attention.head_count"))
    backbone = keras_nlp.models.Qwen3Backbone(head_dim=head_dim, sliding_window_size=None, **_sizes(file))
    convert_qwen3.convert_weights(backbone, _Loader(file, _as_it_is), {})
    tokenizer = _Words(file).byte_pairs(keras_nlp.models.Qwen3Tokenizer)
    return keras_nlp.models.Qwen3CausalLM(backbone, keras_nlp.models.Qwen3CausalLMPreprocessor(tokenizer, length))


def _gemma(file: _File, length: int) -> keras.Model:
    """Gemma 1 and 2."""
    import keras_nlp
    from keras_hub.src.utils.transformers import convert_gemma

    sizes = _sizes(file)
    sizes["intermediate_dim"] *= 2  # keras-nlp counts gate and up together
    if not sizes.pop("tie_word_embeddings") or sizes.pop("rope_max_wavelength") != 10000.0:
        raise InputError(
            f"{file.path} has a head of its own, or rotary positions of another wavelength than 10,000: keras-nlp's "
            "Gemma has neither."
        )
    if file.architecture == "gemma2":
        sizes |= {
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
            # As llama.cpp, which knows the one Gemma 2 that scales by its width by how many blocks it has.
            "query_head_dim_normalize": sizes["num_layers"] != 46,
            "attention_logit_soft_cap": file.value("attn_logit_softcapping"),
            "final_logit_soft_cap": file.value("final_logit_softcapping"),
            "use_sliding_window_attention": True,
            "sliding_window_size": file.value("attention.sliding_window"),
        }
    backbone = keras_nlp.models.GemmaBackbone(head_dim=file.value("attention.key_length"), **sizes)

    def undo(name: str, weight: np.ndarray) -> np.ndarray:
        """llama.cpp's norms scale by what is stored, Gemma's by one more."""
        return weight - 1 if name.endswith("norm.weight") else weight

    convert_gemma.convert_weights(backbone, _Loader(file, undo), {"model_type": file.architecture})
    tokenizer = keras_nlp.models.GemmaTokenizer(_Words(file).sentence_piece())
    return keras_nlp.models.GemmaCausalLM(backbone, keras_nlp.models.GemmaCausalLMPreprocessor(tokenizer, length))


def _gpt2(file: _File, length: int) -> keras.Model:
    import keras_nlp
    from keras_hub.src.utils.transformers import convert_gpt2

    width, words = file.value("embedding_length"), _Words(file)
    backbone = keras_nlp.models.GPT2Backbone(
        vocabulary_size=len(words.tokens),
        num_layers=file.value("block_count"),
        num_heads=file.value("attention.head_count"),
        hidden_dim=width,
        intermediate_dim=file.value("feed_forward_length"),
        max_sequence_length=file.value("context_length"),
    )

    def undo(name: str, weight: np.ndarray) -> np.ndarray:
        """Hugging Face's GPT-2 holds [inputs, outputs], unlike its other models and llama.cpp."""
        return weight.T if re.search(r"\.c_(attn|proj|fc)\.weight$", name) else weight

    convert_gpt2.convert_weights(backbone, _Loader(file, undo), {"n_embd": width})
    tokenizer = words.byte_pairs(keras_nlp.models.GPT2Tokenizer)
    preprocessor = keras_nlp.models.GPT2CausalLMPreprocessor(tokenizer, length, add_start_token=words.starts(False))
    return keras_nlp.models.GPT2CausalLM(backbone, preprocessor)


_ARCHITECTURES: dict[str, Callable[[_File, int], keras.Model]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma,
    "gpt2": _gpt2,
}


def _as_it_is(name: str, weight: np.ndarray) -> np.ndarray:
    return weight


def _sizes(file: _File) -> dict[str, Any]:
    """What the backbones of Llama and Qwen are made with."""
    heads = file.value("attention.head_count")
    return {
        "vocabulary_size": len(file.fields["tokenizer.ggml.tokens"]),
        "num_layers": file.value("block_count"),
        "num_query_heads": heads,
        "num_key_value_heads": file.value("attention.head_count_kv", heads),
        "hidden_dim": file.value("embedding_length"),
        "intermediate_dim": file.value("feed_forward_length"),
        "rope_max_wavelength": file.value("rope.freq_base", 10000.0),
        "layer_norm_epsilon": file.value("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not file.holds("output.weight"),
    }


# --- tokenizers -------------------------------------------------------------------------------------------------------


class _Words:
    """The vocabulary in a GGUF file. `kind`: "gpt2" (byte pairs) or "llama" (SentencePiece)."""

    def __init__(self, file: _File):
        self._file = file
        self.kind = str(file.fields.get("tokenizer.ggml.model"))
        if self.kind not in ("gpt2", "llama"):
            raise InputError(
                f"{file.path} holds a tokenizer of the kind {self.kind!r}; expected gpt2 (byte pairs) or llama "
                "(SentencePiece)."
            )
        self.tokens: list[str] = file.fields["tokenizer.ggml.tokens"]
        self._kinds = list(file.fields.get("tokenizer.ggml.token_type", ()))

    def special(self, name: str) -> str:
        """The token that starts ("bos") or ends ("eos") a text."""
        index = self._file.fields.get(f"tokenizer.ggml.{name}_token_id")
        if index is None:
            raise InputError(f"{self._file.path} does not say its {name} token. Convert it again.")
        return self.tokens[index]

    def starts(self, default: bool) -> bool:
        """Whether every text begins with the start token."""
        return bool(self._file.fields.get("tokenizer.ggml.add_bos_token", default))

    def vocabulary(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def merges(self) -> list[str]:
        return list(self._file.fields["tokenizer.ggml.merges"])

    def unsplittable(self) -> set[str]:
        """Control tokens, and those that somebody added."""
        return {token for token, kind in zip(self.tokens, self._kinds) if kind in (_CONTROL, _USER_DEFINED)}

    def byte_pairs(self, tokenizer_class: Any) -> Any:
        """A keras-nlp byte-pair tokenizer whose class says what it begins and ends texts with.

        Where the file ends them with another token, that ends a text too.
        """
        if self.kind != "gpt2":
            raise InputError(f"{self._file.path} holds a SentencePiece tokenizer; {tokenizer_class.__name__} has none.")
        tokenizer = tokenizer_class(self.vocabulary(), self.merges(), unsplittable_tokens=sorted(self.unsplittable()))
        end = self.special("eos")
        if tokenizer.token_to_id(end) != tokenizer.end_token_id:
            tokenizer.end_token2, tokenizer.end_token2_id = end, tokenizer.token_to_id(end)
        return tokenizer

    def sentence_piece(self) -> bytes:
        """The SentencePiece model that the file's pieces, scores and kinds were taken from."""
        import sentencepiece.sentencepiece_model_pb2

        fields, protos = self._file.fields, cast(Any, sentencepiece.sentencepiece_model_pb2)
        model = protos.ModelProto()
        scores = fields["tokenizer.ggml.scores"]
        for token, score, kind in zip(self.tokens, scores, self._kinds):
            model.pieces.add(piece=token, score=score, type=kind)
        model.trainer_spec.model_type = model.trainer_spec.BPE
        model.trainer_spec.vocab_size = len(self.tokens)
        model.trainer_spec.byte_fallback = _BYTE in self._kinds
        for ours, name, usual in (("unk", "unknown", 0), ("bos", "bos", 1), ("eos", "eos", 2), ("pad", "padding", -1)):
            setattr(model.trainer_spec, f"{ours}_id", int(fields.get(f"tokenizer.ggml.{name}_token_id", usual)))
        model.normalizer_spec.name = "identity"
        model.normalizer_spec.add_dummy_prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
        model.normalizer_spec.remove_extra_whitespaces = False
        return model.SerializeToString()

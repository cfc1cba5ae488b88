"""One tiny model of every keras-nlp family, with a tokenizer of the kind that family has.

A new family takes one entry in `FAMILIES`; what it cannot do stands in `no`, with the words in which it is refused.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import keras_nlp
import numpy as np
import sentencepiece

from tests import tiny_models

M = keras_nlp.models
TEXTS = (
    "the film is fine and moving, the fox is quick",
    "not good",
    "很好！ 很好的电影",
    "a quick brown fox, a dull film",
    "café naïve",
)
LENGTH = 64
_SIZES = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 24, "max_sequence_length": LENGTH}
_LLAMA = {
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 48,
}


@dataclass(frozen=True)
class Family:
    """A family and its tasks.

    Attributes:
        task: task name -> a function that makes a model for it, with its preprocessor.
        no: task name -> a part of the refusal that says why there is none.
    """

    name: str
    task: Mapping[str, Callable]
    no: Mapping[str, str] = field(default_factory=dict)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def byte_pairs(*specials: str) -> dict:
    """vocabulary and merges: every byte is a token, and a few words are. No end token stands at 0, which is padding."""
    from keras_hub.src.tokenizers.byte_pair_tokenizer import bytes_to_unicode

    vocabulary = {special: index for index, special in enumerate(("<unused>", *specials))}
    for character in bytes_to_unicode()[1]:
        vocabulary.setdefault(character, len(vocabulary))
    merges = ["\u0120 q", "u i", "c k", "ui ck", "\u0120q uick", "f o", "fo x", "\u0120 fox"]
    for merge in merges:
        vocabulary.setdefault(merge.replace(" ", ""), len(vocabulary))
    return {"vocabulary": vocabulary, "merges": merges}


@functools.cache
def sentence_piece(*specials: str, pad: str = "<pad>", bos: str = "<s>", eos: str = "</s>", fallback=True) -> bytes:
    """A SentencePiece model with the control symbols that a family asks for."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(TEXTS) * 5),
        model_writer=written,
        vocab_size=330 if fallback else 64,
        model_type="BPE" if fallback else "UNIGRAM",
        byte_fallback=fallback,
        character_coverage=0.99,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        pad_piece=pad,
        bos_piece=bos,
        eos_piece=eos,
        control_symbols=list(specials),
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return written.getvalue()


# --- models -----------------------------------------------------------------------------------------------------------


def _with_opinions(model, scale: float = 0.25):
    """Weights large enough that answers differ from row to row; norms stay near what they were."""
    tiny_models.randomise(model, 1, scale)
    return model


def _causal(kind: str, tokens: Callable, scale: float = 0.25, task: str | None = None, **sizes) -> Callable:
    def build():
        tokenizer = tokens()
        backbone = getattr(M, f"{kind}Backbone")(vocabulary_size=tokenizer.vocabulary_size(), **sizes)
        preprocessor = getattr(M, f"{kind}CausalLMPreprocessor")(tokenizer, sequence_length=LENGTH)
        return _with_opinions(getattr(M, f"{kind}CausalLM")(backbone=backbone, preprocessor=preprocessor), scale)

    return build


def _seq2seq(kind: str, tokens: Callable, **sizes) -> Callable:
    def build():
        tokenizer = tokens()
        backbone = getattr(M, f"{kind}Backbone")(vocabulary_size=tokenizer.vocabulary_size(), **sizes)
        preprocessor = getattr(M, f"{kind}Seq2SeqLMPreprocessor")(
            tokenizer, encoder_sequence_length=LENGTH, decoder_sequence_length=LENGTH
        )
        return _with_opinions(getattr(M, f"{kind}Seq2SeqLM")(backbone=backbone, preprocessor=preprocessor))

    return build


def _classifier(kind: str, tokens: Callable, **sizes) -> Callable:
    def build():
        tokenizer = tokens()
        backbone = getattr(M, f"{kind}Backbone")(vocabulary_size=tokenizer.vocabulary_size(), **sizes)
        preprocessor = getattr(M, f"{kind}TextClassifierPreprocessor")(tokenizer, sequence_length=LENGTH)
        model = getattr(M, f"{kind}TextClassifier")(backbone=backbone, num_classes=3, preprocessor=preprocessor)
        return _with_opinions(model)

    return build


def _word_piece(kind: str) -> Callable:
    return lambda: getattr(M, f"{kind}Tokenizer")(vocabulary=tiny_models.VOCABULARY, lowercase=True)


def _pairs(kind: str, *specials: str, **options) -> Callable:
    return lambda: getattr(M, f"{kind}Tokenizer")(**byte_pairs(*specials), **options)


def _pieces(kind: str, *specials: str, options: Mapping = {}, **marks) -> Callable:
    return lambda: getattr(M, f"{kind}Tokenizer")(proto=sentence_piece(*specials, **marks), **options)


_BERT_LIKE = {"bos": "[CLS]", "eos": "[SEP]", "fallback": False}
_ENCODERS = {
    "bert": _classifier("Bert", _word_piece("Bert"), **_SIZES),
    "distil_bert": _classifier("DistilBert", _word_piece("DistilBert"), **_SIZES),
    "roberta": _classifier("Roberta", _pairs("Roberta", "<s>", "<pad>", "</s>", "<mask>"), **_SIZES),
    "xlm_roberta": _classifier("XLMRoberta", _pieces("XLMRoberta"), **_SIZES),
    "albert": _classifier("Albert", _pieces("Albert", "[MASK]", **_BERT_LIKE), embedding_dim=8, **_SIZES),
    "deberta_v3": _classifier("DebertaV3", _pieces("DebertaV3", "[MASK]", pad="[PAD]", **_BERT_LIKE), **_SIZES),
    "f_net": _classifier(
        "FNet",
        _pieces("FNet", "[MASK]", **_BERT_LIKE),
        **{name: size for name, size in _SIZES.items() if name != "num_heads"},
    ),
    "roformer_v2": _classifier(
        "RoformerV2",
        _word_piece("RoformerV2"),
        num_layers=2,
        num_heads=2,
        head_size=8,
        hidden_dim=16,
        intermediate_dim=24,
    ),
}
_END = "<|endoftext|>"
_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
_QWEN = {"num_layers": 2, "num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 32, "intermediate_dim": 48}
_EXPERTS = {**_QWEN, "num_experts": 4, "top_k": 2}
_GEMMA = {"bos": "<bos>", "eos": "<eos>"}
_CAUSAL = {
    "gpt2": _causal("GPT2", _pairs("GPT2", _END), **_SIZES),
    "opt": _causal("OPT", _pairs("OPT", "<pad>", "</s>"), **_SIZES),
    "bloom": _causal(
        "Bloom", _pairs("Bloom", "<s>", "</s>", "<pad>"), num_layers=2, num_heads=6, hidden_dim=48, intermediate_dim=64
    ),
    "gpt_neo_x": _causal("GPTNeoX", _pairs("GPTNeoX", _END), **_SIZES),
    "falcon": _causal(
        "Falcon", _pairs("Falcon", _END), num_layers=2, num_attention_heads=6, hidden_dim=48, intermediate_dim=64
    ),
    "smollm3": _causal(
        "SmolLM3",
        _pairs("SmolLM3", "<|begin_of_text|>", "<|end_of_text|>", "<think>", "</think>"),
        num_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=48,
        attention_bias=True,
        attention_dropout=0.0,
        rope_layer_enabled_list=[True, False],
        layer_types=["full_attention"] * 2,
        mlp_bias=True,
        layer_norm_epsilon=1e-5,
        max_position_embeddings=LENGTH,
        rope_theta=10000.0,
        partial_rotary_factor=1.0,
    ),
    "llama": _causal("Llama", _pieces("Llama"), **_LLAMA),
    "llama3": _causal("Llama3", _pairs("Llama3", *_LLAMA3), **_LLAMA),
    "mistral": _causal("Mistral", _pieces("Mistral"), sliding_window=6, **_LLAMA),
    "qwen": _causal("Qwen", _pairs("Qwen", _END), **_QWEN),
    "qwen3": _causal("Qwen3", _pairs("Qwen3", "<|im_end|>", _END), head_dim=16, **_QWEN),
    "phi3": _causal("Phi3", _pieces("Phi3", _END), **_LLAMA),
    "mixtral": _causal("Mixtral", _pieces("Mixtral"), sliding_window=6, **_EXPERTS),
    "qwen_moe": _causal(
        "QwenMoe",
        _pairs("QwenMoe", _END),
        moe_intermediate_dim=24,
        shared_expert_intermediate_dim=40,
        layer_norm_epsilon=1e-6,
        **_EXPERTS,
    ),
    "qwen3_moe": _causal(
        "Qwen3Moe",
        _pairs("Qwen3Moe", "<|im_end|>", _END),
        head_dim=16,
        moe_intermediate_dim=24,
        norm_top_k_prob=True,
        **_EXPERTS,
    ),
    "gpt_oss": _causal("GptOss", _pairs("GptOss", _END), sliding_window=5, head_dim=12, **_EXPERTS),
    "gemma": _causal("Gemma", _pieces("Gemma", **_GEMMA), head_dim=8, **_LLAMA),
    "gemma2": _causal(
        "Gemma",
        _pieces("Gemma", **_GEMMA),
        head_dim=12,
        query_head_dim_normalize=False,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=5.0,
        final_logit_soft_cap=3.0,
        use_sliding_window_attention=True,
        sliding_window_size=6,
        **_LLAMA,
    ),
    "gemma3": _causal(
        "Gemma3",
        _pieces("Gemma3", "<start_of_turn>", "<end_of_turn>", options={"has_vision_tokens": False}, **_GEMMA),
        head_dim=8,
        image_size=None,
        use_query_key_norm=True,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=6,
        **_LLAMA,
    ),
    "gemma4": _causal(
        "Gemma4",
        _pieces(
            "Gemma4", "<|turn>", "<turn|>", options={"has_vision_tokens": False, "has_video_tokens": False}, **_GEMMA
        ),
        image_size=16,
        head_dim=8,
        global_head_dim=12,
        global_rope_partial_rotary_factor=0.5,
        sliding_window_size=6,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=6,
        final_logit_soft_cap=5.0,
        **(_LLAMA | {"num_layers": 4}),
    ),
}
_SIDE = {
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_dim": 24,
    "layer_types": ["sliding_attention", "full_attention"],
}
_SEQ2SEQ = {
    "bart": _seq2seq("Bart", _pairs("Bart", "<s>", "<pad>", "</s>", "<mask>"), **_SIZES),
    "t5": _seq2seq("T5", _pieces("T5"), num_layers=2, num_heads=2, hidden_dim=16, intermediate_dim=24, key_value_dim=8),
    "t5_untied": _seq2seq(
        "T5",
        _pieces("T5"),
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        key_value_dim=12,
        use_gated_activation=False,
        tie_embedding_weights=False,
    ),
    "t5gemma": _seq2seq(
        "T5Gemma",
        _pieces("T5Gemma", **_GEMMA),
        **{f"encoder_{name}": size for name, size in _SIDE.items()},
        **{f"decoder_{name}": size for name, size in _SIDE.items()},
        encoder_hidden_dim=24,
        decoder_hidden_dim=16,
        query_pre_attn_scalar=8,
        sliding_window=3,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "t5gemma2": _seq2seq(
        "T5Gemma2",
        _pieces("T5Gemma2", **_GEMMA),
        **{f"encoder_{name}": size for name, size in _SIDE.items()},
        **{f"decoder_{name}": size for name, size in _SIDE.items()},
        encoder_hidden_dim=16,
        decoder_hidden_dim=16,
        query_pre_attn_scalar=8,
        sliding_window=3,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
}

_NO_READER = "cannot generate with"
_NO_SCORES = r"needs a model with one output \[batch, classes\]"
_FOR_TRAINING = "makes inputs with labels, to train a language model on"
_ONE_STACK = "has no encoder; expected a Seq2SeqLM"
_TWO_STACKS = "is sequence to sequence; expected a causal LM"
_TWO_INPUTS = "expected a text backbone with token_ids"
FAMILIES = (
    *(
        Family(name, {"classify": build, "embed": build}, {"generate": _NO_READER, "translate": _NO_READER})
        for name, build in _ENCODERS.items()
    ),
    *(
        Family(
            name,
            {"generate": build},
            # Gemma 4's backbone reads positions, too.
            {
                "classify": _NO_SCORES,
                "embed": _TWO_INPUTS if name == "gemma4" else _FOR_TRAINING,
                "translate": _ONE_STACK,
            },
        )
        for name, build in _CAUSAL.items()
    ),
    *(
        Family(name, {"translate": build}, {"classify": _NO_SCORES, "embed": _TWO_INPUTS, "generate": _TWO_STACKS})
        for name, build in _SEQ2SEQ.items()
    ),
)


def encoded(texts) -> np.ndarray:
    """object[n] of UTF-8."""
    return np.array([text.encode() for text in texts], object)

"""What Hugging Face's `config.json` says of a keras-nlp model, and what it cannot say."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras

from tfvllm.errors import InputError
from tfvllm.families.arrays import activation_name
from tfvllm.families.base import BlockShape, find_backbone
from tfvllm.families.registry import adapter_for

# How many tokens a published model of the family reads, where a keras-nlp backbone sets no end.
_CONTEXT = {"llama": 8192, "mistral": 32768, "qwen2": 32768, "qwen3": 40960, "gemma": 8192, "gemma3_text": 131072}
_ACTIVATIONS = {"gelu": "gelu", "gelu_approximate": "gelu_new", "relu": "relu", "silu": "silu"}


@dataclass(frozen=True)
class Family:
    """How transformers calls a family and its parts."""

    converter: str  # keras-hub's, a module of keras_hub.src.utils.transformers
    config: Callable[[Any, BlockShape], dict[str, Any]]
    base: str  # class of the backbone alone
    headed: str  # class with the head
    prefix: str  # of the backbone's weights in a model with a head
    head: Mapping[str, str] = field(default_factory=dict)  # its layers: Hugging Face's name -> the classifier's
    inputs_first: bool = False  # weights are [inputs, outputs], as those of GPT-2


def family_of(model: Any) -> Family:
    """The family of a backbone or task.

    Raises:
        InputError: it is neither, or of a family that is not written.
    """
    backbone = find_backbone(model)
    names = [cls.__name__ for cls in type(backbone).__mro__ if cls.__module__.startswith("keras_hub.")]
    if backbone is None or names[0] not in FAMILIES:
        found = type(model).__name__ if backbone is None else type(backbone).__name__
        raise InputError(
            f"save_huggingface: expected a keras-nlp model with one of {', '.join(FAMILIES)}, found {found}. "
            "Keep the model with model.save('NAME.keras')."
        )
    return FAMILIES[names[0]]


def is_causal(family: Family) -> bool:
    """Whether models of the family give the next token; the others read a text as a whole."""
    return not family.head


def config_of(model: Any, family: Family) -> dict[str, Any]:
    """The content of `config.json`, without the special tokens' ids.

    Raises:
        InputError: the model has sizes or parts that a config of its family cannot say; the message names them.
    """
    backbone = find_backbone(model)
    shape = _one_size(backbone)
    headed = is_causal(family) or model is not backbone
    config = {"architectures": [family.headed if headed else family.base], **family.config(backbone, shape)}
    if not is_causal(family) and headed:
        config |= _labels(model)
    return {**config, "torch_dtype": backbone.dtype_policy.variable_dtype}


def _refuse(what: str, why: str) -> InputError:
    return InputError(f"save_huggingface: {what}; {why}. Keep the model with model.save('NAME.keras').")


def _one_size(backbone: Any) -> BlockShape:
    """The sizes that all blocks share."""
    stack: list[BlockShape] = next(iter(adapter_for(backbone).structure(backbone).values()))
    for name, called in (("heads", "heads"), ("kv_heads", "key/value heads"), ("head_dim", "head_dim"), ("ffn", "ffn")):
        sizes = [getattr(shape, name) for shape in stack]
        if len(set(sizes)) > 1:
            raise _refuse(
                f"expected layers alike, found {called} {', '.join(map(str, sizes))} in {type(backbone).__name__}",
                "a Hugging Face config says one number for all layers",
            )
    return stack[0]


def _full_heads(backbone: Any, shape: BlockShape, name: str) -> None:
    if shape.heads * shape.head_dim != backbone.hidden_dim:
        raise _refuse(
            f"expected heads x head_dim = hidden size ({backbone.hidden_dim}), found head_dim {shape.head_dim} with "
            f"{shape.heads} heads in {type(backbone).__name__}",
            f"a Hugging Face config of {name} cannot say head_dim",
        )


def _even_heads(backbone: Any, shape: BlockShape, name: str) -> None:
    if backbone.hidden_dim % shape.heads:
        raise _refuse(
            f"expected heads that divide the hidden size ({backbone.hidden_dim}), found {shape.heads} heads in "
            f"{type(backbone).__name__}",
            f"transformers refuses such a config of {name}",
        )


def _epsilon(backbone: Any, final: Any) -> float:
    blocks = adapter_for(backbone).blocks(backbone)
    found = {float(norm.epsilon) for block in blocks for norm in block.norms.values()} | {float(final.epsilon)}
    if len(found) > 1:
        raise _refuse(
            f"expected one epsilon, found norms with {sorted(found)}", "a Hugging Face config says one for all"
        )
    return found.pop()


def _activation(backbone: Any) -> str:
    return _ACTIVATIONS[activation_name(adapter_for(backbone).blocks(backbone)[0].feed_forward.activation)]


def _labels(model: Any) -> dict[str, Any]:
    """What a classifier's config says of its classes. Its model gives logits: the activation is not a part of it."""
    activation = keras.activations.serialize(model.activation)
    if activation not in ("linear", "softmax", "sigmoid"):
        raise _refuse(
            f"expected logits, a softmax or a sigmoid, found the activation {activation}",
            "a Hugging Face classifier gives logits",
        )
    width, hidden = model.backbone.hidden_dim, getattr(model, "hidden_dim", None)
    if hidden is not None and hidden != width:
        raise _refuse(
            f"expected a classifier with hidden_dim {width} as its backbone, found {hidden}",
            "a Hugging Face config says one number for both",
        )
    names = [f"LABEL_{index}" for index in range(model.num_classes)]
    kind = {"sigmoid": "multi_label_classification", "softmax": "single_label_classification"}.get(activation)
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
        **({"problem_type": kind} if kind and model.num_classes > 1 else {}),
    }


# --- encoders and GPT-2 -----------------------------------------------------------------------------------------------


def _bert(backbone: Any, shape: BlockShape) -> dict[str, Any]:
    _full_heads(backbone, shape, "BERT")
    return {
        "model_type": "bert",
        "vocab_size": backbone.vocabulary_size,
        "hidden_size": backbone.hidden_dim,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.ffn,
        "hidden_act": _activation(backbone),
        "hidden_dropout_prob": backbone.dropout,
        "attention_probs_dropout_prob": backbone.dropout,
        "max_position_embeddings": backbone.max_sequence_length,
        "type_vocab_size": getattr(backbone, "num_segments", 1),
        "layer_norm_eps": _epsilon(backbone, backbone.embeddings_layer_norm),
    }


def _distil_bert(backbone: Any, shape: BlockShape) -> dict[str, Any]:
    _full_heads(backbone, shape, "DistilBERT")
    if (epsilon := _epsilon(backbone, backbone.embeddings_layer_norm)) != 1e-12:
        raise _refuse(f"expected norms with epsilon 1e-12, found {epsilon}", "a config of DistilBERT cannot say it")
    return {
        "model_type": "distilbert",
        "vocab_size": backbone.vocabulary_size,
        "dim": backbone.hidden_dim,
        "n_layers": backbone.num_layers,
        "n_heads": shape.heads,
        "hidden_dim": shape.ffn,
        "activation": _activation(backbone),
        "dropout": backbone.dropout,
        "attention_dropout": backbone.dropout,
        "max_position_embeddings": backbone.max_sequence_length,
        "sinusoidal_pos_embds": False,
    }


def _roberta(backbone: Any, shape: BlockShape) -> dict[str, Any]:
    return {
        **_bert(backbone, shape),
        "model_type": "roberta",
        # Two rows come before the first position: those of padding.
        "max_position_embeddings": backbone.max_sequence_length + ROBERTA_OFFSET,
        "pad_token_id": ROBERTA_OFFSET - 1,
    }


def _gpt2(backbone: Any, shape: BlockShape) -> dict[str, Any]:
    _full_heads(backbone, shape, "GPT-2")
    return {
        "model_type": "gpt2",
        "vocab_size": backbone.vocabulary_size,
        "n_positions": backbone.max_sequence_length,
        "n_embd": backbone.hidden_dim,
        "n_layer": backbone.num_layers,
        "n_head": shape.heads,
        "n_inner": shape.ffn,
        "activation_function": _activation(backbone),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), backbone.dropout),
        "layer_norm_epsilon": _epsilon(backbone, backbone.layer_norm),
        "tie_word_embeddings": True,
    }


# --- Llama and its kin ------------------------------------------------------------------------------------------------


def _decoder(model_type: str, backbone: Any, shape: BlockShape, **more: Any) -> dict[str, Any]:
    """What the configs of Llama, Mistral, Qwen and Gemma have in common."""
    return {
        "model_type": model_type,
        "vocab_size": backbone.vocabulary_size,
        "hidden_size": backbone.hidden_dim,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": _CONTEXT.get(model_type, 8192),
        "rms_norm_eps": _epsilon(backbone, backbone.layer_norm),
        "attention_dropout": backbone.dropout,
        "tie_word_embeddings": bool(backbone.token_embedding.tie_weights),
        "use_cache": True,
        **more,
    }


def _rope(theta: float, factor: float) -> dict[str, Any]:
    scaled = {} if factor == 1.0 else {"rope_scaling": {"rope_type": "linear", "factor": float(factor)}}
    return {"rope_theta": float(theta), **scaled}


def _llama(backbone: Any, shape: BlockShape) -> dict[str, Any]:
    _even_heads(backbone, shape, "Llama")
    rope = _rope(backbone.rope_max_wavelength, backbone.rope_position_scaling_factor)
    config = _decoder("llama", backbone, shape, hidden_act=_activation(backbone), attention_bias=False, mlp_bias=False)
    if backbone.rope_frequency_adjustment_factor is None:
        return config | rope
    if "rope_scaling" in rope:
        raise _refuse("expected one kind of rope scaling, found two", "a Hugging Face config says one")
    factor, trained = backbone.rope_frequency_adjustment_factor, backbone.rope_pretraining_sequence_length
    scaling = {
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": float(backbone.rope_low_freq_factor),
        "high_freq_factor": float(backbone.rope_high_freq_factor),
        "original_max_position_embeddings": int(trained),
    }
    return {**config, **rope, "rope_scaling": scaling, "max_position_embeddings": int(trained * factor)}


def _mistral(backbone: Any, shape: BlockShape) -> dict[str, Any]:
    rope = _rope(backbone.rope_max_wavelength, backbone.rope_scaling_factor)
    more = {"hidden_act": _activation(backbone), "sliding_window": backbone.sliding_window}
    return _decoder("mistral", backbone, shape, **more, **rope)


def _qwen(model_type: str, backbone: Any, shape: BlockShape, windowed: bool) -> dict[str, Any]:
    return _decoder(
        model_type,
        backbone,
        shape,
        hidden_act=_activation(backbone),
        use_sliding_window=windowed,
        sliding_window=backbone.sliding_window_size,
        max_window_layers=0 if windowed else backbone.num_layers,
        **_rope(backbone.rope_max_wavelength, backbone.rope_scaling_factor),
    )


def _qwen2(backbone: Any, shape: BlockShape) -> dict[str, Any]:
    return _qwen("qwen2", backbone, shape, bool(backbone.use_sliding_window_attention))


def _qwen3(backbone: Any, shape: BlockShape) -> dict[str, Any]:
    windowed = backbone.sliding_window_size is not None
    return {**_qwen("qwen3", backbone, shape, windowed), "attention_bias": False}


# --- Gemma ------------------------------------------------------------------------------------------------------------


def _gemma(backbone: Any, shape: BlockShape) -> dict[str, Any]:
    windows = _windows(backbone)
    posts = {backbone.use_post_ffw_norm, backbone.use_post_attention_norm}
    more = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, **_rope(10_000.0, 1.0)}
    if posts == {True}:  # Gemma 2
        _even_heads(backbone, shape, "Gemma 2")
        _in_turn(backbone, windows, 2, "Gemma 2")
        more["architectures"] = ["Gemma2ForCausalLM"]
        return _decoder("gemma2", backbone, shape, **more, **_scaled_queries(backbone, shape))
    unsaid = {
        "norms after one of attention and feed-forward only": True in posts,
        "sliding windows": any(windows),
        "capped logits": bool(backbone.final_logit_soft_cap or backbone.attention_logit_soft_cap),
        "queries not scaled by head_dim": not _by_head_dim(backbone),
    }
    if found := [name for name, holds in unsaid.items() if holds]:
        raise _refuse(f"found a Gemma with {' and '.join(found)}", "a config of Gemma 1 or 2 cannot say it")
    return _decoder("gemma", backbone, shape, hidden_act="gelu_pytorch_tanh", **more)


def _gemma3(backbone: Any, shape: BlockShape) -> dict[str, Any]:
    windows = _windows(backbone)
    _even_heads(backbone, shape, "Gemma 3")
    _in_turn(backbone, windows, 6, "Gemma 3")
    unsaid = {
        "a vision encoder": not backbone.text_only_model,
        "a head for embeddings": backbone.is_embedding_model,
        "attention in both directions": backbone.use_bidirectional_attention,
        "no norms of queries and keys": not backbone.use_query_key_norm,
        "no norms after attention or feed-forward": not (
            backbone.use_post_ffw_norm and backbone.use_post_attention_norm
        ),
        "scaled positions in its sliding windows": any(windows) and backbone.local_rope_scaling_factor != 1.0,
    }
    if found := [name for name, holds in unsaid.items() if holds]:
        raise _refuse(f"found a Gemma 3 with {' and '.join(found)}", "a config of a Gemma 3 text model cannot say it")
    return _decoder(
        "gemma3_text",
        backbone,
        shape,
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        rope_local_base_freq=10_000.0,
        layer_types=["sliding_attention" if window else "full_attention" for window in windows],
        sliding_window_pattern=6,
        **_rope(1_000_000.0, backbone.global_rope_scaling_factor),
        **_scaled_queries(backbone, shape),
    )


def _windows(backbone: Any) -> list[bool]:
    """Which layers attend within a sliding window."""
    return [bool(layer.attention.use_sliding_window_attention) for layer in backbone.transformer_layers]


def _in_turn(backbone: Any, windows: list[bool], period: int, name: str) -> None:
    turns = [(index + 1) % period != 0 for index in range(len(windows))]
    if windows != turns and (any(windows) or period == 2):
        raise _refuse(
            f"expected a layer without a sliding window after every {period - 1} with one, found "
            f"{', '.join('with' if window else 'without' for window in windows)} in {type(backbone).__name__}",
            f"not every reader of a config of {name} knows another order",
        )


def _by_head_dim(backbone: Any) -> bool:
    """What its layers do: keras-hub's Gemma 2 does not hand on what it is told."""
    return bool(backbone.transformer_layers[0].attention.query_head_dim_normalize)


def _scaled_queries(backbone: Any, shape: BlockShape) -> dict[str, Any]:
    whole = shape.head_dim if _by_head_dim(backbone) else backbone.hidden_dim // shape.heads
    return {
        "query_pre_attn_scalar": whole,
        "sliding_window": backbone.sliding_window_size,
        "attn_logit_softcapping": backbone.attention_logit_soft_cap,
        "final_logit_softcapping": backbone.final_logit_soft_cap,
    }


ROBERTA_OFFSET = 2  # rows of its table of positions before the first position
FAMILIES = {
    "BertBackbone": Family(
        "convert_bert", _bert, "BertModel", "BertForSequenceClassification", "bert.", {"classifier": "output_dense"}
    ),
    "DistilBertBackbone": Family(
        "convert_distilbert",
        _distil_bert,
        "DistilBertModel",
        "DistilBertForSequenceClassification",
        "distilbert.",
        {"pre_classifier": "pooled_dense", "classifier": "output_dense"},
    ),
    "RobertaBackbone": Family(
        "convert_roberta",
        _roberta,
        "RobertaModel",
        "RobertaForSequenceClassification",
        "roberta.",
        {"classifier.dense": "pooled_dense", "classifier.out_proj": "output_dense"},
    ),
    "GPT2Backbone": Family("convert_gpt2", _gpt2, "GPT2Model", "GPT2LMHeadModel", "transformer.", inputs_first=True),
    **dict.fromkeys(
        ("LlamaBackbone", "Llama3Backbone"),
        Family("convert_llama3", _llama, "LlamaModel", "LlamaForCausalLM", "model."),
    ),
    "MistralBackbone": Family("convert_mistral", _mistral, "MistralModel", "MistralForCausalLM", "model."),
    "QwenBackbone": Family("convert_qwen", _qwen2, "Qwen2Model", "Qwen2ForCausalLM", "model."),
    "Qwen3Backbone": Family("convert_qwen3", _qwen3, "Qwen3Model", "Qwen3ForCausalLM", "model."),
    "GemmaBackbone": Family("convert_gemma", _gemma, "GemmaModel", "GemmaForCausalLM", "model."),
    "Gemma3Backbone": Family("convert_gemma3", _gemma3, "Gemma3TextModel", "Gemma3ForCausalLM", "model."),
}

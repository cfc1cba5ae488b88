"""Gemma 4 (text): heads of two sizes, keys and values of earlier blocks, and a gate by the token in every block."""

import dataclasses
import math

import numpy as np

from tfvllm.families import spec
from tfvllm.families.arrays import array, dense, from_heads, gated, merged, projection
from tfvllm.families.llama import rms_norm, rotary


def unread(backbone) -> str:
    """What `spec` cannot say."""
    for name, what in (("vision_encoder", "images"), ("audio_encoder", "sound")):
        if getattr(backbone, name, None) is not None:
            return f"it reads {what}: {name}"
    if backbone.enable_moe_block:
        return "its blocks have experts beside a feed-forward: enable_moe_block"
    if backbone.use_bidirectional_attention or backbone.is_embedding_model:
        return "it is an embedding model: use_bidirectional_attention or is_embedding_model"
    if backbone.num_kv_shared_layers >= backbone.num_layers:
        return "all its blocks attend to another model's keys and values: num_kv_shared_layers"
    return ""


def unread_task(model) -> str:
    if model.final_logit_cap is not None and model.backbone.token_embedding.logit_soft_cap is not None:
        return "it caps its logits twice: final_logit_soft_cap and the task's final_logit_cap"
    return unread(model.backbone)


def read(backbone) -> spec.LanguageModel:
    embedding = backbone.token_embedding
    return spec.LanguageModel(
        family="gemma4",
        embedding=array(embedding.embeddings),
        logit_soft_cap=embedding.logit_soft_cap,
        decoder=spec.Stack(
            blocks=[_block(layer) for layer in backbone.transformer_layers],
            embedding_scale=math.sqrt(backbone.hidden_dim),
            final_norm=rms_norm(backbone.layer_norm),
            token_inputs=_token_inputs(backbone) if backbone.hidden_size_per_layer_input else None,
        ),
    )


def read_task(model) -> spec.LanguageModel:
    """A task may cap its logits itself."""
    found, cap = read(model.backbone), model.final_logit_cap
    return found if cap is None else dataclasses.replace(found, logit_soft_cap=cap)


def _token_inputs(backbone) -> spec.TokenInputs:
    """keras-nlp: (norm(projection(x) / sqrt(width)) + sqrt(inner) * table[token]) / sqrt(2)."""
    inner, half = backbone.hidden_size_per_layer_input, math.sqrt(0.5)
    norm = rms_norm(backbone.per_layer_projection_norm)
    return spec.TokenInputs(
        table=array(backbone.per_layer_token_embedding.embeddings) * np.float32(math.sqrt(inner) * half),
        projection=spec.Linear(
            array(backbone.per_layer_model_projection.kernel) * np.float32(backbone.hidden_dim**-0.5)
        ),
        norm=dataclasses.replace(norm, scale=norm.scale * np.float32(half)),
    )


def _block(layer) -> spec.Block:
    return spec.Block(
        normalize_first=True,
        attention=_attention(layer),
        attention_norm=rms_norm(layer.pre_attention_norm),
        post_attention_norm=rms_norm(layer.post_attention_norm),
        feed_forward=gated(layer.gating_ffw, layer.gating_ffw_2, layer.ffw_linear, "gelu_approximate"),
        feed_forward_norm=rms_norm(layer.pre_ffw_norm),
        post_feed_forward_norm=rms_norm(layer.post_ffw_norm),
        token_gate=_token_gate(layer) if layer.hidden_size_per_layer_input else None,
        output_scale=float(array(layer.layer_scalar)),
    )


def _attention(layer) -> spec.Attention:
    attention = layer.attention
    held = [attention.query_dense]
    if not attention.is_kv_shared_layer:
        held += [attention.key_dense] if attention.attention_k_eq_v else [attention.key_dense, attention.value_dense]
    owned = not attention.is_kv_shared_layer
    return spec.Attention(
        heads=attention.num_query_heads,
        kv_heads=attention.effective_num_kv_heads,
        head_dim=attention.head_dim,
        query_key_value=merged(*[projection(layer)[:2] for layer in held]),
        output=from_heads(attention.output_dense),
        scale=1.0,
        window=attention.sliding_window_size if attention.use_sliding_window_attention else None,
        soft_cap=attention.logit_soft_cap,
        query_norm=rms_norm(attention.query_norm),
        key_norm=rms_norm(attention.key_norm) if owned else None,
        value_norm=_plain_norm(attention) if owned else None,
        rotary=_rotary(attention),
        shared=None if owned else layer.kv_shared_layer_index,
        values_are_keys=owned and attention.attention_k_eq_v,
    )


def _plain_norm(attention) -> spec.Norm:
    """Of values: without a scale."""
    return spec.Norm("rms", np.ones(attention.head_dim, np.float32), None, float(attention.value_norm.epsilon))


def _rotary(attention) -> spec.Rotary:
    """The first channels of either half of a head turn, with the frequencies that a whole head's would have."""
    turning = rotary(attention.rope_layer, min(attention.rotary_dim, attention.head_dim))
    still = attention.head_dim // 2 - len(turning.inverse_frequencies)
    return dataclasses.replace(turning, inverse_frequencies=np.pad(turning.inverse_frequencies, [0, still]))


def _token_gate(layer) -> spec.TokenGate:
    return spec.TokenGate(
        gate=dense(layer.per_layer_input_gate),
        output=dense(layer.per_layer_up_proj),
        norm=rms_norm(layer.post_per_layer_input_norm),
        activation="gelu_approximate",
    )


READERS = {"Gemma4Backbone": read, "Gemma4CausalLM": read_task}
UNREAD = {"Gemma4Backbone": unread, "Gemma4CausalLM": unread_task}
NO_ADAPTER = "its blocks have keys and values of one another and heads of two sizes, which no structure says yet"

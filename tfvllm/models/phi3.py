"""Phi-3: Llama's block under other names."""

import math

import numpy as np

from tfvllm.errors import InputError
from tfvllm.models import spec
from tfvllm.models.arrays import activation_name, array, from_heads, merged, projection
from tfvllm.models.llama import rms_norm, rotary


def read(backbone) -> spec.LanguageModel:
    if backbone.rope_scaling_type is not None:
        raise InputError(
            f"this Phi-3 scales its rotary positions ({backbone.rope_scaling_type!r}): its frequencies change with the "
            "length of the text, which the decode engine does not do; expected rope_scaling_type=None"
        )
    embedding = backbone.token_embedding
    return spec.LanguageModel(
        family="phi3",
        embedding=array(embedding.embeddings),
        head=None if embedding.tie_weights else array(embedding.reverse_embeddings),
        decoder=spec.Stack(
            blocks=[_block(layer) for layer in backbone.transformer_layers],
            final_norm=rms_norm(backbone.layer_norm),
        ),
    )


def _block(layer) -> spec.Block:
    attention = layer.attention
    query, query_bias, heads, head_dim = projection(attention.query_dense)
    key, key_bias, kv_heads, _ = projection(attention.key_dense)
    value, value_bias, _, _ = projection(attention.value_dense)
    gate, up = array(layer.feedforward_gate_dense.kernel), array(layer.feedforward_intermediate_dense.kernel)
    return spec.Block(
        normalize_first=True,
        attention=spec.Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            query_key_value=merged((query, query_bias), (key, key_bias), (value, value_bias)),
            output=from_heads(attention.output_dense),
            scale=1.0 / math.sqrt(head_dim),
            rotary=rotary(attention.rotary_embedding_layer, head_dim),
        ),
        attention_norm=rms_norm(layer.pre_attention_layernorm),
        feed_forward=spec.FeedForward(
            up=spec.Linear(np.concatenate([gate, up], axis=1)),
            output=spec.Linear(array(layer.feedforward_output_dense.kernel)),
            activation=activation_name(layer.activation),
            gated=True,
        ),
        feed_forward_norm=rms_norm(layer.post_attention_layernorm),
    )


READERS = {"Phi3Backbone": read}
NO_ADAPTER = "its blocks are Llama's under other names, and have not been described yet"

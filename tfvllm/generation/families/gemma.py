"""Gemma, Gemma 2 and Gemma 3 (text): scaled embeddings, (1 + scale) RMSNorm, soft caps, sliding windows.

Gemma's layer interleaves the two halves of a rotated head. Queries and keys are permuted alike, so q·k does not change
and the engine leaves the permutation out.
"""

import math

import numpy as np

from tfvllm.errors import InputError
from tfvllm.generation.families.llama import rotary
from tfvllm.models.arrays import array, from_heads, merged, projection
from tfvllm.models.spec import Attention, Block, FeedForward, LanguageModel, Linear, Norm, Stack


def read(backbone) -> LanguageModel:
    if not getattr(backbone, "text_only_model", True):
        raise InputError("this Gemma 3 has a vision encoder; expected a text model (vision_encoder=None)")
    embedding = backbone.token_embedding
    return LanguageModel(
        family=type(backbone).__name__.removesuffix("Backbone").lower(),
        embedding=array(embedding.embeddings),
        head=None if embedding.tie_weights else array(embedding.reverse_embeddings),
        logit_soft_cap=embedding.logit_soft_cap,
        decoder=Stack(
            blocks=[_block(layer) for layer in backbone.transformer_layers],
            embedding_scale=math.sqrt(backbone.hidden_dim),
            final_norm=_norm(backbone.layer_norm),
        ),
    )


def _norm(layer) -> Norm:
    return Norm("rms", 1.0 + array(layer.scale), None, float(layer.epsilon))


def _optional(layer, name: str) -> Norm | None:
    norm = getattr(layer, name, None)
    return None if norm is None else _norm(norm)


def _block(layer) -> Block:
    attention = layer.attention
    if getattr(attention, "use_bidirectional_attention", False):
        raise InputError("this Gemma 3 attends in both directions (an embedding model); expected a causal one")
    query, query_bias, heads, head_dim = projection(attention.query_dense)
    key, key_bias, kv_heads, _ = projection(attention.key_dense)
    value, value_bias, _, _ = projection(attention.value_dense)
    normalizer = head_dim if attention.query_head_dim_normalize else layer.hidden_dim // attention.num_query_heads
    return Block(
        normalize_first=True,
        attention=Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            query_key_value=merged((query, query_bias), (key, key_bias), (value, value_bias)),
            output=from_heads(attention.output_dense),
            scale=1.0 / math.sqrt(normalizer),
            window=attention.sliding_window_size if attention.use_sliding_window_attention else None,
            soft_cap=attention.logit_soft_cap,
            query_norm=_optional(attention, "query_norm"),
            key_norm=_optional(attention, "key_norm"),
            rotary=rotary(attention.rope_layer, head_dim),
        ),
        attention_norm=_norm(layer.pre_attention_norm),
        post_attention_norm=_optional(layer, "post_attention_norm"),
        feed_forward=FeedForward(
            up=Linear(np.concatenate([array(layer.gating_ffw.kernel), array(layer.gating_ffw_2.kernel)], axis=1)),
            output=Linear(array(layer.ffw_linear.kernel)),
            activation="gelu_approximate",
            gated=True,
        ),
        feed_forward_norm=_norm(layer.pre_ffw_norm),
        post_feed_forward_norm=_optional(layer, "post_ffw_norm"),
    )

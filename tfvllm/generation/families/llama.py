"""Llama 2 and 3, Mistral, Qwen 2 and Qwen 3: RMSNorm, rotary positions, grouped keys and values, gated feed-forward."""

import keras
import numpy as np

from tfvllm.models.arrays import activation_name, array, from_heads, merged, projection
from tfvllm.models.spec import Attention, Block, FeedForward, LanguageModel, Linear, Norm, Rotary, Stack


def read(backbone) -> LanguageModel:
    embedding = backbone.token_embedding
    return LanguageModel(
        family=type(backbone).__name__.removesuffix("Backbone").lower(),
        embedding=array(embedding.embeddings),
        head=None if embedding.tie_weights else array(embedding.reverse_embeddings),
        decoder=Stack(
            blocks=[_block(layer) for layer in backbone.transformer_layers],
            final_norm=_norm(backbone.layer_norm),
        ),
    )


def rotary(layer, head_dim: int) -> Rotary:
    """The frequencies that a keras-nlp rotary layer uses, asked of the layer itself (Llama 3's and YaRN's included)."""
    frequencies = np.asarray(keras.ops.convert_to_numpy(layer._get_inverse_freq(head_dim)), np.float32)
    magnitude = 1.0
    if layer.rope_type == "yarn":
        magnitude = 0.1 * float(np.log(layer.scaling_factor)) + 1.0
    return Rotary(frequencies, magnitude)


def _norm(layer) -> Norm:
    return Norm("rms", array(layer.scale), None, float(layer.epsilon))


def _block(layer) -> Block:
    attention = layer._self_attention_layer
    query, query_bias, heads, head_dim = projection(attention._query_dense)
    key, key_bias, kv_heads, _ = projection(attention._key_dense)
    value, value_bias, _, _ = projection(attention._value_dense)
    query_norm = getattr(attention, "_query_dense_layer_norm", None)
    key_norm = getattr(attention, "_key_dense_layer_norm", None)
    return Block(
        normalize_first=True,
        attention=Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            query_key_value=merged((query, query_bias), (key, key_bias), (value, value_bias)),
            output=from_heads(attention._output_dense),
            scale=float(attention._inv_norm_factor),
            window=_window(layer, attention),
            query_norm=None if query_norm is None else _norm(query_norm),
            key_norm=None if key_norm is None else _norm(key_norm),
            rotary=rotary(attention.rotary_embedding_layer, head_dim),
        ),
        attention_norm=_norm(layer._self_attention_layernorm),
        feed_forward=FeedForward(
            up=Linear(
                np.concatenate(
                    [array(layer._feedforward_gate_dense.kernel), array(layer._feedforward_intermediate_dense.kernel)],
                    axis=1,
                )
            ),
            output=Linear(array(layer._feedforward_output_dense.kernel)),
            activation=activation_name(layer.activation),
            gated=True,
        ),
        feed_forward_norm=_norm(layer._feedforward_layernorm),
    )


def _window(layer, attention) -> int | None:
    if hasattr(layer, "sliding_window"):  # Mistral
        return layer.sliding_window
    if getattr(attention, "use_sliding_window_attention", None) is False:  # Qwen 2 with its window switched off
        return None
    return getattr(attention, "sliding_window_size", None)

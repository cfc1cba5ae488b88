"""GPT-NeoX: attention and feed-forward side by side, and rotary positions for a part of every head."""

import math

import numpy as np

from tfvllm.errors import InputError
from tfvllm.models import spec
from tfvllm.models.arrays import activation_name, array, dense, layer_norm, merged
from tfvllm.models.llama import rotary


def read(backbone) -> spec.LanguageModel:
    return spec.LanguageModel(
        family="gpt_neo_x",
        embedding=array(backbone.token_embedding.embeddings),
        decoder=spec.Stack(
            blocks=[_block(layer) for layer in backbone.transformer_layers],
            final_norm=layer_norm(backbone.layer_norm),
        ),
    )


def _block(layer) -> spec.Block:
    attention = layer._self_attention_layer
    head_dim, turned = attention.attn_head_size, attention.rotary_dim
    if head_dim % 2 or turned % 2:
        raise InputError(
            f"this GPT-NeoX rotates {turned} of the {head_dim} channels of a head; the decode engine turns one half by "
            "the other and expects even numbers"
        )
    # A channel that is not rotated turns by no angle. The halves of a head are: one of what turns, one of what stays.
    halves = np.split(np.arange(turned), 2), np.split(np.arange(turned, head_dim), 2)
    order = np.concatenate([part for pair in zip(*halves) for part in pair])
    whole = rotary(attention.rotary_embedding_layer, turned)
    still = np.zeros((head_dim - turned) // 2, np.float32)
    # [width, heads, query | key | value]; scores see queries and keys in the same order.
    kernels = np.split(array(attention._qkv_dense.kernel), 3, axis=-1)
    biases = np.split(array(attention._qkv_dense.bias), 3, axis=-1)
    orders = (order, order, np.arange(head_dim))
    width, heads, _ = kernels[0].shape
    parts = [(k[..., o].reshape(width, -1), b[..., o].reshape(-1)) for k, b, o in zip(kernels, biases, orders)]
    return spec.Block(
        normalize_first=True,
        parallel=True,
        attention=spec.Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            query_key_value=merged(*parts),
            output=dense(attention._output_dense),
            scale=1.0 / math.sqrt(head_dim),
            rotary=spec.Rotary(np.concatenate([whole.inverse_frequencies, still]), whole.magnitude),
        ),
        attention_norm=layer_norm(layer._self_attention_layer_norm),
        feed_forward=spec.FeedForward(
            up=dense(layer._feedforward_intermediate_dense),
            output=dense(layer._feedforward_output_dense),
            activation=activation_name(layer.activation),
        ),
        feed_forward_norm=layer_norm(layer._feedforward_layer_norm),
    )


READERS = {"GPTNeoXBackbone": read}
NO_ADAPTER = "one kernel holds its queries, keys and values, head by head, and has not been described yet"

"""GPT-NeoX: attention and feed-forward side by side, and rotary positions for a part of every head."""

import math
from typing import Any

import numpy as np
from keras_hub.models import GPTNeoXBackbone, GPTNeoXCausalLM

from tfvllm.errors import InputError
from tfvllm.families import spec
from tfvllm.families.arrays import activation_name, array, dense, layer_norm, merged
from tfvllm.families.base import HEADS, Attention, Axis, Block, Projection, mha_scale
from tfvllm.families.llama import rotary
from tfvllm.families.projections import WIDE, feed_forward
from tfvllm.families.shrunk import ShrunkBackbone, ShrunkCausalLM, register
from tfvllm.families.transformer_encoder import TransformerStackAdapter


def _attention(layer: Any, place: str) -> Attention:
    """One kernel [width, heads, query | key | value]; the output's is flat."""
    heads, head_dim = Axis(HEADS, place), layer.attn_head_size

    def part(number: int, name: str) -> Projection:
        axes = (WIDE, heads, None)
        return Projection(name, layer._qkv_dense, layer, "_qkv_dense", axes, axes[1:], part=number, parts=3)

    count = int(layer._qkv_dense.kernel.shape[1])
    flat = (Axis(HEADS, place, head_dim), WIDE)
    return Attention(
        layer=layer,
        place=place,
        heads=count,
        kv_heads=count,
        head_dim=head_dim,
        query=part(0, "query"),
        key=part(1, "key"),
        value=part(2, "value"),
        output=Projection("output", layer._output_dense, layer, "_output_dense", flat, flat[1:]),
        scale=mha_scale(head_dim),
    )


class GPTNeoXAdapter(TransformerStackAdapter):
    """GPT-NeoX."""

    family = "gpt_neo_x"
    only_stack = "decoder"

    def describe(self, layer: Any, kind: str, index: int, hidden: int) -> Block:
        place = f"{kind}.{index}"
        names = ("_feedforward_intermediate_dense", "_feedforward_output_dense")
        return Block(
            layer=layer,
            index=index,
            kind=kind,
            hidden_width=hidden,
            attention=_attention(layer._self_attention_layer, f"{place}.self"),
            feed_forward=feed_forward(layer, place, *names, activation=layer.activation),
            norms={"attention": layer._self_attention_layer_norm, "feed_forward": layer._feedforward_layer_norm},
        )

    def set_attention(self, attention: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        attention.num_heads = heads
        attention.attn_head_size = head_dim
        attention.rotary_dim = int(head_dim * attention.rotary_percentage)
        attention.hidden_dim = heads * head_dim  # read only where heads are laid beside each other
        attention._inv_norm_factor = mha_scale(head_dim)


ADAPTER = GPTNeoXAdapter()


@register
class ShrunkGPTNeoXBackbone(ShrunkBackbone, GPTNeoXBackbone):
    """A `GPTNeoXBackbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkGPTNeoXCausalLM(ShrunkCausalLM, GPTNeoXCausalLM):
    """A `GPTNeoXCausalLM` on a shrunk backbone."""

    backbone_cls = ShrunkGPTNeoXBackbone


SHRUNK = {GPTNeoXBackbone: ShrunkGPTNeoXBackbone}
TASKS = {GPTNeoXCausalLM: ShrunkGPTNeoXCausalLM}


# ------------------------------------------------------------------------------------------------------------- decoding


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

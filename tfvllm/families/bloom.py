"""Bloom: attention with linear biases (ALiBi) in place of positions, a norm right after the embedding."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras_hub.models import BloomBackbone, BloomCausalLM

from tfvllm.families import spec
from tfvllm.families.alibi import counted, kept_slopes, set_slopes, slopes_of
from tfvllm.families.arrays import array, dense, layer_norm, merged, projection
from tfvllm.families.base import Block, BlockShape, Structure, mha_scale
from tfvllm.families.projections import attention, feed_forward
from tfvllm.families.shrunk import ShrunkBackbone, ShrunkCausalLM, register
from tfvllm.families.transformer_encoder import TransformerStackAdapter


class BloomAdapter(TransformerStackAdapter):
    """Bloom."""

    family = "bloom"
    only_stack = "decoder"

    def describe(self, layer: Any, kind: str, index: int, hidden: int) -> Block:
        place = f"{kind}.{index}"
        gelu = functools.partial(keras.activations.gelu, approximate=True)
        return Block(
            layer=layer,
            index=index,
            kind=kind,
            hidden_width=hidden,
            attention=attention(layer._self_attention_layer, f"{place}.self"),
            feed_forward=feed_forward(layer, place, "_mlp_intermediate_dense", "_mlp_output_dense", activation=gelu),
            norms={"attention": layer._pre_attention_layernorm, "feed_forward": layer._post_attention_layernorm},
        )

    def set_attention(self, attention: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        attention.num_heads = heads
        attention.head_dim = head_dim
        attention.inv_norm_factor = mha_scale(head_dim)

    def traits(self, layer: Any) -> dict[str, Any]:
        attention = layer._self_attention_layer
        return slopes_of(attention._alibi_layer, attention.num_heads)

    def set_traits(self, layer: Any, traits: Mapping[str, Any]) -> None:
        set_slopes(layer._self_attention_layer._alibi_layer, traits)

    def kept_traits(self, shape: BlockShape, heads: np.ndarray) -> Mapping[str, Any]:
        return kept_slopes(shape, heads)

    def config_if_expressible(self, config: dict[str, Any], structure: Structure) -> dict[str, Any] | None:
        return super().config_if_expressible(config, structure) if all(map(counted, structure["decoder"])) else None


ADAPTER = BloomAdapter()


@register
class ShrunkBloomBackbone(ShrunkBackbone, BloomBackbone):
    """A `BloomBackbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkBloomCausalLM(ShrunkCausalLM, BloomCausalLM):
    """A `BloomCausalLM` on a shrunk backbone."""

    backbone_cls = ShrunkBloomBackbone


SHRUNK = {BloomBackbone: ShrunkBloomBackbone}
TASKS = {BloomCausalLM: ShrunkBloomCausalLM}


# ------------------------------------------------------------------------------------------------------------- decoding


def read(backbone) -> spec.LanguageModel:
    return spec.LanguageModel(
        family="bloom",
        embedding=array(backbone.token_embedding.embeddings),
        decoder=spec.Stack(
            blocks=[_block(layer) for layer in backbone.transformer_layers],
            embedding_norm=layer_norm(backbone.embeddings_layer_norm),
            final_norm=layer_norm(backbone.layer_norm),
        ),
    )


def _block(layer) -> spec.Block:
    attention = layer._self_attention_layer
    parts = [projection(part) for part in (attention._query_dense, attention._key_dense, attention._value_dense)]
    heads, head_dim = parts[0][2:]
    return spec.Block(
        normalize_first=True,
        attention=spec.Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            query_key_value=merged(*[part[:2] for part in parts]),
            output=dense(attention._output_dense),
            scale=1.0 / math.sqrt(head_dim),
            # The slopes that the layer itself uses, also where the number of heads is no power of two.
            alibi=tuple(attention._alibi_layer._get_slopes(heads)),
        ),
        attention_norm=layer_norm(layer._pre_attention_layernorm),
        feed_forward=spec.FeedForward(
            up=dense(layer._mlp_intermediate_dense),
            output=dense(layer._mlp_output_dense),
            activation="gelu_approximate",
        ),
        feed_forward_norm=layer_norm(layer._post_attention_layernorm),
    )


READERS = {"BloomBackbone": read}

"""Bloom: attention with linear biases (ALiBi) in place of positions, a norm right after the embedding."""

import functools
import math
from typing import Any

import keras
from keras_hub.models import BloomBackbone, BloomCausalLM

from tfvllm.families import spec
from tfvllm.families.alibi import AlibiAdapter
from tfvllm.families.arrays import array, dense, layer_norm, self_attention
from tfvllm.families.base import Block
from tfvllm.families.projections import attention, feed_forward
from tfvllm.families.shrunk import ShrunkBackbone, ShrunkCausalLM, register


class BloomAdapter(AlibiAdapter):
    """Bloom."""

    family = "bloom"

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

    def slopes_owner(self, layer: Any) -> Any:
        return layer._self_attention_layer._alibi_layer


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
    projections = (attention._query_dense, attention._key_dense, attention._value_dense, attention._output_dense)
    heads, head_dim = attention._query_dense.kernel.shape[1:]
    return spec.Block(
        normalize_first=True,
        attention=self_attention(
            *projections,
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

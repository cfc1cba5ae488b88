"""Phi-3: Llama's block under other names."""

import math
from collections.abc import Mapping
from typing import Any

from keras_hub.models import Phi3Backbone, Phi3CausalLM

from tfvllm.errors import InputError
from tfvllm.families import spec
from tfvllm.families.arrays import gated, self_attention
from tfvllm.families.base import Block, Structure, mha_scale
from tfvllm.families.llama import LlamaAdapter, decoder, rms_norm, rotary
from tfvllm.families.projections import attention, feed_forward
from tfvllm.families.shrunk import ShrunkBackbone, ShrunkCausalLM, register

_FACTORS = ("rope_scaling_short_factor", "rope_scaling_long_factor")


class Phi3Adapter(LlamaAdapter):
    """Phi-3."""

    family = "phi3"

    def describe(self, layer: Any, kind: str, index: int, hidden: int) -> Block:
        place = f"{kind}.{index}"
        projections = ("query_dense", "key_dense", "value_dense", "output_dense")
        dense = ("feedforward_intermediate_dense", "feedforward_output_dense", "feedforward_gate_dense")
        return Block(
            layer=layer,
            index=index,
            kind=kind,
            hidden_width=hidden,
            attention=attention(layer.attention, f"{place}.self", projections),
            feed_forward=feed_forward(layer, place, *dense, activation=layer.activation),
            norms={"attention": layer.pre_attention_layernorm, "feed_forward": layer.post_attention_layernorm},
        )

    def set_attention(self, attention: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        attention.num_query_heads = heads
        attention.num_key_value_heads = kv_heads
        attention.num_key_value_groups = heads // kv_heads
        attention._inv_norm_factor = mha_scale(head_dim)

    def traits(self, layer: Any) -> dict[str, Any]:
        """One factor for each pair of channels of a head, which no config can say where the head has its own size."""
        if layer.rope_scaling_type is None:
            return {}
        return {name: [float(factor) for factor in getattr(layer, name)] for name in _FACTORS}

    def set_traits(self, layer: Any, traits: Mapping[str, Any]) -> None:
        for name, factors in traits.items():
            for owner in (layer, layer.attention):
                setattr(owner, name, list(factors))
        if traits:
            turning = layer.attention.rotary_embedding_layer
            turning.inverese_freq_short_factor, turning.inverese_freq_long_factor = (list(traits[n]) for n in _FACTORS)

    def skeleton_config(self, config: dict[str, Any], structure: Structure) -> dict[str, Any]:
        config = super().skeleton_config(config, structure)
        if config["rope_scaling_type"] is not None:  # its one head is as wide as the model
            config.update({name: [1.0] * (config["hidden_dim"] // 2) for name in _FACTORS})
        return config

    def summary(self, backbone: Any, structure: Structure) -> dict[str, Any]:
        factors = structure["decoder"][0].traits
        return {**super().summary(backbone, structure), **{name: list(factors[name]) for name in factors}}


ADAPTER = Phi3Adapter()


@register
class ShrunkPhi3Backbone(ShrunkBackbone, Phi3Backbone):
    """A `Phi3Backbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkPhi3CausalLM(ShrunkCausalLM, Phi3CausalLM):
    """A `Phi3CausalLM` on a shrunk backbone."""

    backbone_cls = ShrunkPhi3Backbone


SHRUNK = {Phi3Backbone: ShrunkPhi3Backbone}
TASKS = {Phi3CausalLM: ShrunkPhi3CausalLM}


# ------------------------------------------------------------------------------------------------------------- decoding


def read(backbone) -> spec.LanguageModel:
    if backbone.rope_scaling_type is not None:
        raise InputError(
            f"this Phi-3 scales its rotary positions ({backbone.rope_scaling_type!r}): its frequencies change with the "
            "length of the text, which the decode engine does not do; expected rope_scaling_type=None"
        )
    return decoder(backbone, _block)


def _block(layer) -> spec.Block:
    attention = layer.attention
    head_dim = int(attention.query_dense.kernel.shape[2])
    return spec.Block(
        normalize_first=True,
        attention=self_attention(
            *(attention.query_dense, attention.key_dense, attention.value_dense, attention.output_dense),
            scale=1.0 / math.sqrt(head_dim),
            rotary=rotary(attention.rotary_embedding_layer, head_dim),
        ),
        attention_norm=rms_norm(layer.pre_attention_layernorm),
        feed_forward=gated(
            layer.feedforward_gate_dense,
            layer.feedforward_intermediate_dense,
            layer.feedforward_output_dense,
            layer.activation,
        ),
        feed_forward_norm=rms_norm(layer.post_attention_layernorm),
    )


READERS = {"Phi3Backbone": read}

"""SmolLM3: Llama's block, in some layers without positions (NoPE; Yang et al. 2025, arXiv:2501.18795)."""

from typing import Any

import keras
from keras_hub.models import SmolLM3Backbone, SmolLM3CausalLM

from tfvllm.families import spec
from tfvllm.families.arrays import array, bias, from_heads, gated, merged
from tfvllm.families.base import (
    Block,
    BlockShape,
    Structure,
    mha_scale,
    replace_layer,
)
from tfvllm.families.llama import LlamaAdapter, decoder, rms_norm
from tfvllm.families.projections import attention, feed_forward
from tfvllm.families.shrunk import ShrunkBackbone, ShrunkCausalLM, register


class SmolLM3Adapter(LlamaAdapter):
    """SmolLM3."""

    family = "smollm3"
    heads_key = "num_attention_heads"
    final_norm = "norm"

    def describe(self, layer: Any, kind: str, index: int, hidden: int) -> Block:
        place = f"{kind}.{index}"
        attend = layer.self_attn
        projections = ("q_proj", "k_proj", "v_proj", "o_proj")
        dense = ("up_proj", "down_proj", "gate_proj")
        return Block(
            layer=layer,
            index=index,
            kind=kind,
            hidden_width=hidden,
            attention=attention(attend, f"{place}.self", projections, head_dim=attend.head_dim),
            feed_forward=feed_forward(layer.mlp, place, *dense, activation=keras.activations.silu),
            norms={"attention": layer.input_layernorm, "feed_forward": layer.post_attention_layernorm},
        )

    def set_attention(self, attention: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        attention.num_attention_heads = heads
        attention.num_key_value_heads = kv_heads
        attention.num_key_value_groups = heads // kv_heads
        attention._inv_norm_factor = attention.scaling = mha_scale(head_dim)
        if attention.head_dim != head_dim:  # its frequencies are a weight
            attention.head_dim = head_dim
            old = attention.rotary_embedding
            new = type(old)(
                hidden_size=head_dim,
                num_attention_heads=1,
                max_position_embeddings=old.max_position_embeddings,
                rope_theta=old.rope_theta,
                partial_rotary_factor=old.partial_rotary_factor,
                name=old.name,
                dtype=old.dtype_policy,
            )
            new.build((None, None, head_dim))
            replace_layer(attention, "rotary_embedding", new)

    def set_block(self, layer: Any, shape: BlockShape) -> None:
        layer.mlp.intermediate_size = shape.ffn

    def traits(self, layer: Any) -> dict[str, Any]:
        """What the config says by the number of a layer."""
        return {"rope": bool(layer.self_attn.use_rope), "type": layer.attention_type}

    def _by_layer(self, structure: Structure) -> dict[str, Any]:
        traits = [block.traits for block in structure["decoder"]]
        return {"rope_layer_enabled_list": [t["rope"] for t in traits], "layer_types": [t["type"] for t in traits]}

    def skeleton_config(self, config: dict[str, Any], structure: Structure) -> dict[str, Any]:
        return {**super().skeleton_config(config, structure), **self._by_layer(structure)}

    def config_if_expressible(self, config: dict[str, Any], structure: Structure) -> dict[str, Any] | None:
        found = super().config_if_expressible(config, structure)
        return None if found is None else {**found, **self._by_layer(structure)}


ADAPTER = SmolLM3Adapter()


@register
class ShrunkSmolLM3Backbone(ShrunkBackbone, SmolLM3Backbone):
    """A `SmolLM3Backbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkSmolLM3CausalLM(ShrunkCausalLM, SmolLM3CausalLM):
    """A `SmolLM3CausalLM` on a shrunk backbone."""

    backbone_cls = ShrunkSmolLM3Backbone


SHRUNK = {SmolLM3Backbone: ShrunkSmolLM3Backbone}
TASKS = {SmolLM3CausalLM: ShrunkSmolLM3CausalLM}


# ------------------------------------------------------------------------------------------------------------- decoding


def read(backbone) -> spec.LanguageModel:
    return decoder(backbone, _block, backbone.norm)


def _block(layer) -> spec.Block:
    attention, mlp = layer.self_attn, layer.mlp
    return spec.Block(
        normalize_first=True,
        attention=spec.Attention(
            heads=attention.num_attention_heads,
            kv_heads=attention.num_key_value_heads,
            head_dim=attention.head_dim,
            query_key_value=_beside(attention.q_proj, attention.k_proj, attention.v_proj),
            output=from_heads(attention.o_proj),
            scale=attention._inv_norm_factor,
            rotary=_rotary(attention.rotary_embedding) if attention.use_rope else None,
        ),
        attention_norm=rms_norm(layer.input_layernorm),
        feed_forward=gated(mlp.gate_proj, mlp.up_proj, mlp.down_proj, "silu"),
        feed_forward_norm=rms_norm(layer.post_attention_layernorm),
    )


def _beside(*layers) -> spec.Linear:
    return merged(*[(array(layer.kernel), bias(layer)) for layer in layers])


def _rotary(layer) -> spec.Rotary:
    return spec.Rotary(array(layer.inv_freq), layer.attention_scaling)  # the frequencies are weights


READERS = {"SmolLM3Backbone": read}

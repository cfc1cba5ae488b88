"""Gemma, Gemma 2 and Gemma 3 (text): explicit head size, gate, alternating sliding windows, tied embeddings."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras_hub.models import Gemma3Backbone, GemmaBackbone

from tfvllm.errors import InputError
from tfvllm.families import spec
from tfvllm.families.arrays import array, gated, self_attention
from tfvllm.families.base import (
    FFN,
    HEADS,
    KV_HEADS,
    WIDTH,
    Adapter,
    Attention,
    Axes,
    Axis,
    Block,
    BlockShape,
    FeedForward,
    Projection,
    Structure,
    embedding_axes,
    mha_scale,
    walk,
    width_axes,
)
from tfvllm.families.llama import rotary
from tfvllm.families.shrunk import ShrunkBackbone, register

WIDE = Axis(WIDTH)


class GemmaAdapter(Adapter):
    """Gemma, Gemma 2, Gemma 3 (text)."""

    family = "gemma"
    only_stack = "decoder"

    def describe(self, layer: Any, kind: str, index: int, hidden: int) -> Block:
        place = f"{kind}.{index}"
        attention = layer.attention
        own = f"{place}.self"
        heads, kv = Axis(HEADS, own), Axis(KV_HEADS, own)
        neurons = Axis(FFN, place)

        def projection(name: str, kernel: Axes) -> Projection:
            attribute = f"{name}_dense"
            return Projection(name, getattr(attention, attribute), attention, attribute, kernel, ())

        def ffw(name: str, attribute: str, kernel: Axes) -> Projection:
            return Projection(name, getattr(layer, attribute), layer, attribute, kernel, ())

        names = {
            "attention": "pre_attention_norm",
            "post_attention": "post_attention_norm",
            "feed_forward": "pre_ffw_norm",
            "post_feed_forward": "post_ffw_norm",
        }
        return Block(
            layer=layer,
            index=index,
            kind=kind,
            hidden_width=hidden,
            attention=Attention(
                layer=attention,
                place=own,
                heads=attention.num_query_heads,
                kv_heads=attention.num_key_value_heads,
                head_dim=attention.head_dim,
                query=projection("query", (heads, WIDE, None)),
                key=projection("key", (kv, WIDE, None)),
                value=projection("value", (kv, WIDE, None)),
                output=projection("output", (heads, None, WIDE)),
                scale=mha_scale(attention.head_dim),
            ),
            feed_forward=FeedForward(
                place=place,
                width=int(layer.gating_ffw.kernel.shape[1]),
                gate=ffw("gate", "gating_ffw", (WIDE, neurons)),
                up=ffw("up", "gating_ffw_2", (WIDE, neurons)),
                down=ffw("down", "ffw_linear", (neurons, WIDE)),
                activation=functools.partial(keras.activations.gelu, approximate=True),
            ),
            norms={name: getattr(layer, attribute) for name, attribute in names.items() if hasattr(layer, attribute)},
        )

    def set_attention(self, attention: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        attention.num_query_heads = heads
        attention.num_key_value_heads = kv_heads
        attention.num_key_value_groups = heads // kv_heads
        attention.head_dim = head_dim

    def _per_neuron(self, layer: Any) -> int:
        """Gemma's intermediate_dim counts gate and up together, Gemma 3's does not."""
        return int(getattr(layer, "gate_dim_reduction", 2))

    def set_block(self, layer: Any, shape: BlockShape) -> None:
        layer.num_query_heads = shape.heads
        layer.num_key_value_heads = shape.kv_heads
        layer.intermediate_dim = shape.ffn * self._per_neuron(layer)

    def traits(self, layer: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"sliding_window": bool(layer.attention.use_sliding_window_attention)}
        if hasattr(layer.attention, "rope_wavelength"):
            found["rope_wavelength"] = float(layer.attention.rope_wavelength)
            found["rope_scaling_factor"] = float(layer.attention.rope_scaling_factor)
        return found

    def set_traits(self, layer: Any, traits: Mapping[str, Any]) -> None:
        if "sliding_window" in traits:
            layer.use_sliding_window_attention = traits["sliding_window"]
            layer.attention.use_sliding_window_attention = traits["sliding_window"]
        if "rope_wavelength" in traits:
            for owner in (layer, layer.attention):
                owner.rope_wavelength = traits["rope_wavelength"]
                owner.rope_scaling_factor = traits["rope_scaling_factor"]
            layer.attention.rope_layer.max_wavelength = traits["rope_wavelength"]
            layer.attention.rope_layer.scaling_factor = traits["rope_scaling_factor"]

    def skeleton_config(self, config: dict[str, Any], structure: Structure) -> dict[str, Any]:
        blocks = structure["decoder"]
        sizes = {"num_layers": len(blocks), "num_query_heads": 1, "num_key_value_heads": 1, "intermediate_dim": 2}
        return {**config, **sizes, "head_dim": blocks[0].head_dim}

    def config_if_expressible(self, config: dict[str, Any], structure: Structure) -> dict[str, Any] | None:
        blocks = structure["decoder"]
        first = blocks[0]
        if any((b.heads, b.kv_heads, b.ffn) != (first.heads, first.kv_heads, first.ffn) for b in blocks):
            return None
        three = "use_query_key_norm" in config
        windowed = config.get("use_sliding_window_attention", False)
        for index, block in enumerate(blocks):
            window = windowed and (index % 6 < 5 if three else index % 2 == 0)
            if block.traits.get("sliding_window", window) != window:
                return None
            if three and block.traits.get("rope_wavelength", 0.0) != (10_000.0 if window else 1_000_000.0):
                return None
        return {
            **config,
            "num_layers": len(blocks),
            "num_query_heads": first.heads,
            "num_key_value_heads": first.kv_heads,
            "intermediate_dim": first.ffn * (1 if three else 2),
            "head_dim": first.head_dim,
        }

    def summary(self, backbone: Any, structure: Structure) -> dict[str, Any]:
        blocks = structure["decoder"]
        return {
            "num_query_heads": max(b.heads for b in blocks),
            "num_key_value_heads": max(b.kv_heads for b in blocks),
            "intermediate_dim": max(layer.intermediate_dim for layer in backbone.transformer_layers),
        }

    def backbone_weights(self, backbone: Any) -> Iterator[tuple[str, Any, Axes]]:
        for name, variable in walk(backbone.token_embedding, "token_embedding."):
            yield name, variable, embedding_axes(variable.name)
        for name, variable in walk(backbone.layer_norm, "layer_norm."):
            yield name, variable, width_axes(variable)

    def width_changed(self, old: Any, new: Any) -> None:
        """Embeddings are multiplied by sqrt(width) going in, not coming out: move the change between the two."""
        ratio = math.sqrt(old.hidden_dim / new.hidden_dim)
        table = new.token_embedding.embeddings
        table.assign(np.asarray(table) * ratio)
        scale = new.layer_norm.scale
        scale.assign((1.0 + np.asarray(scale)) / ratio - 1.0)  # the norm multiplies by 1 + scale


ADAPTER = GemmaAdapter()


@register
class ShrunkGemmaBackbone(ShrunkBackbone, GemmaBackbone):
    """A `GemmaBackbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkGemma3Backbone(ShrunkBackbone, Gemma3Backbone):
    """A `Gemma3Backbone` (text only) with its own sizes in every block."""

    adapter = ADAPTER


SHRUNK = {GemmaBackbone: ShrunkGemmaBackbone, Gemma3Backbone: ShrunkGemma3Backbone}
TASKS: dict[type, type] = {}  # both tasks read the head size from the backbone


# ------------------------------------------------------------------------------------------------------------- decoding

# Gemma's layer interleaves the two halves of a rotated head. Queries and keys are permuted alike, so q·k does not
# change and the engine leaves the permutation out.


def read(backbone) -> spec.LanguageModel:
    if not getattr(backbone, "text_only_model", True):
        raise InputError("this Gemma 3 has a vision encoder; expected a text model (vision_encoder=None)")
    embedding = backbone.token_embedding
    return spec.LanguageModel(
        family=type(backbone).__name__.removesuffix("Backbone").lower(),
        embedding=array(embedding.embeddings),
        head=None if embedding.tie_weights else array(embedding.reverse_embeddings),
        logit_soft_cap=embedding.logit_soft_cap,
        decoder=spec.Stack(
            blocks=[_block(layer) for layer in backbone.transformer_layers],
            embedding_scale=math.sqrt(backbone.hidden_dim),
            final_norm=rms_norm(backbone.layer_norm),
        ),
    )


def rms_norm(layer) -> spec.Norm:
    return spec.Norm("rms", 1.0 + array(layer.scale), None, float(layer.epsilon))


def _optional(layer, name: str) -> spec.Norm | None:
    norm = getattr(layer, name, None)
    return None if norm is None else rms_norm(norm)


def _block(layer) -> spec.Block:
    attention = layer.attention
    if getattr(attention, "use_bidirectional_attention", False):
        raise InputError("this Gemma 3 attends in both directions (an embedding model); expected a causal one")
    head_dim = attention.head_dim
    normalizer = head_dim if attention.query_head_dim_normalize else layer.hidden_dim // attention.num_query_heads
    return spec.Block(
        normalize_first=True,
        attention=self_attention(
            *(attention.query_dense, attention.key_dense, attention.value_dense, attention.output_dense),
            scale=1.0 / math.sqrt(normalizer),
            window=attention.sliding_window_size if attention.use_sliding_window_attention else None,
            soft_cap=attention.logit_soft_cap,
            query_norm=_optional(attention, "query_norm"),
            key_norm=_optional(attention, "key_norm"),
            rotary=rotary(attention.rope_layer, head_dim),
        ),
        attention_norm=rms_norm(layer.pre_attention_norm),
        post_attention_norm=_optional(layer, "post_attention_norm"),
        feed_forward=gated(layer.gating_ffw, layer.gating_ffw_2, layer.ffw_linear, "gelu_approximate"),
        feed_forward_norm=rms_norm(layer.pre_ffw_norm),
        post_feed_forward_norm=_optional(layer, "post_ffw_norm"),
    )


READERS = dict.fromkeys(("GemmaBackbone", "Gemma3Backbone"), read)

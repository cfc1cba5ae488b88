"""Llama 2 and 3, Mistral, Qwen 2 and 3: rotary positions, RMS norms, a gate, grouped-query attention."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import keras
import numpy as np
from keras_hub.models import (
    Llama3Backbone,
    Llama3CausalLM,
    LlamaBackbone,
    LlamaCausalLM,
    MistralBackbone,
    MistralCausalLM,
    Qwen3Backbone,
    Qwen3CausalLM,
    QwenBackbone,
    QwenCausalLM,
)

from tfvllm.families import spec
from tfvllm.families.arrays import array, gated, self_attention
from tfvllm.families.base import (
    Adapter,
    Axes,
    Block,
    BlockShape,
    Structure,
    embedding_axes,
    mha_scale,
    walk,
    width_axes,
)
from tfvllm.families.projections import attention, feed_forward
from tfvllm.families.shrunk import ShrunkBackbone, ShrunkCausalLM, register


class LlamaAdapter(Adapter):
    """Llama, Llama 3, Mistral, Qwen, Qwen 3."""

    family = "llama"
    only_stack = "decoder"
    heads_key: ClassVar[str] = "num_query_heads"  # in configs
    final_norm: ClassVar[str] = "layer_norm"  # of a backbone

    def describe(self, layer: Any, kind: str, index: int, hidden: int) -> Block:
        place = f"{kind}.{index}"
        names = ("_feedforward_intermediate_dense", "_feedforward_output_dense", "_feedforward_gate_dense")
        return Block(
            layer=layer,
            index=index,
            kind=kind,
            hidden_width=hidden,
            attention=attention(layer._self_attention_layer, f"{place}.self"),
            feed_forward=feed_forward(layer, place, *names, activation=layer.activation),
            norms={"attention": layer._self_attention_layernorm, "feed_forward": layer._feedforward_layernorm},
        )

    def set_attention(self, attention: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        hidden = "_" if hasattr(attention, "_num_query_heads") else ""  # Mistral's are private
        setattr(attention, f"{hidden}num_query_heads", heads)
        setattr(attention, f"{hidden}num_key_value_heads", kv_heads)
        setattr(attention, f"{hidden}num_key_value_groups", heads // kv_heads)
        if hasattr(attention, f"{hidden}head_dim"):
            setattr(attention, f"{hidden}head_dim", head_dim)
        attention._inv_norm_factor = mha_scale(head_dim)

    def set_block(self, layer: Any, shape: BlockShape) -> None:
        layer.num_query_heads = shape.heads
        layer.num_key_value_heads = shape.kv_heads
        layer.intermediate_dim = shape.ffn

    def complete_config(self, config: dict[str, Any], backbone: Any) -> dict[str, Any]:
        if hasattr(backbone, "tie_word_embeddings"):  # Llama's get_config leaves it out
            config["tie_word_embeddings"] = backbone.tie_word_embeddings
        return config

    def skeleton_config(self, config: dict[str, Any], structure: Structure) -> dict[str, Any]:
        blocks = structure["decoder"]
        config = {**config, "num_layers": len(blocks), self.heads_key: 1, "num_key_value_heads": 1}
        if "head_dim" in config:
            config["head_dim"] = blocks[0].head_dim
        return {**config, "intermediate_dim": 1}

    def config_if_expressible(self, config: dict[str, Any], structure: Structure) -> dict[str, Any] | None:
        blocks = structure["decoder"]
        first = blocks[0]
        if any((b.heads, b.kv_heads, b.ffn) != (first.heads, first.kv_heads, first.ffn) for b in blocks):
            return None
        if config.get("head_dim") is None and config["hidden_dim"] // first.heads != first.head_dim:
            return None
        if config.get("tie_word_embeddings") and "rope_frequency_adjustment_factor" in config:
            return None  # Llama's own config would load untied
        return {
            **config,
            "num_layers": len(blocks),
            self.heads_key: first.heads,
            "num_key_value_heads": first.kv_heads,
            "intermediate_dim": first.ffn,
        }

    def summary(self, backbone: Any, structure: Structure) -> dict[str, Any]:
        blocks = structure["decoder"]
        return {
            self.heads_key: max(b.heads for b in blocks),
            "num_key_value_heads": max(b.kv_heads for b in blocks),
            "intermediate_dim": max(b.ffn for b in blocks),
        }

    def backbone_weights(self, backbone: Any) -> Iterator[tuple[str, Any, Axes]]:
        for name, variable in walk(backbone.token_embedding, "token_embedding."):
            yield name, variable, embedding_axes(variable.name)
        for name, variable in walk(getattr(backbone, self.final_norm), f"{self.final_norm}."):
            yield name, variable, width_axes(variable)


ADAPTER = LlamaAdapter()


@register
class ShrunkLlamaBackbone(ShrunkBackbone, LlamaBackbone):
    """A `LlamaBackbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkLlama3Backbone(ShrunkBackbone, Llama3Backbone):
    """A `Llama3Backbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkMistralBackbone(ShrunkBackbone, MistralBackbone):
    """A `MistralBackbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkQwenBackbone(ShrunkBackbone, QwenBackbone):
    """A `QwenBackbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkQwen3Backbone(ShrunkBackbone, Qwen3Backbone):
    """A `Qwen3Backbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkLlamaCausalLM(ShrunkCausalLM, LlamaCausalLM):
    """A `LlamaCausalLM` on a shrunk backbone."""

    backbone_cls = ShrunkLlamaBackbone


@register
class ShrunkLlama3CausalLM(ShrunkCausalLM, Llama3CausalLM):
    """A `Llama3CausalLM` on a shrunk backbone."""

    backbone_cls = ShrunkLlama3Backbone


@register
class ShrunkMistralCausalLM(ShrunkCausalLM, MistralCausalLM):
    """A `MistralCausalLM` on a shrunk backbone."""

    backbone_cls = ShrunkMistralBackbone


@register
class ShrunkQwenCausalLM(ShrunkCausalLM, QwenCausalLM):
    """A `QwenCausalLM` on a shrunk backbone."""

    backbone_cls = ShrunkQwenBackbone


@register
class ShrunkQwen3CausalLM(ShrunkCausalLM, Qwen3CausalLM):
    """A `Qwen3CausalLM` on a shrunk backbone."""

    backbone_cls = ShrunkQwen3Backbone


SHRUNK = {
    LlamaBackbone: ShrunkLlamaBackbone,
    Llama3Backbone: ShrunkLlama3Backbone,
    MistralBackbone: ShrunkMistralBackbone,
    QwenBackbone: ShrunkQwenBackbone,
    Qwen3Backbone: ShrunkQwen3Backbone,
}
TASKS = {
    LlamaCausalLM: ShrunkLlamaCausalLM,
    Llama3CausalLM: ShrunkLlama3CausalLM,
    MistralCausalLM: ShrunkMistralCausalLM,
    QwenCausalLM: ShrunkQwenCausalLM,
    Qwen3CausalLM: ShrunkQwen3CausalLM,
}


# ------------------------------------------------------------------------------------------------------------- decoding


def read(backbone) -> spec.LanguageModel:
    return decoder(backbone, _block)


def decoder(backbone, block: Callable[[Any], spec.Block], final_norm=None) -> spec.LanguageModel:
    """A model of blocks between an embedding and an RMS norm, as Llama's.

    block: reads one of its layers. final_norm: the layer after them; default `layer_norm` of the backbone.
    """
    embedding = backbone.token_embedding
    return spec.LanguageModel(
        family=type(backbone).__name__.removesuffix("Backbone").lower(),
        embedding=array(embedding.embeddings),
        head=None if embedding.tie_weights else array(embedding.reverse_embeddings),
        decoder=spec.Stack(
            blocks=[block(layer) for layer in backbone.transformer_layers],
            final_norm=rms_norm(final_norm or backbone.layer_norm),
        ),
    )


def rotary(layer, head_dim: int) -> spec.Rotary:
    """The frequencies that a keras-nlp rotary layer uses, asked of the layer itself (Llama 3's and YaRN's included)."""
    frequencies = np.asarray(keras.ops.convert_to_numpy(layer._get_inverse_freq(head_dim)), np.float32)
    magnitude = 1.0
    if layer.rope_type == "yarn":
        magnitude = 0.1 * float(np.log(layer.scaling_factor)) + 1.0
    return spec.Rotary(frequencies, magnitude)


def rms_norm(layer) -> spec.Norm:
    return spec.Norm("rms", array(layer.scale), None, float(layer.epsilon))


def _block(layer) -> spec.Block:
    attention = layer._self_attention_layer
    return spec.Block(
        normalize_first=True,
        attention=self_attention_of(attention, window=_window(layer, attention)),
        attention_norm=rms_norm(layer._self_attention_layernorm),
        feed_forward=feed_forward_of(layer),
        feed_forward_norm=rms_norm(layer._feedforward_layernorm),
    )


def feed_forward_of(layer) -> spec.FeedForward:
    """Of a layer that names its feed-forward as Llama's."""
    return gated(
        layer._feedforward_gate_dense,
        layer._feedforward_intermediate_dense,
        layer._feedforward_output_dense,
        layer.activation,
    )


def self_attention_of(layer, window: int | None) -> spec.Attention:
    """Of an attention layer named as Llama's; norms of queries and keys where it has them (Qwen 3)."""
    query_norm = getattr(layer, "_query_dense_layer_norm", None)
    key_norm = getattr(layer, "_key_dense_layer_norm", None)
    return self_attention(
        *(layer._query_dense, layer._key_dense, layer._value_dense, layer._output_dense),
        scale=float(layer._inv_norm_factor),
        window=window,
        query_norm=None if query_norm is None else rms_norm(query_norm),
        key_norm=None if key_norm is None else rms_norm(key_norm),
        rotary=rotary(layer.rotary_embedding_layer, int(layer._query_dense.kernel.shape[2])),
    )


def _window(layer, attention) -> int | None:
    if hasattr(layer, "sliding_window"):  # Mistral
        return layer.sliding_window
    if getattr(attention, "use_sliding_window_attention", None) is False:  # Qwen 2 with its window switched off
        return None
    return getattr(attention, "sliding_window_size", None)


READERS = dict.fromkeys(("LlamaBackbone", "MistralBackbone", "QwenBackbone", "Qwen3Backbone"), read)

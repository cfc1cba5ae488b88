"""T5Gemma: Gemma 2's blocks in an encoder that sees both ways and in a decoder, each with its own width."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops
from keras_hub.models import T5GemmaBackbone

from tfvllm.families import spec
from tfvllm.families.arrays import array, cross_attention, gated, self_attention
from tfvllm.families.base import (
    VOCABULARY,
    WIDTH,
    Adapter,
    Attention,
    Axes,
    Axis,
    Block,
    BlockShape,
    Structure,
    walk,
)
from tfvllm.families.gemma import rms_norm
from tfvllm.families.llama import rotary
from tfvllm.families.projections import attention, feed_forward
from tfvllm.families.shrunk import NarrowCache, ShrunkBackbone, change_class, register

_STACKS = ("encoder", "decoder")
_DENSE = ("query_dense", "key_dense", "value_dense", "output_dense")


class T5GemmaAdapter(Adapter):
    """T5Gemma."""

    family = "t5gemma"

    def stacks(self, backbone: Any) -> dict[str, list[Any]]:
        return {kind: list(getattr(backbone, f"{kind}_layers")) for kind in _STACKS}

    def width_of(self, backbone: Any, kind: str) -> int:
        return int(getattr(backbone, f"{kind}_hidden_dim"))

    def describe(self, layer: Any, kind: str, index: int, hidden: int) -> Block:
        place = f"{kind}.{index}"
        norms = {
            "attention": layer.pre_self_attn_layernorm,
            "post_attention": layer.post_self_attn_layernorm,
            "feed_forward": layer.pre_feedforward_layernorm,
            "post_feed_forward": layer.post_feedforward_layernorm,
        }
        cross = None
        if kind == "decoder":
            norms |= {
                "cross_attention": layer.pre_cross_attn_layernorm,
                "post_cross_attention": layer.post_cross_attn_layernorm,
            }
            scale = layer.cross_attn.scaling
            cross = attention(layer.cross_attn, f"{place}.cross", _DENSE, scale=scale, prefix="cross_")
        dense = ("up_proj", "down_proj", "gate_proj")
        return Block(
            layer=layer,
            index=index,
            kind=kind,
            hidden_width=hidden,
            attention=attention(layer.self_attn, f"{place}.self", _DENSE, scale=layer.self_attn.scaling),
            cross_attention=cross,
            feed_forward=feed_forward(layer.mlp, place, *dense, activation=layer.mlp.act_fn),
            norms=norms,
        )

    def blocks(self, model: Any) -> list[Block]:
        """Where the stacks have one width, its channels go together; else each stack has channels of its own."""
        found = super().blocks(model)
        return found if _one_width(self.backbone(model)) else [_apart(block) for block in found]

    def set_attention(self, attention: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        attention.num_query_heads = heads
        attention.num_key_value_heads = kv_heads
        attention.num_key_value_groups = heads // kv_heads
        attention.head_dim = head_dim

    def set_block(self, layer: Any, shape: BlockShape) -> None:
        layer.num_attention_heads, layer.num_key_value_heads = shape.heads, shape.kv_heads
        layer.intermediate_size = layer.mlp.intermediate_size = shape.ffn

    def traits(self, layer: Any) -> dict[str, Any]:
        """What the config says by the number of a layer."""
        return {"type": layer.layer_type}

    def skeleton_config(self, config: dict[str, Any], structure: Structure) -> dict[str, Any]:
        return {
            **config,
            **_sized(structure, {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_dim": 1}),
        }

    def config_if_expressible(self, config: dict[str, Any], structure: Structure) -> dict[str, Any] | None:
        found = dict(config)
        for kind, blocks in structure.items():
            first = blocks[0]
            sizes = (first.heads, first.kv_heads, first.ffn)
            if any((b.heads, b.kv_heads, b.ffn) != sizes or _cross(b) not in ((0, 0), sizes[:2]) for b in blocks):
                return None
            named = ("num_attention_heads", "num_key_value_heads", "intermediate_dim")
            found |= _sized({kind: blocks}, dict(zip(named, sizes)))
        return found

    def summary(self, backbone: Any, structure: Structure) -> dict[str, Any]:
        found = {}
        for kind, blocks in structure.items():
            both = [size for b in blocks for size in ((b.heads, b.kv_heads), _cross(b))]
            found[f"{kind}_num_attention_heads"] = max(heads for heads, _ in both)
            found[f"{kind}_num_key_value_heads"] = max(kv_heads for _, kv_heads in both)  # of the task's caches
            found[f"{kind}_intermediate_dim"] = max(b.ffn for b in blocks)
        return found

    def resized_config(self, config: dict[str, Any], width: int | None, vocabulary: int | None) -> dict[str, Any]:
        found = super().resized_config(config, None, vocabulary)
        names = ("encoder_hidden_dim", "decoder_hidden_dim", "cross_attention_hidden_size")
        return found if width is None else {**found, **dict.fromkeys(names, width)}

    def extra_block_axes(self, block: Block) -> dict[int, Axes]:
        """Norms, whose channels are those that their block's feed-forward reads."""
        width = block.feed_forward.projections[0].kernel_axes[:1]
        return {id(variable): width for norm in block.norms.values() for variable in norm.weights}

    def backbone_weights(self, backbone: Any) -> Iterator[tuple[str, Any, Axes]]:
        tables = {"encoder": "token_embedding", "decoder": "decoder_token_embedding"}
        for kind in _STACKS:
            width = Axis(WIDTH, "" if _one_width(backbone) else kind)
            for name, variable in walk(getattr(backbone, tables[kind]), f"{tables[kind]}."):
                tokens = Axis(VOCABULARY)
                yield name, variable, (width, tokens) if "reverse" in variable.name else (tokens, width)
            for name, variable in walk(getattr(backbone, f"{kind}_norm"), f"{kind}_norm."):
                yield name, variable, (width,)

    def width_changed(self, old: Any, new: Any) -> None:
        """As Gemma's, in both stacks; only a tied table also comes out, past the decoder's last norm."""
        ratio = math.sqrt(old.decoder_hidden_dim / new.decoder_hidden_dim)
        for embedding in (new.token_embedding, new.decoder_token_embedding):
            embedding.embeddings.assign(np.asarray(embedding.embeddings) * ratio)
        if new.tie_word_embeddings:
            scale = new.decoder_norm.scale
            scale.assign((1.0 + np.asarray(scale)) / ratio - 1.0)  # the norm multiplies by 1 + scale


def _cross(shape: BlockShape) -> tuple[int, int]:
    """Heads of queries, and of keys and values, in the cross-attention; 0 in an encoder."""
    heads = shape.cross_heads or 0
    return heads, shape.cross_kv_heads or heads


def _one_width(backbone: Any) -> bool:
    return backbone.encoder_hidden_dim == backbone.decoder_hidden_dim


def _apart(block: Block) -> Block:
    """`block` with the channels of its stack, and of the encoder's where it reads those."""

    def named(part: Any, reads: str) -> Any:
        axes = [axis._replace(place=reads) if axis and axis.unit == WIDTH else axis for axis in part.kernel_axes]
        biases = [axis._replace(place=reads) if axis and axis.unit == WIDTH else axis for axis in part.bias_axes]
        return replace(part, kernel_axes=tuple(axes), bias_axes=tuple(biases))

    def of(layer: Attention, reads: str) -> Attention:
        own = {name: named(getattr(layer, name), block.kind) for name in ("query", "output")}
        return replace(layer, **own, **{name: named(getattr(layer, name), reads) for name in ("key", "value")})

    inside: Any = block.feed_forward
    return replace(
        block,
        attention=of(block.attention, block.kind),
        cross_attention=None if block.cross_attention is None else of(block.cross_attention, "encoder"),
        feed_forward=replace(
            inside, **{name: named(getattr(inside, name), block.kind) for name in ("up", "down", "gate")}
        ),
    )


def _sized(structure: Structure, sizes: dict[str, int]) -> dict[str, Any]:
    """Arguments of the backbone for both stacks: these `sizes`, and what the structure says of depth and types."""
    found: dict[str, Any] = {}
    for kind, blocks in structure.items():
        types = [block.traits["type"] for block in blocks]
        own = {**sizes, "num_layers": len(blocks), "head_dim": blocks[0].head_dim, "layer_types": types}
        found |= {f"{kind}_{name}": value for name, value in own.items()}
    return found


ADAPTER = T5GemmaAdapter()
_Layer: Any = keras.layers.Layer if TYPE_CHECKING else object


class WidenedCache(_Layer):
    """Mixin over `NarrowCache`: the first keys and values of the encoder come from the layer, not from a cache."""

    whole_kv_heads: int

    def call(self, *args: Any, **kwargs: Any) -> Any:
        output, cache = super().call(*args, **kwargs)
        room = self.whole_kv_heads - cache.shape[-2]
        return output, ops.pad(cache, [*[[0, 0]] * 3, [0, room], [0, 0]]) if room else cache


@register
class ShrunkT5GemmaBackbone(ShrunkBackbone, T5GemmaBackbone):
    """A `T5GemmaBackbone` with its own sizes in every block."""

    adapter = ADAPTER

    def __init__(self, **config: Any):
        super().__init__(**config)
        for layer in self.decoder_layers:
            if isinstance(layer.cross_attn, NarrowCache):
                change_class(layer.cross_attn, WidenedCache)
                layer.cross_attn.whole_kv_heads = self.decoder_num_key_value_heads


SHRUNK = {T5GemmaBackbone: ShrunkT5GemmaBackbone}
TASKS: dict[type, type] = {}  # the task reads the cache's sizes from the backbone


# ------------------------------------------------------------------------------------------------------------- decoding


def read(backbone) -> spec.LanguageModel:
    embedding = backbone.decoder_token_embedding
    return spec.LanguageModel(
        family="t5gemma",
        embedding=array(embedding.embeddings),
        head=None if embedding.tie_weights else array(embedding.reverse_embeddings),
        logit_soft_cap=backbone.final_logit_softcapping,
        encoder=spec.Stack(
            blocks=[_block(layer) for layer in backbone.encoder_layers],
            embedding=array(backbone.token_embedding.embeddings),
            embedding_scale=math.sqrt(backbone.encoder_hidden_dim),
            final_norm=rms_norm(backbone.encoder_norm),
        ),
        decoder=spec.Stack(
            blocks=[_block(layer, decoder=True) for layer in backbone.decoder_layers],
            embedding_scale=math.sqrt(backbone.decoder_hidden_dim),
            final_norm=rms_norm(backbone.decoder_norm),
        ),
    )


def _block(layer, *, decoder: bool = False) -> spec.Block:
    attention, mlp = layer.self_attn, layer.mlp
    # keras-nlp's window is what lies before the query; its encoder sees everything, whatever its layers are called.
    windowed = decoder and layer.layer_type == "sliding_attention"
    name = mlp.hidden_activation
    return spec.Block(
        normalize_first=True,
        attention=self_attention(
            *_projections(attention),
            scale=attention.scaling,
            window=layer.sliding_window + 1 if windowed else None,
            soft_cap=attention.logit_soft_cap,
            rotary=rotary(attention.rotary_embedding, int(attention.query_dense.kernel.shape[-1])),
        ),
        attention_norm=rms_norm(layer.pre_self_attn_layernorm),
        post_attention_norm=rms_norm(layer.post_self_attn_layernorm),
        feed_forward=gated(
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj), name if name == "gelu_approximate" else mlp.act_fn
        ),
        feed_forward_norm=rms_norm(layer.pre_feedforward_layernorm),
        post_feed_forward_norm=rms_norm(layer.post_feedforward_layernorm),
        cross_attention=_read_cross(layer.cross_attn) if decoder else None,
        cross_norm=rms_norm(layer.pre_cross_attn_layernorm) if decoder else None,
        post_cross_norm=rms_norm(layer.post_cross_attn_layernorm) if decoder else None,
    )


def _read_cross(attention) -> spec.CrossAttention:
    return cross_attention(*_projections(attention), scale=attention.scaling, soft_cap=attention.logit_soft_cap)


def _projections(attention) -> tuple:
    return attention.query_dense, attention.key_dense, attention.value_dense, attention.output_dense


READERS = {"T5GemmaBackbone": read}

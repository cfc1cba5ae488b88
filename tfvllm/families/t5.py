"""T5: relative position bias shared by a stack, so its self-attention heads go together; flat projections."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from keras_hub.models import T5Backbone, T5Seq2SeqLM

from tfvllm.families import spec
from tfvllm.families.arrays import activation_name, array, merged
from tfvllm.families.base import (
    HEADS,
    Adapter,
    Attention,
    Axes,
    Axis,
    Block,
    BlockShape,
    Structure,
    Weight,
    embedding_axes,
    walk,
    width_axes,
)
from tfvllm.families.projections import attention, feed_forward
from tfvllm.families.shrunk import ShrunkBackbone, ShrunkSeq2SeqLM, register

_PROJECTORS = ("query_projector", "key_projector", "value_projector", "output_projector")


def _attention(layer: Any, place: str, prefix: str = "") -> Attention:
    """T5 does not scale its scores."""
    return attention(layer, place, _PROJECTORS, head_dim=layer.key_value_dim, scale=1.0, prefix=prefix)


class T5Adapter(Adapter):
    """T5, gated or not."""

    family = "t5"
    tied_heads = True

    def describe(self, layer: Any, kind: str, index: int, hidden: int) -> Block:
        place = f"{kind}.{index}"
        gated = layer.use_gated_activation
        # In keras-hub the activation sits on `input_projector`: with a gate, that is the gate.
        ffn = feed_forward(
            layer,
            place,
            up="gate_projector" if gated else "input_projector",
            down="output_projector",
            gate="input_projector" if gated else None,
            activation=layer.input_projector.activation,
        )
        norms = {"attention": layer.self_attention_layer_norm, "feed_forward": layer.layer_norm}
        cross = getattr(layer, "cross_attention", None)
        if cross is not None:
            norms["cross_attention"] = layer.cross_attention_layer_norm
        return Block(
            layer=layer,
            index=index,
            kind=kind,
            hidden_width=hidden,
            attention=_attention(layer.self_attention, f"{place}.self"),
            cross_attention=_attention(cross, f"{place}.cross", "cross_") if cross is not None else None,
            feed_forward=ffn,
            norms=norms,
        )

    def set_attention(self, attention: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        attention.num_heads = heads
        attention.key_value_dim = head_dim
        attention.inner_dim = heads * head_dim
        if attention.use_relative_attention_bias and attention.relative_attention_bias.shape[1] != heads:
            old = attention.relative_attention_bias
            locked = attention._tracker.locked
            attention._tracker.unlock()
            try:
                attention._untrack_variable(old)
                attention._tracker.unlock()
                attention.relative_attention_bias = attention.add_weight(
                    name="embeddings", shape=[attention.relative_attention_buckets, heads], initializer="zeros"
                )
            finally:
                if locked:
                    attention._tracker.lock()

    def set_block(self, layer: Any, shape: BlockShape) -> None:
        """T5's block keeps no sizes of its own."""

    def skeleton_config(self, config: dict[str, Any], structure: Structure) -> dict[str, Any]:
        depth = max(len(stack) for stack in structure.values())
        head_dim = structure["encoder"][0].head_dim
        return {**config, "num_layers": depth, "num_heads": 1, "key_value_dim": head_dim, "intermediate_dim": 1}

    def config_if_expressible(self, config: dict[str, Any], structure: Structure) -> dict[str, Any] | None:
        blocks = [block for stack in structure.values() for block in stack]
        first = blocks[0]
        alike = all((b.heads, b.cross_heads or b.heads, b.ffn) == (first.heads, first.heads, first.ffn) for b in blocks)
        depth = {len(stack) for stack in structure.values()}
        if not alike or len(depth) != 1:
            return None
        return {
            **config,
            "num_layers": depth.pop(),
            "num_heads": first.heads,
            "key_value_dim": first.head_dim,
            "intermediate_dim": first.ffn,
        }

    def summary(self, backbone: Any, structure: Structure) -> dict[str, Any]:
        blocks = [block for stack in structure.values() for block in stack]
        return {
            "num_heads": max(max(b.heads, b.cross_heads or 0) for b in blocks),
            "intermediate_dim": max(b.ffn for b in blocks),
            "key_value_dim": blocks[0].head_dim,
        }

    def weights(self, model: Any) -> list[Weight]:
        # The bias belongs to the stack, whichever block is its first.
        found = []
        for weight in super().weights(model):
            if weight.name.endswith("self_attention.embeddings"):
                kind = weight.name.split(".")[0]
                weight = weight._replace(name=f"backbone.{kind}_position_bias")
            found.append(weight)
        return found

    def extra_block_axes(self, block: Block) -> dict[int, Axes]:
        attention = block.attention.layer
        if not attention.use_relative_attention_bias:
            return {}
        return {id(attention.relative_attention_bias): (None, Axis(HEADS, block.attention.place))}

    def backbone_weights(self, backbone: Any) -> Iterator[tuple[str, Any, Axes]]:
        for name, variable in walk(backbone.token_embedding, "token_embedding."):
            yield name, variable, embedding_axes(variable.name)
        for kind in ("encoder", "decoder"):
            for name, variable in walk(getattr(backbone, f"{kind}_layer_norm"), f"{kind}_layer_norm."):
                yield name, variable, width_axes(variable)

    def width_changed(self, old: Any, new: Any) -> None:
        """A tied head divides by sqrt(width): the decoder's last norm makes up for the new width."""
        if new.tie_embedding_weights:
            ratio = math.sqrt(new.hidden_dim / old.hidden_dim)
            for variable in new.decoder_layer_norm.weights:
                variable.assign(np.asarray(variable) * ratio)


ADAPTER = T5Adapter()


@register
class ShrunkT5Backbone(ShrunkBackbone, T5Backbone):
    """A `T5Backbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkT5Seq2SeqLM(ShrunkSeq2SeqLM, T5Seq2SeqLM):
    """A `T5Seq2SeqLM` on a shrunk backbone."""

    backbone_cls = ShrunkT5Backbone


SHRUNK = {T5Backbone: ShrunkT5Backbone}
TASKS = {T5Seq2SeqLM: ShrunkT5Seq2SeqLM}


# ------------------------------------------------------------------------------------------------------------- decoding


def read(backbone) -> spec.LanguageModel:
    embedding = backbone.token_embedding
    tied = backbone.tie_embedding_weights
    return spec.LanguageModel(
        family="t5",
        embedding=array(embedding.embeddings),
        head=None if tied else array(embedding.reverse_embeddings),
        head_scale=backbone.hidden_dim**-0.5 if tied else 1.0,
        encoder=_stack(backbone.encoder_transformer_layers, backbone.encoder_layer_norm, bidirectional=True),
        decoder=_stack(backbone.decoder_transformer_layers, backbone.decoder_layer_norm, bidirectional=False),
    )


def _stack(layers, norm, *, bidirectional: bool) -> spec.Stack:
    first = layers[0].self_attention
    return spec.Stack(
        blocks=[_block(layer) for layer in layers],
        final_norm=_norm(norm),
        relative_bias=spec.RelativeBias(
            table=array(first.relative_attention_bias),
            bidirectional=bidirectional,
            max_distance=first.relative_attention_max_distance,
        ),
    )


def _norm(layer) -> spec.Norm:
    return spec.Norm("rms", array(layer.weight), None, float(layer.epsilon))


def _linear(layer) -> spec.Linear:
    return spec.Linear(array(layer.kernel))


def _block(layer) -> spec.Block:
    attention = layer.self_attention
    heads, head_dim = attention.num_heads, attention.key_value_dim
    cross = getattr(layer, "cross_attention", None)
    up = array(layer.input_projector.kernel)
    if layer.use_gated_activation:
        # keras-nlp: act(input_projector(x)) * gate_projector(x); the part under the activation stands left.
        up = np.concatenate([up, array(layer.gate_projector.kernel)], axis=1)
    return spec.Block(
        normalize_first=True,
        attention=spec.Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            query_key_value=merged(
                *[
                    (array(part.kernel), None)
                    for part in (attention.query_projector, attention.key_projector, attention.value_projector)
                ]
            ),
            output=_linear(attention.output_projector),
            scale=1.0,
        ),
        attention_norm=_norm(layer.self_attention_layer_norm),
        feed_forward=spec.FeedForward(
            up=spec.Linear(up),
            output=_linear(layer.output_projector),
            activation=activation_name(layer.input_projector.activation),
            gated=layer.use_gated_activation,
        ),
        feed_forward_norm=_norm(layer.layer_norm),
        cross_attention=None
        if cross is None
        else spec.CrossAttention(
            heads=cross.num_heads,
            kv_heads=cross.num_heads,
            head_dim=cross.key_value_dim,
            query=_linear(cross.query_projector),
            key_value=merged((array(cross.key_projector.kernel), None), (array(cross.value_projector.kernel), None)),
            output=_linear(cross.output_projector),
            scale=1.0,
        ),
        cross_norm=None if cross is None else _norm(layer.cross_attention_layer_norm),
    )


READERS = {"T5Backbone": read}

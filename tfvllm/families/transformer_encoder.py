"""BERT, DistilBERT, RoBERTa and XLM-RoBERTa: stacks of keras-nlp's TransformerEncoder."""

from collections.abc import Iterator
from typing import Any, ClassVar

from keras_hub.models import BertBackbone, DistilBertBackbone, RobertaBackbone, XLMRobertaBackbone

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
from tfvllm.families.projections import WIDE, attention, feed_forward
from tfvllm.families.shrunk import ShrunkBackbone, register


class TransformerStackAdapter(Adapter):
    """What TransformerEncoder and TransformerDecoder have in common."""

    heads_key: ClassVar[str] = "num_heads"  # in configs, of backbones and blocks

    def describe(self, layer: Any, kind: str, index: int, hidden: int) -> Block:
        place = f"{kind}.{index}"
        cross = getattr(layer, "_cross_attention_layer", None)
        norms = {
            "attention": layer._self_attention_layer_norm,
            "feed_forward": layer._feedforward_layer_norm,
        }
        if cross is not None:
            norms["cross_attention"] = layer._cross_attention_layer_norm
        names = ("_feedforward_intermediate_dense", "_feedforward_output_dense")
        return Block(
            layer=layer,
            index=index,
            kind=kind,
            hidden_width=hidden,
            attention=attention(layer._self_attention_layer, f"{place}.self"),
            cross_attention=attention(cross, f"{place}.cross", prefix="cross_") if cross is not None else None,
            feed_forward=feed_forward(layer, place, *names, activation=layer.activation),
            norms=norms,
            normalize_first=layer.normalize_first,
        )

    def set_attention(self, attention: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        attention._num_heads = heads
        attention._key_dim = attention._value_dim = head_dim
        attention._inverse_sqrt_key_dim = mha_scale(head_dim)

    def set_block(self, layer: Any, shape: BlockShape) -> None:
        setattr(layer, self.heads_key, shape.heads)
        layer.intermediate_dim = shape.ffn

    def skeleton_config(self, config: dict[str, Any], structure: Structure) -> dict[str, Any]:
        layers = {kind: len(blocks) for kind, blocks in structure.items()}
        return {**config, "num_layers": max(layers.values()), self.heads_key: 1, "intermediate_dim": 1}

    def config_if_expressible(self, config: dict[str, Any], structure: Structure) -> dict[str, Any] | None:
        blocks = [block for stack in structure.values() for block in stack]
        first = blocks[0]
        alike = all((b.heads, b.cross_heads or b.heads, b.ffn) == (first.heads, first.heads, first.ffn) for b in blocks)
        depth = {len(stack) for stack in structure.values()}
        if not alike or len(depth) != 1 or config["hidden_dim"] // first.heads != first.head_dim:
            return None
        return {**config, "num_layers": depth.pop(), self.heads_key: first.heads, "intermediate_dim": first.ffn}

    def summary(self, backbone: Any, structure: Structure) -> dict[str, Any]:
        blocks = [block for stack in structure.values() for block in stack]
        return {
            self.heads_key: max(max(b.heads, b.cross_heads or 0) for b in blocks),
            "intermediate_dim": max(b.ffn for b in blocks),
        }

    def backbone_weights(self, backbone: Any) -> Iterator[tuple[str, Any, Axes]]:
        blocks = {id(layer) for layers in self.stacks(backbone).values() for layer in layers}
        embedded = self.embedding_axis(backbone)
        for name in sorted(vars(backbone)):
            layer = vars(backbone)[name]
            if not hasattr(layer, "_flatten_layers") or id(layer) in blocks:
                continue
            for inner, variable in walk(layer, f"{name.lstrip('_')}."):
                if "embeddings" in variable.name and "token_embedding" in inner:
                    axes = embedding_axes(variable.name)
                    yield inner, variable, tuple(embedded if axis == WIDE else axis for axis in axes)
                elif name == "embeddings_projection":
                    yield inner, variable, (embedded, WIDE)[-len(variable.shape) :]
                elif embedded is None and "embedding" in name:
                    yield inner, variable, (None,) * len(variable.shape)
                elif name == "pooled_dense":
                    yield inner, variable, (WIDE,) * len(variable.shape)
                else:
                    yield inner, variable, width_axes(variable)


class TransformerEncoderAdapter(TransformerStackAdapter):
    """BERT, DistilBERT, RoBERTa, XLM-RoBERTa."""

    family = "transformer_encoder"
    only_stack = "encoder"


ADAPTER = TransformerEncoderAdapter()


@register
class ShrunkBertBackbone(ShrunkBackbone, BertBackbone):
    """A `BertBackbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkDistilBertBackbone(ShrunkBackbone, DistilBertBackbone):
    """A `DistilBertBackbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkRobertaBackbone(ShrunkBackbone, RobertaBackbone):
    """A `RobertaBackbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkXLMRobertaBackbone(ShrunkBackbone, XLMRobertaBackbone):
    """An `XLMRobertaBackbone` with its own sizes in every block."""

    adapter = ADAPTER


SHRUNK = {
    BertBackbone: ShrunkBertBackbone,
    DistilBertBackbone: ShrunkDistilBertBackbone,
    RobertaBackbone: ShrunkRobertaBackbone,
    XLMRobertaBackbone: ShrunkXLMRobertaBackbone,
}
TASKS: dict[type, type] = {}  # classifiers take any backbone: no class of their own is needed


NO_READER = "an encoder, which generates nothing"

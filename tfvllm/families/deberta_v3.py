"""DeBERTa-v3: attention to content and to relative positions; all blocks read the same embeddings of positions."""

import math
from typing import Any

from keras_hub.models import DebertaV3Backbone

from tfvllm.families.base import Block
from tfvllm.families.projections import attention, feed_forward
from tfvllm.families.shrunk import ShrunkBackbone, register
from tfvllm.families.transformer_encoder import TransformerStackAdapter


class DebertaV3Adapter(TransformerStackAdapter):
    """DeBERTa-v3."""

    family = "deberta_v3"
    only_stack = "encoder"

    def describe(self, layer: Any, kind: str, index: int, hidden: int) -> Block:
        place = f"{kind}.{index}"
        attend = layer._self_attention_layer
        names = ("_feedforward_intermediate_dense", "_feedforward_output_dense")
        return Block(
            layer=layer,
            index=index,
            kind=kind,
            hidden_width=hidden,
            attention=attention(attend, f"{place}.self", scale=attend.scale_factor),
            feed_forward=feed_forward(layer, place, *names, activation=layer.activation),
            norms={"attention": layer._self_attention_layer_norm, "feed_forward": layer._feedforward_layer_norm},
            normalize_first=False,
        )

    def set_attention(self, attention: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        attention.num_heads = heads
        attention.attn_head_size = head_dim
        attention.hidden_dim = heads * head_dim  # read only where heads are laid beside each other
        attention.scale_factor = 1.0 / math.sqrt(3 * head_dim)  # content to content, to position, position to content


ADAPTER = DebertaV3Adapter()


@register
class ShrunkDebertaV3Backbone(ShrunkBackbone, DebertaV3Backbone):
    """A `DebertaV3Backbone` with its own sizes in every block."""

    adapter = ADAPTER


SHRUNK = {DebertaV3Backbone: ShrunkDebertaV3Backbone}
TASKS: dict[type, type] = {}  # the tasks read no sizes of blocks


NO_READER = "an encoder, which generates nothing"

"""ALiBi in models that have lost heads: a head keeps the slope that its number once gave it (Press et al. 2022)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras_hub.layers import AlibiBias

from tfvllm.families.base import BlockShape, Structure, mha_scale
from tfvllm.families.shrunk import change_class
from tfvllm.families.transformer_encoder import TransformerStackAdapter

_Layer: Any = keras.layers.Layer if TYPE_CHECKING else object


class AlibiAdapter(TransformerStackAdapter):
    """Stacks whose heads have slopes; `slopes_owner(layer)` computes those of a block's layer."""

    only_stack = "decoder"

    def slopes_owner(self, layer: Any) -> Any:
        raise NotImplementedError

    def set_attention(self, attention: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        attention.num_heads = heads
        attention.head_dim = head_dim
        attention.inv_norm_factor = mha_scale(head_dim)

    def traits(self, layer: Any) -> dict[str, Any]:
        heads = getattr(layer, self.heads_key)
        return {"alibi_slopes": [float(slope) for slope in self.slopes_owner(layer)._get_slopes(heads)]}

    def set_traits(self, layer: Any, traits: Mapping[str, Any]) -> None:
        slopes = list(traits.get("alibi_slopes", ()))
        if slopes and slopes != _by_number(len(slopes)):
            owner = self.slopes_owner(layer)
            change_class(owner, OwnSlopes)
            owner.own_slopes = slopes

    def kept_traits(self, shape: BlockShape, heads: np.ndarray) -> Mapping[str, Any]:
        return {**shape.traits, "alibi_slopes": [shape.traits["alibi_slopes"][head] for head in heads]}

    def config_if_expressible(self, config: dict[str, Any], structure: Structure) -> dict[str, Any] | None:
        counted = (list(b.traits["alibi_slopes"]) == _by_number(b.heads) for b in structure["decoder"])
        return super().config_if_expressible(config, structure) if all(counted) else None


class OwnSlopes(_Layer):
    """Mixin for a layer that asks itself for the slopes of its heads: those it was given."""

    own_slopes: list[float]

    def _get_slopes(self, num_heads: int) -> list[float]:
        return self.own_slopes


def _by_number(heads: int) -> list[float]:
    return [float(slope) for slope in AlibiBias()._get_slopes(heads)]

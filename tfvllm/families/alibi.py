"""ALiBi in models that have lost heads: a head keeps the slope that its number once gave it (Press et al. 2022)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras_hub.layers import AlibiBias

from tfvllm.families.base import BlockShape
from tfvllm.families.shrunk import change_class

_Layer: Any = keras.layers.Layer if TYPE_CHECKING else object


class OwnSlopes(_Layer):
    """Mixin for a layer that asks itself for the slopes of its heads: those it was given."""

    own_slopes: list[float]

    def _get_slopes(self, num_heads: int) -> list[float]:
        return self.own_slopes


def slopes_of(layer: Any, heads: int) -> dict[str, Any]:
    """The trait of a block whose `layer` computes the slopes of `heads` heads."""
    return {"alibi_slopes": [float(slope) for slope in layer._get_slopes(heads)]}


def set_slopes(layer: Any, traits: Mapping[str, Any]) -> None:
    """Writes the trait back into the layer that computes the slopes."""
    slopes = list(traits.get("alibi_slopes", ()))
    if slopes and slopes != _by_number(len(slopes)):
        change_class(layer, OwnSlopes)
        layer.own_slopes = slopes


def kept_slopes(shape: BlockShape, heads: np.ndarray) -> dict[str, Any]:
    """`shape.traits` of a block of which the query heads `heads` stay."""
    return {**shape.traits, "alibi_slopes": [shape.traits["alibi_slopes"][head] for head in heads]}


def counted(shape: BlockShape) -> bool:
    """Whether the slopes are those that a model of so many heads gives them by itself."""
    return list(shape.traits["alibi_slopes"]) == _by_number(shape.heads)


def _by_number(heads: int) -> list[float]:
    return [float(slope) for slope in AlibiBias()._get_slopes(heads)]

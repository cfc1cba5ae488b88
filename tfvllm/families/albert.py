"""ALBERT: few layers, called again and again. Every call is a block; blocks that share a layer share its weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from keras_hub.models import AlbertBackbone

from tfvllm.errors import InputError
from tfvllm.families.base import Axis, Structure
from tfvllm.families.shrunk import ShrunkBackbone, register
from tfvllm.families.transformer_encoder import TransformerStackAdapter

_Call = tuple[int, int]  # the group and the layer in it


def _calls(groups: int, times: int, inner: int) -> list[_Call]:
    return [(group, layer) for group in range(groups) for _ in range(times) for layer in range(inner)]


def _counts(calls: Sequence[_Call]) -> dict[str, int] | None:
    """What of a config makes `calls`, whatever the numbers of groups and layers; None where nothing does."""
    groups = list(dict.fromkeys(group for group, _ in calls))
    places = {group: list(dict.fromkeys(layer for g, layer in calls if g == group)) for group in groups}
    inner = len(places[groups[0]])
    times, rest = divmod(len(calls), len(groups) * inner)
    renumbered = [(groups.index(group), places[group].index(layer)) for group, layer in calls]
    if rest or renumbered != _calls(len(groups), times, inner):
        return None
    return {"num_layers": len(groups) * times, "num_groups": len(groups), "num_inner_repetitions": inner}


class AlbertAdapter(TransformerStackAdapter):
    """ALBERT."""

    family = "albert"
    only_stack = "encoder"

    def _all_calls(self, backbone: Any) -> list[_Call]:
        times = backbone.num_layers // backbone.num_groups
        return _calls(backbone.num_groups, times, backbone.num_inner_repetitions)

    def stacks(self, backbone: Any) -> dict[str, list[Any]]:
        return {"encoder": [backbone.transformer_layers[group][layer] for group, layer in self._all_calls(backbone)]}

    def structure(self, model: Any) -> Structure:
        calls = self._all_calls(self.backbone(model))
        shapes = super().structure(model)["encoder"]
        named = [{"group": group, "inner": layer} for group, layer in calls]
        return {"encoder": [dataclasses.replace(shape, traits=t) for shape, t in zip(shapes, named, strict=True)]}

    def kept_layers(self, backbone: Any, kind: str, kept: Sequence[int]) -> list[int]:
        """Any call of a layer stands for any other: the first ones, whose blocks name the weights."""
        calls = self._all_calls(backbone)
        wanted = [calls[index] for index in kept]
        if _counts(wanted) is None:
            raise InputError(
                f"layers: ALBERT calls all layers of a group in turn, and every group equally often; blocks "
                f"{list(kept)} are {wanted} (group, layer), which no ALBERT calls. Keep as many whole turns of each."
            )
        indices = {call: [i for i, each in enumerate(calls) if each == call] for call in wanted}
        return [indices[call].pop(0) if len(indices[call]) > 1 else indices[call][0] for call in wanted]

    def _sizes(self, structure: Structure) -> dict[str, int]:
        counts = _counts([(shape.traits["group"], shape.traits["inner"]) for shape in structure["encoder"]])
        assert counts is not None, "kept_layers lets nothing else through"
        return counts

    def skeleton_config(self, config: dict[str, Any], structure: Structure) -> dict[str, Any]:
        return {**super().skeleton_config(config, structure), **self._sizes(structure)}

    def config_if_expressible(self, config: dict[str, Any], structure: Structure) -> dict[str, Any] | None:
        found = super().config_if_expressible(config, structure)
        return None if found is None else {**found, **self._sizes(structure)}

    def embedding_axis(self, backbone: Any) -> Axis | None:
        return None  # always projected to the width of the blocks


ADAPTER = AlbertAdapter()


@register
class ShrunkAlbertBackbone(ShrunkBackbone, AlbertBackbone):
    """An `AlbertBackbone` with its own sizes in every layer."""

    adapter = ADAPTER


SHRUNK = {AlbertBackbone: ShrunkAlbertBackbone}
TASKS: dict[type, type] = {}  # the tasks read no sizes of blocks


NO_READER = "an encoder, which generates nothing"

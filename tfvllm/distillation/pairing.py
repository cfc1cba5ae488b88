"""Which tensors of a teacher a loss compares with which of the student."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import keras

from tfvllm.distillation.layer_map import layer_pairs
from tfvllm.distillation.losses import DistillationLoss
from tfvllm.errors import InputError
from tfvllm.families import adapter_for
from tfvllm.families.outputs import Outputs, find_layer


class Pair(NamedTuple):
    """A layer of the teacher and one of the student: block numbers of one kind, or two names of layers.

    `kind` is "encoder" or "decoder"; it also tells which padding mask belongs to the layers.
    """

    kind: str
    teacher: int | str
    student: int | str

    def of_teacher(self, outputs: Outputs, reads: str) -> Any:
        return _read(outputs, self.kind, self.teacher, reads)

    def of_student(self, outputs: Outputs, reads: str) -> Any:
        return _read(outputs, self.kind, self.student, reads)


def pairs_of(loss: DistillationLoss, teacher: keras.Model, student: keras.Model) -> list[Pair]:
    """The pairs of layers that `loss` compares; none for a loss on logits.

    Raises:
        InputError: a layer that does not exist, or models with blocks of unlike kinds; the message says what is valid.
    """
    if loss.reads == "logits":
        return []
    layers = loss.layers
    if not isinstance(layers, (str, Mapping)) and isinstance(layers[0][0], str):
        for t, s in layers:
            find_layer(teacher, t), find_layer(student, s)
        return [Pair("encoder" if "encoder" in s and "decoder" not in s else "decoder", t, s) for t, s in layers]
    of_teacher, of_student = _depths(teacher), _depths(student)
    if isinstance(layers, Mapping):
        by_kind = dict(layers)
    else:
        by_kind = {kind: layers for kind in of_teacher if kind in of_student}
    if not by_kind or not set(by_kind) <= set(of_teacher) & set(of_student):
        raise InputError(
            f"{type(loss).__name__} compares {sorted(by_kind) or 'like'} blocks, but the teacher has "
            f"{_told(of_teacher)} and the student {_told(of_student)}. Name layers of both instead: "
            "layers=[(teacher's, student's), ...]."
        )
    return [
        Pair(kind, t, s)
        for kind, part in by_kind.items()
        for t, s in layer_pairs(part, of_teacher[kind], of_student[kind])
    ]


def widths(pairs: list[Pair], teacher: keras.Model, student: keras.Model) -> list[tuple[int, int]]:
    """The widths (student's, teacher's) of the hidden states of each pair."""
    return [(_width(student, pair.kind, pair.student), _width(teacher, pair.kind, pair.teacher)) for pair in pairs]


def _depths(model: keras.Model) -> dict[str, int]:
    depths: dict[str, int] = {}
    for block in adapter_for(model).blocks(model):
        depths[block.kind] = depths.get(block.kind, 0) + 1
    return depths


def _told(depths: dict[str, int]) -> str:
    return " and ".join(f"{count} {kind} blocks" for kind, count in depths.items())


def _width(model: keras.Model, kind: str, layer: int | str) -> int:
    if isinstance(layer, str):
        width = find_layer(model, layer).output.shape[-1]
        if width is None:
            raise InputError(f"the layer {layer!r} of {model.name} has an output of unknown width; choose another.")
        return int(width)
    return next(b.hidden_width for b in adapter_for(model).blocks(model) if b.kind == kind and b.index == layer)


def _read(outputs: Outputs, kind: str, layer: int | str, reads: str) -> Any:
    if isinstance(layer, str):
        return outputs.layers[layer]
    block = outputs.blocks[kind][layer]
    return {"hidden_states": block.hidden_state, "attention_maps": block.attention_map, "relations": block}[reads]

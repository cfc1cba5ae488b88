"""Students made from their teachers."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tfvllm.distillation.layer_map import layer_pairs, spread
from tfvllm.errors import InputError
from tfvllm.families import adapter_for, original_class, shrunk_class, shrunk_task_class
from tfvllm.families.stored import refuse_quantised


def student_from(
    teacher: keras.Model,
    layers: int | Sequence[int] | Mapping[str, int | Sequence[int]] = 2,
    *,
    name: str | None = None,
) -> keras.Model:
    """A shallower model of the teacher's class, with the teacher's own weights in all that it keeps.

    Embeddings, norms, pooler and head are copied too, so the student starts near its teacher (DistilBERT, Sanh et
    al. 2019, section 2). To remove heads, neurons or channels as well, distil into `tfvllm.shrink(teacher, ...)`.

    Args:
        teacher: a keras-nlp task or backbone of a family that `tfvllm.models` knows; a shrunk one too.
        layers: how many of the teacher's blocks to keep, evenly spaced up to the last; or which (numbered from 0,
            negative from the end), in the student's order; or `{"encoder": …, "decoder": …}` of these. Encoder and
            decoder keep alike where not told apart.
        name: the student's name; the default is the teacher's with "_student" after it.
    Returns:
        A new model that shares no variable with the teacher; the preprocessor (which has none) is shared.
    Raises:
        InputError: a model of an unknown family, or layers it has not.

    Example:
        >>> student = tfvllm.distillation.student_from(tiny_bert(layers=2), layers=[1])
        >>> len(student.backbone.transformer_layers)
        1
    """
    from keras_hub.models import Backbone, Task

    adapter = adapter_for(teacher)
    refuse_quantised(teacher, "student_from")
    if not isinstance(teacher, (Backbone, Task)):
        raise InputError(
            f"student_from expects a keras-nlp task or backbone, found {type(teacher).__name__}. Make the student's "
            "backbone with student_from(backbone) and build the rest around it."
        )
    name = name or f"{teacher.name}_student"
    old = adapter.backbone(teacher)
    whole = adapter.structure(teacher)
    chosen = {kind: _chosen(layers, kind, len(blocks)) for kind, blocks in whole.items()}
    chosen = {kind: adapter.kept_layers(old, kind, kept) for kind, kept in chosen.items()}
    structure = {kind: [whole[kind][index] for index in kept] for kind, kept in chosen.items()}
    config = {**adapter.config(old), "name": name if teacher is old else old.name}
    config["trainable"] = True  # a teacher is frozen once a Distiller has had it
    native = adapter.config_if_expressible(config, structure)
    if native is not None:
        small = original_class(old)(**native)
    else:
        entries = {kind: [shape.to_dict() for shape in blocks] for kind, blocks in structure.items()}
        small = shrunk_class(old)(structure=entries, **config)
    student = small
    if teacher is not old:
        task = {**teacher.get_config(), "backbone": small, "preprocessor": teacher.preprocessor, "name": name}
        of_task: Any = shrunk_task_class(teacher, native is not None)
        student = of_task.from_config(task)
    _copy_weights(adapter, teacher, student, chosen)
    return student


def _chosen(layers: Any, kind: str, depth: int) -> list[int]:
    if isinstance(layers, Mapping):
        layers = layers.get(kind, depth)
    if isinstance(layers, int):
        return spread(layers, depth)
    kept = [index for index, _ in layer_pairs([(layer, 0) for layer in layers], depth, 1)]
    if not kept:
        raise InputError(f"layers names no {kind} layer; expected some of 0 to {depth - 1}.")
    return kept


def _copy_weights(adapter: Any, teacher: keras.Model, student: keras.Model, chosen: dict[str, list[int]]) -> None:
    of_teacher = {weight.name: weight.value for weight in adapter.weights(teacher)}
    for weight in adapter.weights(student):
        kind, index, rest = (*weight.name.split(".", 2), "", "")[:3]
        name = weight.name
        if kind in chosen and index.isdigit():
            name = f"{kind}.{chosen[kind][int(index)]}.{rest}"
        weight.variable.assign(of_teacher[name]())

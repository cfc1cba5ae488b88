"""What a Distiller is given, checked before any training."""

from collections.abc import Mapping
from typing import Any

import keras

from tfvllm.distillation.losses import DistillationLoss, ForwardKL
from tfvllm.distillation.scheduled import Scheduled, check_scheduled
from tfvllm.errors import InputError


def named(teacher: Any) -> dict[str, keras.Model]:
    if teacher is None:
        return {}
    if isinstance(teacher, Mapping):
        if "student" in teacher:
            raise InputError("'student' cannot name a teacher; choose another name.")
        return dict(teacher)
    if isinstance(teacher, (list, tuple)):
        return {f"teacher_{index}": model for index, model in enumerate(teacher)}
    return {"teacher": teacher}


def checked_losses(losses: Any) -> dict[str, DistillationLoss]:
    if losses is None:
        losses = ForwardKL(temperature=2.0)
    if isinstance(losses, DistillationLoss):
        losses = {losses.reads: losses}
    if not isinstance(losses, Mapping) or not losses:
        raise InputError(f"losses must be {{name: loss of tfvllm.losses}}, found {losses!r}.")
    for key, loss in losses.items():
        if not isinstance(loss, DistillationLoss):
            raise InputError(f"losses[{key!r}] must be a loss of tfvllm.losses such as ForwardKL(), found {loss!r}.")
        if key in ("task", ""):
            raise InputError(f"{key!r} cannot name a distillation loss; choose another name.")
    return dict(losses)


def checked_weights(weights: Mapping[str, Scheduled] | None, losses: Mapping[str, Any]) -> dict[str, Scheduled]:
    weights = weights or {}
    unknown = sorted(set(weights) - set(losses))
    if unknown:
        raise InputError(f"loss_weights names {unknown}, but the losses are {sorted(losses)}.")
    return {key: check_scheduled(weights.get(key, 1.0), f"loss_weights[{key!r}]") for key in losses}


def check_pair(teacher: keras.Model, student: keras.Model) -> None:
    shared = {id(variable) for variable in teacher.variables} & {
        id(variable) for variable in student.trainable_variables
    }
    if shared:
        raise InputError(
            f"teacher and student share {len(shared)} variables, so training one would change the other. "
            "Use tfvllm.distillation.student_from(teacher), which copies them."
        )
    sizes = [getattr(getattr(model, "backbone", model), "vocabulary_size", None) for model in (teacher, student)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise InputError(
            f"teacher and student read the same token ids, but the teacher's vocabulary has {sizes[0]} entries and "
            f"the student's {sizes[1]}. Build the student with vocabulary_size={sizes[0]} and the teacher's tokenizer."
        )
    words = [known for model in (teacher, student) if (known := _vocabulary(model)) is not None]
    if len(words) == 2 and words[0] != words[1]:
        at = next((i for i, (t, s) in enumerate(zip(*words)) if t != s), min(map(len, words)))
        told = [repr(part[at]) if at < len(part) else "nothing" for part in words]
        raise InputError(
            f"teacher and student read the same token ids, but their vocabularies differ: id {at} is {told[0]} to the "
            f"teacher's tokenizer and {told[1]} to the student's. Give the student the teacher's preprocessor."
        )


def _vocabulary(model: keras.Model) -> list[str] | None:
    tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
    read = getattr(tokenizer, "get_vocabulary", None)
    return None if read is None else list(read())


def checked_from_logits(told: Any, teachers: Mapping[str, Any]) -> dict[str, bool]:
    """`from_logits` of a Distiller as {model: bool}; models not named are looked at."""
    names = ["student", *teachers]
    if told is None:
        return {}
    if isinstance(told, bool):
        return dict.fromkeys(names, told)
    if not isinstance(told, Mapping) or not all(isinstance(value, bool) for value in told.values()):
        raise InputError(f"from_logits must be True, False or {{model: True or False}} of {names}, found {told!r}.")
    unknown = sorted(set(told) - set(names))
    if unknown and teachers:
        raise InputError(f"from_logits names {unknown}, but the models are {names}.")
    return dict(told)


def check_names(told: Mapping[str, Any], whose: str) -> None:
    """Refuses the arguments of other distillers (keras.io's example, `keras.distillation`), saying what to use instead.

    Raises:
        InputError: `told` holds some of them.
    """
    found = [name for name in told if name in _ELSEWHERE]
    if found:
        instead = "; ".join(f"for {name} use {_ELSEWHERE[name]}" for name in found)
        raise InputError(f"{whose} has no argument {', '.join(found)}: {instead}.")


_DIVERGENCE = "Distiller(losses={'logits': tfvllm.losses.ForwardKL(temperature=...)})"
_ELSEWHERE = {
    "student_loss_fn": "compile(loss=...)",
    "student_loss": "compile(loss=...)",
    "distillation_loss_fn": _DIVERGENCE,
    "distillation_loss": _DIVERGENCE,
    "distillation_losses": _DIVERGENCE,
    "strategy": _DIVERGENCE,
    "strategies": _DIVERGENCE,
    "temperature": _DIVERGENCE,
    "alpha": "Distiller(task_weight=alpha, loss_weights={'logits': 1 - alpha})",
    "student_loss_weight": "Distiller(task_weight=...)",
    "distillation_loss_weights": "Distiller(loss_weights={'logits': ...})",
    "strategy_weights": "Distiller(loss_weights={'logits': ...})",
}

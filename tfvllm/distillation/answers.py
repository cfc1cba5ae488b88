"""What teacher and student answer, as logits that a loss can compare."""

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from tfvllm.distillation.inputs import select
from tfvllm.distillation.losses import DistillationLoss
from tfvllm.distillation.losses.base import Divergence
from tfvllm.distillation.teacher_logits import DeferredLogits, TopLogits
from tfvllm.errors import InputError
from tfvllm.families.heads import Head, head_of, one_output


class Heads:
    """The heads of some models by name, each looked at once, when it is first asked for.

    Args:
        from_logits: {name: whether the model gives logits}, for those of which it is known.
        option: how a caller says it of the model NAME; {} stands for the value.
    """

    def __init__(self, from_logits: Mapping[str, bool], option: str = 'from_logits={"NAME": {}}'):
        self.from_logits = dict(from_logits)
        self._option = option
        self._found: dict[str, Head] = {}

    def of(self, name: str, model: Any, x: Any, answer: Any = None) -> Head:
        """The head of `model`, which answered `answer` to the batch `x`.

        Raises:
            InputError: it cannot be told whether the model gives logits or probabilities.
        """
        if isinstance(answer, TopLogits):
            return Head(answer.kind)
        if isinstance(answer, DeferredLogits):
            return Head("logits")
        if name not in self._found:
            self._found[name] = head_of(
                model,
                select(model, x),
                answer=None if answer is None else one_output(answer, model),
                from_logits=self.from_logits.get(name),
                option=self._option.replace("NAME", name),
            )
        return self._found[name]

    def forget(self, *names: str) -> None:
        """Looks at these models (at none named: all) anew when next asked."""
        for name in names or list(self._found):
            self._found.pop(name, None)


def logits_of(answer: Any, model: keras.Model, head: Head) -> tf.Tensor | TopLogits | DeferredLogits:
    """The logits in a model's answer: before a softmax or sigmoid head where there is one."""
    if isinstance(answer, (DeferredLogits, TopLogits)):
        return answer
    return head.logits(one_output(answer, model))


def are_independent(loss: DistillationLoss, teacher: Head, student: Head) -> bool | None:
    """Whether `loss` compares each output by itself, by the heads of the models; None where they do not say.

    Raises:
        InputError: one model has a distribution over the classes and the other a probability for each, or the loss says
            otherwise than the models.
    """
    kinds = {teacher.kind, student.kind}
    if kinds >= {"softmax", "sigmoid"}:
        raise InputError(
            f"the teacher gives {_TOLD[teacher.kind]}, the student {_TOLD[student.kind]}; expected the same of both. "
            "Give the student the teacher's last activation, or none."
        )
    told = getattr(loss, "independent", None)
    if (told is False and "sigmoid" in kinds) or (told is True and "softmax" in kinds):
        kind = "sigmoid" if "sigmoid" in kinds else "softmax"
        raise InputError(f"{loss!r} says independent={told}, but a model gives {_TOLD[kind]}. Leave independent out.")
    return True if "sigmoid" in kinds else False if "softmax" in kinds else None


_TOLD = {
    "softmax": "one distribution over all classes (softmax)",
    "sigmoid": "a probability for each class by itself (sigmoid)",
    "logits": "logits",
}


def between(
    loss: DistillationLoss,
    teacher: tf.Tensor | TopLogits | DeferredLogits,
    student: tf.Tensor,
    heads: tuple[Head, Head],
    step: int | tf.Tensor = 0,
) -> tf.Tensor:
    """`loss` of logits, as the heads (teacher's, student's) say they are to be read."""
    independent = are_independent(loss, *heads)
    if isinstance(loss, Divergence) and independent is not None and student.shape[-1] != 1:
        return loss(teacher, student, step=step, independent=independent)
    return loss(teacher, student, step=step)

"""What every distillation loss has in common."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfvllm.distillation.chunks import over_rows
from tfvllm.distillation.divergences import log_probabilities, log_yes_no
from tfvllm.distillation.scheduled import Scheduled, check_scheduled, deserialize, serialize, value_at
from tfvllm.distillation.teacher_logits import DeferredLogits, TopLogits, top_buckets
from tfvllm.errors import InputError


class DistillationLoss:
    """A difference between teacher and student, one value for each example or position, not reduced.

    Subclasses state in `reads` what they compare: "logits", "hidden_states", "attention_maps" or "relations"
    (queries, keys and values), and implement `__call__`.

    Example:
        >>> class Hinge(tfvllm.losses.DistillationLoss):
        ...     def __call__(self, teacher, student, mask=None, step=0):
        ...         return tf.nn.relu(tf.reduce_max(teacher, -1) - tf.reduce_max(student, -1))
        >>> Hinge()(tf.constant([[2.0, 0.0]]), tf.constant([[0.5, 0.0]])).numpy()
        array([1.5], dtype=float32)
    """

    reads = "logits"
    layers: Any = None  # which layers, for losses inside the models
    project: Any = False  # whether Distiller projects the student's states

    def __call__(
        self, teacher: Any, student: Any, mask: tf.Tensor | None = None, step: int | tf.Tensor = 0
    ) -> tf.Tensor:
        """The difference, float32.

        Args:
            teacher, student: what `reads` names. Logits have shape [batch, classes] or [batch, length, vocabulary].
            mask: bool [batch, length], which positions are real; only for losses that relate positions to each other.
            step: the training step, int32 scalar, for scheduled settings.
        Returns:
            One value for each example ([batch]) or position ([batch, length]).
        """
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DistillationLoss":
        return cls(**config)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({settings})"


class Divergence(DistillationLoss):
    """A divergence between the class distributions softmax(logits / temperature), times temperature².

    The factor temperature² keeps the gradient's size independent of the temperature (Hinton et al. 2015, section 2.1).

    Independent outputs (labels that exclude nothing, or one logit for yes and no) have a distribution each, with
    probability sigmoid(logit / temperature). Their divergences are added up, which is the divergence of the joint
    distributions (one label against all others, as Yang et al. 2023, arXiv:2308.06453).

    Args:
        temperature: a positive number, or a schedule of the training step (a
            `keras.optimizers.schedules.LearningRateSchedule` or a function of the step).
        independent: whether each output is a yes or no of its own. None: where there is one output, or where
            `tfvllm.Distiller` finds that a model ends in a sigmoid.
    """

    def __init__(self, temperature: Scheduled = 1.0, *, independent: bool | None = None):
        self.temperature = check_scheduled(temperature, "temperature", positive=True)
        if independent not in (None, True, False):
            raise InputError(
                f"{type(self).__name__} expects independent as True, False or None, found {independent!r}."
            )
        self.independent = independent

    def __call__(
        self,
        teacher: tf.Tensor | TopLogits | DeferredLogits,
        student: tf.Tensor,
        mask: tf.Tensor | None = None,
        step: int | tf.Tensor = 0,
        *,
        independent: bool | None = None,
    ) -> tf.Tensor:
        teacher, student = as_logits(teacher), tf.convert_to_tensor(student)
        check_classes(self, teacher.shape, student.shape)
        temperature = value_at(self.temperature, step)
        if self.independent is not None:
            independent = self.independent
        if independent or (independent is None and student.shape[-1] == 1):
            whole = teacher.all() if isinstance(teacher, (TopLogits, DeferredLogits)) else teacher
            of_teacher = tf.stop_gradient(log_yes_no(whole, temperature))
            values = self.between(of_teacher, log_yes_no(student, temperature))
            return temperature**2 * tf.reduce_sum(values, axis=-1)

        def dense(student: tf.Tensor, teacher: tf.Tensor) -> tf.Tensor:
            return self.between(log_probabilities(teacher, temperature), log_probabilities(student, temperature))

        if isinstance(teacher, TopLogits):
            tail = teacher.log_tail(temperature)

            def top(student: tf.Tensor, ids: tf.Tensor, logits: tf.Tensor, log_tail: tf.Tensor) -> tf.Tensor:
                return self.between(*top_buckets(student, ids, logits, log_tail, temperature))

            values = over_rows(top, student, teacher.ids, teacher.logits, tail)
        elif isinstance(teacher, DeferredLogits):
            values = over_rows(lambda s, hidden: dense(s, teacher.rows(hidden)), student, teacher.hidden)
        else:
            values = over_rows(dense, student, teacher)
        return temperature**2 * values

    def between(self, log_p: tf.Tensor, log_q: tf.Tensor) -> tf.Tensor:
        """The divergence of float32 log-probabilities [..., classes], teacher first; shape [...]."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        return {"temperature": serialize(self.temperature), "independent": self.independent}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Divergence":
        return cls(**{**config, "temperature": deserialize(config["temperature"])})


def as_logits(teacher: Any) -> tf.Tensor | TopLogits | DeferredLogits:
    """The teacher's logits as a tensor, or as they are in one of the other forms."""
    return teacher if isinstance(teacher, (TopLogits, DeferredLogits)) else tf.convert_to_tensor(teacher)


def pairs_of_states(
    loss: DistillationLoss, teacher: Sequence[Any], student: Sequence[Any]
) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """(teacher's, student's) of each pair of layers, as tensors of the same rank and batch.

    Raises:
        InputError: one has more pairs than the other, or a pair is of unlike shapes, which would broadcast.
    """
    if len(teacher) != len(student):
        raise InputError(
            f"{type(loss).__name__} compares pairs of layers, found {len(teacher)} of the teacher and {len(student)} "
            "of the student. Give one tensor of each for a pair."
        )
    pairs = [(tf.convert_to_tensor(t), tf.convert_to_tensor(s)) for t, s in zip(teacher, student)]
    for of_teacher, of_student in pairs:
        # The width, or for attention maps the heads, is the loss's own affair.
        if not of_teacher.shape[:1].is_compatible_with(of_student.shape[:1]) or (
            None not in (of_teacher.shape.rank, of_student.shape.rank)
            and of_teacher.shape.rank != of_student.shape.rank
        ):
            raise InputError(
                f"{type(loss).__name__} compares states of the same examples, found {of_teacher.shape} (teacher) and "
                f"{of_student.shape} (student). Give one tensor of each for a pair."
            )
    return pairs


def check_classes(loss: DistillationLoss, teacher: Sequence[Any], student: Sequence[Any]) -> None:
    """Refuses logits (of these shapes) over unlike classes, or one class that is to be a distribution."""
    of_teacher, of_student = teacher[-1], student[-1]
    if of_teacher != of_student:
        raise InputError(
            f"{type(loss).__name__} compares logits over the same classes, but the teacher has {of_teacher} and the "
            f"student {of_student}. Give the student the teacher's classes (or vocabulary), or drop this loss."
        )
    if of_student == 1 and isinstance(loss, Divergence) and loss.independent is False:
        raise InputError(
            f"{type(loss).__name__}(independent=False) compares distributions over classes, but there is one class, "
            "whose softmax is always 1. Use two classes, or leave independent out."
        )


register = keras.saving.register_keras_serializable(package="tfvllm")

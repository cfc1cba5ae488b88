"""The student's hidden states near its teacher's."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfvllm.distillation.layer_map import LayerMap, check_layers
from tfvllm.distillation.losses.base import DistillationLoss, pairs_of_states, register
from tfvllm.errors import InputError


@register
class HiddenStates(DistillationLoss):
    """Mean over layer pairs of the distance between hidden states, at every position.

    "mse": mean over channels of (W h_student − h_teacher)² (FitNets, Romero et al. 2015, eq. 3; TinyBERT, Jiao et al.
    2020, eq. 8). "cosine": 1 − cos(W h_student, h_teacher) (DistilBERT, Sanh et al. 2019, section 2).

    W is a learned projection, one for each pair, where the widths differ; `tfvllm.Distiller` makes, trains and keeps
    it, so that the student stays a plain model.

    Args:
        layers: "uniform", "last", "skip" or pairs (see `tfvllm.distillation.layer_pairs`); a pair may also be two names
            of layers, (teacher's, student's), of any Keras model.
        distance: "mse" or "cosine".
        project: "auto" where the widths differ, or True: always.

    Example:
        >>> teacher, student = tf.ones([1, 2, 4]), tf.zeros([1, 2, 4])  # [batch, length, width]
        >>> tfvllm.losses.HiddenStates(distance="mse")([teacher], [student]).numpy()
        array([[1., 1.]], dtype=float32)
    """

    reads = "hidden_states"

    def __init__(self, layers: LayerMap = "uniform", distance: str = "mse", project: str | bool = "auto"):
        if distance not in ("mse", "cosine"):
            raise InputError(f'HiddenStates expects distance "mse" or "cosine", found {distance!r}.')
        if project not in ("auto", True):
            raise InputError(f'HiddenStates expects project "auto" or True, found {project!r}.')
        self.layers = check_layers(layers, "HiddenStates")
        self.distance = distance
        self.project = project

    def __call__(
        self,
        teacher: Sequence[tf.Tensor],
        student: Sequence[tf.Tensor],
        mask: tf.Tensor | None = None,
        step: int | tf.Tensor = 0,
    ) -> tf.Tensor:
        """Mean over the pairs, float32 [batch, length].

        Args:
            teacher, student: one tensor [batch, length, width] for each pair, of the same width (the student's after
                projection). [batch, width] and [batch, height, width, channels] serve too; what lies between the first
                and last axis of the latter is averaged.
            mask: not used: every position has a value of its own.
        """
        return sum(self._distance(*pair) for pair in pairs_of_states(self, teacher, student)) / float(len(teacher))

    def _distance(self, teacher: tf.Tensor, student: tf.Tensor) -> tf.Tensor:
        if teacher.shape[-1] != student.shape[-1]:
            raise InputError(
                f"HiddenStates compares states of the same width, found {teacher.shape[-1]} (teacher) and "
                f"{student.shape[-1]} (student). tfvllm.Distiller projects the student's to the teacher's."
            )
        teacher = tf.stop_gradient(tf.cast(teacher, tf.float32))
        student = tf.cast(student, tf.float32)
        if self.distance == "mse":
            values = tf.reduce_mean(tf.math.squared_difference(student, teacher), axis=-1)
        else:
            values = 1.0 - tf.reduce_sum(
                tf.math.l2_normalize(student, axis=-1) * tf.math.l2_normalize(teacher, axis=-1), axis=-1
            )
        return tf.reduce_mean(values, axis=list(range(1, values.shape.rank))) if values.shape.rank > 2 else values

    def get_config(self) -> dict[str, Any]:
        return {"layers": self.layers, "distance": self.distance, "project": self.project}

"""The student's logits near its teacher's, number by number."""

import tensorflow as tf

from tfvllm.distillation.losses.base import DistillationLoss, check_classes, register


@register
class Logits(DistillationLoss):
    """Mean over classes of (student logit − teacher logit)² (Ba and Caruana 2014, eq. 1, times 2 / classes).

    Unlike the divergences it fixes the logits' offset too, and works with a single logit (binary or regression heads).
    """

    def __call__(
        self, teacher: tf.Tensor, student: tf.Tensor, mask: tf.Tensor | None = None, step: int | tf.Tensor = 0
    ) -> tf.Tensor:
        check_classes(self, teacher.shape, student.shape)
        gap = tf.cast(student, tf.float32) - tf.stop_gradient(tf.cast(teacher, tf.float32))
        return tf.reduce_mean(tf.square(gap), axis=-1)

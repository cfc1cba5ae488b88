"""The student's logits near its teacher's, number by number."""

import tensorflow as tf

from tfvllm.distillation.losses.base import DistillationLoss, as_logits, check_classes, register
from tfvllm.distillation.teacher_logits import DeferredLogits, TopLogits


@register
class Logits(DistillationLoss):
    """Mean over classes of (student logit − teacher logit)² (Ba and Caruana 2014, eq. 1, times 2 / classes).

    Unlike the divergences it fixes the logits' offset too, and works with a single logit (binary or regression heads).

    Example:
        >>> tfvllm.losses.Logits()(np.array([[1.0, 3.0]]), np.array([[0.0, 1.0]])).numpy()
        array([2.5], dtype=float32)
    """

    def __call__(
        self,
        teacher: tf.Tensor | TopLogits | DeferredLogits,
        student: tf.Tensor,
        mask: tf.Tensor | None = None,
        step: int | tf.Tensor = 0,
    ) -> tf.Tensor:
        teacher, student = as_logits(teacher), tf.convert_to_tensor(student)
        check_classes(self, teacher.shape, student.shape)
        if isinstance(teacher, (TopLogits, DeferredLogits)):
            teacher = teacher.all()
        gap = tf.cast(student, tf.float32) - tf.stop_gradient(tf.cast(teacher, tf.float32))
        return tf.reduce_mean(tf.square(gap), axis=-1)

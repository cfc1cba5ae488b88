"""The student covers all that its teacher thinks possible."""

import tensorflow as tf

from tfvllm.distillation import divergences
from tfvllm.distillation.losses.base import Divergence, register


@register
class ForwardKL(Divergence):
    """temperature² · KL(teacher ‖ student) = temperature² · Σ p (log p − log q) (Hinton et al. 2015, section 2).

    Args:
        temperature: divides both models' logits; a positive number or a schedule of the training step.
    """

    def between(self, log_p: tf.Tensor, log_q: tf.Tensor) -> tf.Tensor:
        return divergences.forward_kl(log_p, log_q)

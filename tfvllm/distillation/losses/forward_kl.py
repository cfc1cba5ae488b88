"""The student covers all that its teacher thinks possible."""

import tensorflow as tf

from tfvllm.distillation import divergences
from tfvllm.distillation.losses.base import Divergence, register


@register
class ForwardKL(Divergence):
    """temperature² · KL(teacher ‖ student) = temperature² · Σ p (log p − log q) (Hinton et al. 2015, section 2).

    Args:
        temperature: divides both models' logits; a positive number or a schedule of the training step.
        independent: whether each output is a yes or no of its own (labels that exclude nothing, or one logit), with
            probability sigmoid(logit / temperature). Their divergences are added up. None: where there is one output,
            or where `tfvllm.Distiller` finds that a model ends in a sigmoid.

    Example:
        >>> loss = tfvllm.losses.ForwardKL(temperature=1.0)
        >>> loss(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])).numpy().round(4)  # ½ log 2 + ½ log ⅔
        array([0.1438], dtype=float32)
    """

    def between(self, log_p: tf.Tensor, log_q: tf.Tensor) -> tf.Tensor:
        return divergences.forward_kl(log_p, log_q)

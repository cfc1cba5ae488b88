"""The student says only what its teacher thinks likely."""

import tensorflow as tf

from tfvllm.distillation import divergences
from tfvllm.distillation.losses.base import Divergence, register


@register
class ReverseKL(Divergence):
    """temperature² · KL(student ‖ teacher) = temperature² · Σ q (log q − log p) (MiniLLM, Gu et al. 2024, eq. 1).

    Args:
        temperature: divides both models' logits; a positive number or a schedule of the training step.
        independent: whether each output is a yes or no of its own (labels that exclude nothing, or one logit), with
            probability sigmoid(logit / temperature). Their divergences are added up. None: where there is one output,
            or where `tfvllm.Distiller` finds that a model ends in a sigmoid.

    Example:
        >>> loss = tfvllm.losses.ReverseKL()
        >>> loss(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])).numpy().round(4)  # ¼ log ½ + ¾ log 3⁄2
        array([0.1308], dtype=float32)
    """

    def between(self, log_p: tf.Tensor, log_q: tf.Tensor) -> tf.Tensor:
        return divergences.reverse_kl(log_p, log_q)

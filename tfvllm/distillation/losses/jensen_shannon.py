"""Between covering the teacher and seeking its modes."""

from typing import Any

import tensorflow as tf

from tfvllm.distillation import divergences
from tfvllm.distillation.losses.base import Divergence, register
from tfvllm.distillation.scheduled import Scheduled
from tfvllm.errors import InputError


@register
class JensenShannon(Divergence):
    """temperature² · [β KL(p ‖ m) + (1 − β) KL(q ‖ m)], m = β p + (1 − β) q (GKD, Agarwal et al. 2024, eq. 1).

    p is the teacher, q the student. Divided by β it tends to `ForwardKL` as β → 0; divided by 1 − β, to
    `ReverseKL` as β → 1. It is bounded: by log 2 at β = 0.5 and temperature 1.

    Args:
        beta: the teacher's share of the mixture, strictly between 0 and 1.
        temperature: divides both models' logits; a positive number or a schedule of the training step.
        independent: whether each output is a yes or no of its own, as for `ForwardKL`.

    Example:
        >>> loss = tfvllm.losses.JensenShannon(beta=0.5)
        >>> far = loss(np.array([[50.0, -50.0]]), np.array([[-50.0, 50.0]])).numpy()  # nothing in common: log 2
        >>> far.round(4)
        array([0.6931], dtype=float32)
    """

    def __init__(self, beta: float = 0.5, temperature: Scheduled = 1.0, *, independent: bool | None = None):
        super().__init__(temperature, independent=independent)
        if not 0.0 < beta < 1.0:
            raise InputError(
                f"JensenShannon expects beta strictly between 0 and 1, found {beta}. "
                "Use ForwardKL for the limit 0 and ReverseKL for the limit 1."
            )
        self.beta = float(beta)

    def between(self, log_p: tf.Tensor, log_q: tf.Tensor) -> tf.Tensor:
        return divergences.jensen_shannon(log_p, log_q, self.beta)

    def get_config(self) -> dict[str, Any]:
        return {"beta": self.beta, **super().get_config()}

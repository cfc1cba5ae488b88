"""The student looks where its teacher looks."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfvllm.distillation import divergences
from tfvllm.distillation.layer_map import LayerMap, check_layers
from tfvllm.distillation.losses.base import DistillationLoss, pairs_of_states, register
from tfvllm.errors import InputError


@register
class AttentionMaps(DistillationLoss):
    """Mean over layer pairs and heads of the difference between self-attention probabilities, at every query position.

    "kl": KL(teacher ‖ student) over the keys (MiniLM, Wang et al. 2020, eq. 3). "mse": sum over the keys of the squared
    difference (TinyBERT, Jiao et al. 2020, eq. 7, on probabilities). Where the numbers of heads differ, both models'
    maps are averaged over their heads first.

    Args:
        layers: "uniform", "last", "skip" or pairs (see `tfvllm.distillation.layer_pairs`).
        distance: "kl" or "mse".

    Example:
        >>> even, first = tf.fill([1, 1, 1, 2], 0.5), tf.constant([[[[1.0, 0.0]]]])  # [batch, heads, queries, keys]
        >>> tfvllm.losses.AttentionMaps(distance="mse")([first], [even]).numpy()
        array([[0.5]], dtype=float32)
    """

    reads = "attention_maps"

    def __init__(self, layers: LayerMap = "uniform", distance: str = "kl"):
        if distance not in ("kl", "mse"):
            raise InputError(f'AttentionMaps expects distance "kl" or "mse", found {distance!r}.')
        self.layers = check_layers(layers, "AttentionMaps", names=False)
        self.distance = distance

    def __call__(
        self,
        teacher: Sequence[tf.Tensor],
        student: Sequence[tf.Tensor],
        mask: tf.Tensor | None = None,
        step: int | tf.Tensor = 0,
    ) -> tf.Tensor:
        """Mean over the pairs, float32 [batch, queries].

        Args:
            teacher, student: probabilities [batch, heads, queries, keys], one for each pair.
            mask: bool [batch, keys], which keys are real; masked keys count as probability zero.
        """
        pairs = pairs_of_states(self, teacher, student)
        return sum(self._difference(*pair, mask) for pair in pairs) / float(len(pairs))

    def _difference(self, teacher: tf.Tensor, student: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
        teacher, student = tf.stop_gradient(tf.cast(teacher, tf.float32)), tf.cast(student, tf.float32)
        if teacher.shape[1] != student.shape[1]:
            teacher, student = (tf.reduce_mean(maps, axis=1, keepdims=True) for maps in (teacher, student))
        if mask is not None:
            teacher, student = (tf.where(mask[:, None, None, :], maps, 0.0) for maps in (teacher, student))
        if self.distance == "mse":
            values = tf.reduce_sum(tf.math.squared_difference(teacher, student), axis=-1)
        else:
            values = divergences.forward_kl(_log(teacher), _log(student))
        return tf.reduce_mean(values, axis=1)

    def get_config(self) -> dict[str, Any]:
        return {"layers": self.layers, "distance": self.distance}


def _log(probabilities: tf.Tensor) -> tf.Tensor:
    """log p, with exactly −inf → the smallest normal number: 0 · log 0 stays 0, and gradients stay finite."""
    return tf.math.log(tf.maximum(probabilities, 1.2e-38))

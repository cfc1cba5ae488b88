"""A teacher's logits in other forms than one large tensor: not yet computed, or only the largest."""

from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tfvllm.distillation.divergences import log_probabilities
from tfvllm.errors import InputError
from tfvllm.families.heads import Kind

NONE = -1e30  # the log of no mass, finite so that gradients stay finite


@dataclass
class DeferredLogits:
    """Logits as final hidden states and a head: computed a few rows at a time, where the loss needs them.

    Attributes:
        hidden: [batch, length, width].
        kernel: [width, vocabulary], of the head.
        soft_cap: logits are soft_cap · tanh(logits / soft_cap), or None.
    """

    hidden: tf.Tensor
    kernel: tf.Tensor
    soft_cap: float | None = None

    @property
    def shape(self) -> tf.TensorShape:
        return self.hidden.shape[:-1].concatenate(self.kernel.shape[1:])

    def rows(self, hidden: tf.Tensor) -> tf.Tensor:
        """Float32 logits [n, vocabulary] of hidden states [n, width]."""
        logits = tf.matmul(tf.cast(hidden, self.kernel.dtype), self.kernel)
        if self.soft_cap is not None:
            logits = self.soft_cap * tf.tanh(logits / self.soft_cap)
        return tf.cast(logits, tf.float32)

    def all(self) -> tf.Tensor:
        """All the logits at once: [batch, length, vocabulary]."""
        return self.rows(self.hidden)


def split_head(model: keras.Model) -> tuple[keras.Model, keras.Layer] | None:
    """`model` as (the part up to the final hidden states, the embedding layer that its head is); None if it is not so.

    True of keras-nlp's causal and sequence-to-sequence language models.
    """
    outputs = getattr(model, "outputs", None)
    if not outputs or len(outputs) != 1:
        return None
    layer, node = outputs[0]._keras_history.operation, outputs[0]._keras_history.node_index
    if not isinstance(layer, keras.layers.ReversibleEmbedding) or layer.quantization_mode is not None:
        return None
    call = layer._inbound_nodes[node].arguments
    if not call.kwargs.get("reverse", len(call.args) > 1 and call.args[1]):
        return None
    return keras.Model(model.input, layer._inbound_nodes[node].input_tensors[0], name=f"{model.name}_trunk"), layer


def deferred(hidden: tf.Tensor, head: keras.layers.ReversibleEmbedding) -> DeferredLogits:
    """The logits of `hidden` under `head`, not computed yet. Its weights are read once, without gradient."""
    dtype = head.reverse_dtype or head.compute_dtype
    if head.tie_weights:
        kernel = tf.transpose(tf.cast(tf.convert_to_tensor(head.embeddings), dtype))
    else:
        kernel = tf.cast(tf.convert_to_tensor(head.reverse_embeddings), dtype)
    return DeferredLogits(tf.stop_gradient(hidden), tf.stop_gradient(kernel), head.logit_soft_cap)


@dataclass
class TopLogits:
    """The k largest logits of each row, and the mass of all the others.

    A distribution over k + 1 classes: the k largest and the rest as one. Comparing it with the student's, summed over
    the same classes, has the right minimum; dropping the rest would pull the student's tail to zero.

    Attributes:
        ids: int32 [..., k], which classes.
        logits: float32 [..., k].
        log_tails: float32 [..., number of temperatures]: log Σ exp(logit / temperature) over the other classes.
        temperatures: for which temperatures the mass of the others is known.
        classes: how many there are in all.
        kind: "logits", or how the teacher's head reads them: "softmax" or "sigmoid".
    """

    ids: tf.Tensor
    logits: tf.Tensor
    log_tails: tf.Tensor
    temperatures: tuple[float, ...]
    classes: int
    kind: Kind = "logits"

    @property
    def shape(self) -> tf.TensorShape:
        return self.ids.shape[:-1].concatenate([self.classes])

    @property
    def whole(self) -> bool:
        """Whether all the classes are there."""
        return self.ids.shape[-1] == self.classes

    def log_tail(self, temperature: Any) -> tf.Tensor:
        """The log mass of the others [...] at this temperature.

        Raises:
            InputError: it was not stored.
        """
        if self.whole:
            return tf.fill(tf.shape(self.ids)[:-1], NONE)
        if not isinstance(temperature, float) or temperature not in self.temperatures:
            told = temperature if isinstance(temperature, float) else "a schedule"
            raise InputError(
                f"the cache knows the teacher's tail at temperatures {list(self.temperatures)}, but the loss asks for "
                f"{told}. Write it with temperatures=[...] that include it, or with top_k=None (all the classes)."
            )
        return self.log_tails[..., self.temperatures.index(temperature)]

    def all(self) -> tf.Tensor:
        """All the logits at once [..., classes]; only where they are all there."""
        if not self.whole:
            raise InputError(
                f"this loss needs all the teacher's {self.classes} logits, but the cache holds {self.ids.shape[-1]} of "
                "them. Write it with top_k=None, or use a divergence such as ForwardKL."
            )
        order = tf.argsort(self.ids, axis=-1)
        return tf.gather(self.logits, order, batch_dims=self.ids.shape.rank - 1)


def top_buckets(
    student: tf.Tensor, ids: tf.Tensor, logits: tf.Tensor, log_tail: tf.Tensor, temperature: float | tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Log-probabilities of teacher and student over the k classes `ids` and all others as one: [n, k + 1] each.

    Args:
        student: logits [n, classes].
        ids, logits: the teacher's k largest, [n, k].
        log_tail: log mass of the teacher's other logits / temperature, [n].
    """
    teacher = tf.concat([logits / temperature, log_tail[:, None]], axis=-1)
    student = tf.cast(student, tf.float32) / temperature
    count, k = tf.shape(ids)[0], ids.shape[-1]
    at = tf.stack([tf.repeat(tf.range(count), k), tf.reshape(ids, [-1])], axis=1)
    others = tf.tensor_scatter_nd_update(student, at, tf.fill([count * k], NONE))
    top = tf.gather(student, ids, batch_dims=1)
    mine = tf.concat([top, tf.reduce_logsumexp(others, axis=-1, keepdims=True)], axis=-1)
    return log_probabilities(teacher), log_probabilities(mine)

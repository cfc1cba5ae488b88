"""Divergences between two distributions, as pure functions of their log-probabilities.

Every function takes float32 log-probabilities of shape [..., classes] (teacher first) and returns the divergence
in nats, shape [...], without any reduction over examples or positions. Log-probabilities of minus infinity are
allowed: a class with no mass contributes nothing (0 · log 0 = 0).
"""

import math

import tensorflow as tf


def log_probabilities(logits: tf.Tensor, temperature: float | tf.Tensor = 1.0) -> tf.Tensor:
    """log softmax(logits / temperature), float32 whatever the dtype of `logits`. Shapes: [..., classes] both."""
    return tf.nn.log_softmax(tf.cast(logits, tf.float32) / tf.cast(temperature, tf.float32), axis=-1)


def log_yes_no(logits: tf.Tensor, temperature: float | tf.Tensor = 1.0) -> tf.Tensor:
    """log of 1 − sigmoid(logits / temperature) and of sigmoid(logits / temperature), float32 [..., 2]."""
    scaled = tf.cast(logits, tf.float32) / tf.cast(temperature, tf.float32)
    return tf.stack([-tf.nn.softplus(scaled), -tf.nn.softplus(-scaled)], axis=-1)


def forward_kl(log_p: tf.Tensor, log_q: tf.Tensor) -> tf.Tensor:
    """KL(p ‖ q) = Σ p (log p − log q): the student q must cover all that the teacher p does (Hinton et al. 2015)."""
    return _expectation(log_p, log_q)


def reverse_kl(log_p: tf.Tensor, log_q: tf.Tensor) -> tf.Tensor:
    """KL(q ‖ p) = Σ q (log q − log p): the student q seeks the teacher's modes (MiniLLM, Gu et al. 2024, eq. 1)."""
    return _expectation(log_q, log_p)


def jensen_shannon(log_p: tf.Tensor, log_q: tf.Tensor, beta: float = 0.5) -> tf.Tensor:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q (GKD, Agarwal et al. 2024, eq. 1)."""
    log_m = tf.reduce_logsumexp(
        tf.stack([log_p + math.log(beta), log_q + math.log1p(-beta)], axis=0), axis=0
    )  # from log-probabilities: no mass is lost to underflow
    return beta * _expectation(log_p, log_m) + (1.0 - beta) * _expectation(log_q, log_m)


def _expectation(log_p: tf.Tensor, log_q: tf.Tensor) -> tf.Tensor:
    """Σ p (log p − log q), with 0 · log 0 = 0 in the value and in the gradient."""
    p = tf.exp(log_p)
    some = p > 0
    gap = tf.where(some, log_p, 0.0) - tf.where(some, log_q, 0.0)
    return tf.reduce_sum(p * gap, axis=-1)

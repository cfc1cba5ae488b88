"""Scores of single weights: pure functions of tensors. A larger score is a weight worth more.

Matrices are [inputs, outputs], as Keras multiplies. NumPy arrays or tensors in, tensors out (`sparsegpt`: NumPy).
Numbers of 16 bits are scored in float32: products of them are zero, or equal, far too often.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError


def _wide(value: Any) -> Any:
    value = tf.convert_to_tensor(value)
    return value if value.dtype.size >= 4 else tf.cast(value, tf.float32)


def magnitude(weight: Any) -> Any:
    """|W|, any shape. Han et al. 2015, arXiv:1506.02626; Zhu and Gupta 2017, arXiv:1710.01878."""
    return tf.abs(_wide(weight))


def movement(weight: Any, gradient: Any) -> Any:
    """-W dL/dW of one step, any shape; its sum over steps is the score. Sanh et al. 2020, arXiv:2005.07683, eq. 5.

    Weights that the training moves away from zero score high, whatever their size.
    """
    weight = _wide(weight)
    return -weight * tf.cast(gradient, weight.dtype)


def taylor(weight: Any, gradient: Any) -> Any:
    """(W dL/dW)^2, any shape: the squared first-order change of the loss. Molchanov et al. 2019, arXiv:1906.10771."""
    weight = _wide(weight)
    return tf.square(weight * tf.cast(gradient, weight.dtype))


def wanda(weight: Any, input_norm: Any) -> Any:
    """|W_ij| ||x_i||, [inputs, outputs]. Sun et al. 2023, arXiv:2306.11695, eq. 1. Compare within each output column.

    Args:
        weight: [inputs, outputs].
        input_norm: [inputs], L2 norm of each input over the calibration tokens.
    """
    weight = _wide(weight)
    return tf.abs(weight) * tf.cast(input_norm, weight.dtype)[:, None]


def activation(square_mean: Any, output_weight: Any) -> Any:
    """RMS(h_j) ||W_j||, [units]: what unit j adds to its output. Structured Wanda; FLAP, arXiv:2312.11983, eq. 4.

    Args:
        square_mean: [units], mean of h_j^2 (or its variance, where the mean is compensated).
        output_weight: [units, outputs].
    """
    output_weight = _wide(output_weight)
    return tf.sqrt(tf.cast(square_mean, output_weight.dtype)) * tf.norm(output_weight, axis=-1)


def mask_from_scores(scores: Any, sparsity: float, *, by: str = "tensor") -> Any:
    """True for the weights that stay: all but the `sparsity` share with the lowest scores.

    Args:
        scores: any shape; for by="output" [inputs, outputs].
        sparsity: share in [0, 1); the number removed is rounded down, of each column or of the whole.
        by: "tensor" or "output" (each column by itself, as Wanda does).

    Returns:
        bool tensor of the shape of `scores`.
    """
    if not 0.0 <= sparsity < 1.0:
        raise InputError(f"sparsity={sparsity}: expected a share in [0, 1).")
    if by not in ("tensor", "output"):
        raise InputError(f"by={by!r}: expected 'tensor' or 'output'.")
    scores = tf.convert_to_tensor(scores)
    rows = tf.reshape(scores, [1, -1]) if by == "tensor" else tf.transpose(scores)
    size = int(rows.shape[1])
    ranks = tf.argsort(tf.argsort(rows, axis=1, stable=True), axis=1)
    keep = ranks >= int(size * sparsity)
    return tf.reshape(keep, scores.shape) if by == "tensor" else tf.transpose(keep)


def m_by_n_mask(scores: Any, m: int, n: int) -> Any:
    """True for the n - m best of every n consecutive inputs of each output. `scores` is [inputs, outputs].

    Where the inputs do not divide by n, the last group is filled up with zeros, as in TFMOT.

    Raises:
        InputError: no 0 < m < n.
    """
    scores = tf.convert_to_tensor(scores)
    inputs, outputs = (int(size) for size in scores.shape)
    if not 0 < m < n:
        raise InputError(f"{m} of {n}: expected 0 < m < n.")
    rows = tf.pad(tf.transpose(scores), [[0, 0], [0, -inputs % n]], constant_values=scores.dtype.min)
    groups = tf.reshape(rows, [outputs, -1, n])
    ranks = tf.argsort(tf.argsort(groups, axis=-1, stable=True), axis=-1)
    return tf.transpose(tf.reshape(ranks >= m, [outputs, -1])[:, :inputs])


def sparsegpt(
    weight: Any,
    hessian: Any,
    sparsity: float | None = None,
    *,
    m_by_n: tuple[int, int] | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:
    """One-shot pruning that mends the remaining weights after each removed one: optimal brain surgeon, input by input.

    Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1: with U the upper Cholesky factor of the inverse Hessian,
    score W_i^2 / U_ii^2; removing W_i changes every later W_j by -(W_i / U_ii) U_ij.

    Args:
        weight: [inputs, outputs].
        hessian: [inputs, inputs], sum or mean of x x^T over the calibration tokens.
        sparsity: share removed, chosen per block of inputs over all outputs.
        m_by_n: (m, n) instead: m zeros in every n consecutive inputs of each output, the last n filled up with zeros.
        block: inputs whose mask is chosen together.
        damping: times the mean of the diagonal, added to it.

    Returns:
        (new weight, mask of what stays), both [inputs, outputs], float64 and bool.

    Raises:
        InputError: neither or both of sparsity and m_by_n, or no 0 < m < n.
    """
    if (sparsity is None) == (m_by_n is None):
        raise InputError("sparsegpt: expected exactly one of sparsity and m_by_n.")
    if sparsity is not None and not 0.0 <= sparsity < 1.0:
        raise InputError(f"sparsity={sparsity}: expected a share in [0, 1).")
    new = np.array(weight, dtype=np.float64)
    inputs = new.shape[0]
    h = np.array(hessian, dtype=np.float64)
    dead = np.diag(h) == 0
    h[dead, dead] = 1.0
    new[dead] = 0.0
    h[np.arange(inputs), np.arange(inputs)] += damping * float(np.mean(np.diag(h)))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    mask = np.ones(new.shape, bool)
    if m_by_n is not None:
        m, n = m_by_n
        if not 0 < m < n:
            raise InputError(f"{m} of {n}: expected 0 < m < n.")
        block = max(n, block // n * n)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        errors = np.zeros((stop - start, new.shape[1]))
        if sparsity is not None:
            scores = np.square(new[start:stop]) / np.square(np.diag(upper)[start:stop, None])
            removed = int(scores.size * sparsity)
            order = np.argsort(scores, axis=None, kind="stable")[:removed]
            mask[start:stop].reshape(-1)[order] = False
        for i in range(start, stop):
            if m_by_n is not None and i % n == 0:
                scores = np.square(new[i : i + n]) / np.square(np.diag(upper)[i : i + n, None])
                worst = np.argsort(scores, axis=0, kind="stable")[: max(m - (n - len(scores)), 0)]
                np.put_along_axis(mask[i : i + n], worst, False, axis=0)
            error = np.where(mask[i], 0.0, new[i]) / upper[i, i]
            new[i:stop] -= upper[i, i:stop, None] * error[None]
            new[i] *= mask[i]
            errors[i - start] = error
        new[stop:] -= upper[start:stop, stop:].T @ errors
    mask[dead] = False
    return new * mask, mask

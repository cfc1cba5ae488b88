"""How numbers become bytes, and the quantised ops that read them."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfvllm.graph.builder import Builder
from tfvllm.graph.ir import Value

LEVELS = 127.0  # of a weight on each side of zero; -128 is left out, so that a number and its negative are alike


STEPS = 255.0  # of an input over its whole range


Range = tuple[float, float]


def quantise_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A weight as int8 and the magnitude that 127 stands for in each column.

    Args:
        weight: float32[inputs, outputs], finite.

    Returns:
        int8[inputs, outputs] in [-127, 127]; float32[outputs], positive. A column of zeros stays zeros, with scale 1.
    """
    largest = np.max(np.abs(weight), axis=0, initial=0.0).astype(np.float32)
    # Of a subnormal magnitude the kernel would take the scale for zero.
    scale = np.where(largest < np.finfo(np.float32).tiny * LEVELS, np.float32(1.0), largest)
    return np.rint(weight.astype(np.float64) / scale * LEVELS).astype(np.int8), scale.astype(np.float32)


def align_zero_point(low: float, high: float) -> Range:
    """The range widened to hold zero, and shifted by less than a step so that zero is one of its 256 levels."""
    low, high = min(low, 0.0), max(high, 0.0)
    if not high - low > 1e-30:
        return 0.0, 1.0
    step = (high - low) / STEPS
    zero = round(-low / step)
    return float(np.float32(-zero * step)), float(np.float32((STEPS - zero) * step))


def smoothing(largest: np.ndarray, weight_largest: np.ndarray, alpha: float) -> np.ndarray:
    """What each channel of an activation is divided by, and its rows of the weight multiplied by.

    `s_k = max|x_k|^α / max|w_k|^(1-α)` (Xiao et al. 2022, arXiv:2211.10438, equation 4): channels with rare large
    values give some of their spread to the weight.

    Args:
        largest, weight_largest: float[inputs], the largest magnitudes of each channel.
        alpha: in [0, 1].

    Returns:
        float32[inputs], positive, with geometric mean 1; 1 for a channel that is always zero.
    """
    x, w = np.asarray(largest, np.float64), np.asarray(weight_largest, np.float64)
    usable = (x > 1e-30) & (w > 1e-30)
    factors = np.ones(x.shape)
    factors[usable] = x[usable] ** alpha / w[usable] ** (1.0 - alpha)
    if usable.any():
        factors[usable] /= np.exp(np.mean(np.log(factors[usable])))
    return np.clip(factors, 1e-4, 1e4).astype(np.float32)


def quantised_matmul(b: Builder, inputs: list[Value], fused: list[str], out: tf.DType) -> Value:
    """A `_QuantizedMatMul` of an unsigned byte and int8; `inputs` in the order of its kernel."""
    outputs = [out] if out.is_floating else [out, tf.float32, tf.float32]
    return b.op(
        "_QuantizedMatMul",
        inputs,
        Tdevice_inputs=[v.dtype for v in inputs],
        Thost_inputs=[],
        Tdevice_outputs=outputs,
        Thost_outputs=[],
        T1=tf.quint8,
        T2=tf.qint8,
        Tbias=tf.float32,
        U=tf.float32,
        Tout=out,
        fused_ops=fused,
        input_quant_mode="SCALED",
        output_quant_mode="MIN_FIRST",
    )[0]

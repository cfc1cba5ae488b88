"""What this process can compute of a target, found out by computing it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.graph import executable, ops
from tfvllm.graph.builder import Builder
from tfvllm.graph.ir import Graph, Value
from tfvllm.graph.targets import ONEDNN, PORTABLE


def check_runs(target: str, precision: str = "float32") -> None:
    """Raises an InputError where this process cannot compute what `target` emits in `precision`, and says what to do.

    The same holds where the model is served: there too oneDNN must be on, and the CPU must have what is asked of it.
    """
    if target != ONEDNN:
        return
    if not computes_fused(tf.float32):
        raise InputError(
            "target 'onednn': TensorFlow runs without oneDNN in this process (TF_ENABLE_ONEDNN_OPTS is "
            f"{os.environ.get('TF_ENABLE_ONEDNN_OPTS', 'not set')}; without it TensorFlow decides by the CPU). Set "
            "TF_ENABLE_ONEDNN_OPTS=1 before TensorFlow is imported, here and on the server, or use target 'portable'."
        )
    if precision == "bfloat16" and not computes_fused(tf.bfloat16):
        raise InputError(
            "precision 'bfloat16' with target 'onednn': oneDNN has no bfloat16 on this CPU (that takes AVX-512). Use "
            "precision 'float32', or run this on a machine like the one that is to serve the model."
        )
    if precision == "int8" and not computes_int8():
        raise InputError(
            "precision 'int8': oneDNN adds int8 products in 16 bits on this CPU, which overflow, and answers would be "
            "wrong (that takes VNNI or AMX). Use precision 'float32', or run this on a machine like the one that is to "
            "serve the model."
        )


def default_for(precision: str) -> str:
    """The target of a generation export: bfloat16 is fast by oneDNN only, and goes without it where it must."""
    if precision == "bfloat16" and computes_fused(tf.float32) and computes_fused(tf.bfloat16):
        return ONEDNN
    return PORTABLE


@functools.cache
def computes_fused(dtype: tf.DType) -> bool:
    """Whether a product with a residual added is computed here: kernels are registered with oneDNN off too."""
    return _probe(
        lambda b: b.op(
            "_FusedMatMul",
            [b.const(value, dtype) for value in ([[1.0, 2.0]], [[3.0], [4.0]], [1.0], [[1.0]])],
            fused_ops=["BiasAdd", "Add"],
            num_args=2,
        )[0],
        13.0,
    )


@functools.cache
def computes_int8() -> bool:
    """Whether large products of bytes are added without overflow."""
    from tfvllm.graph.int8_ops import quantised_matmul

    def largest(b: Builder) -> Value:
        x = b.Cast(b.const(np.full((1, 64), 255)), DstT=tf.uint8)
        w = b.Cast(b.const(np.full((64, 64), 127)), DstT=tf.int8)
        x, w = b.Bitcast(x, type=tf.quint8), b.Bitcast(w, type=tf.qint8)
        ends = [b.const(value, tf.float32) for value in (0.0, 255.0, np.full(64, -127.0), np.full(64, 127.0))]
        return quantised_matmul(
            b, [x, w, b.const(np.zeros(64), tf.float32), *ends], ["BiasAdd", "Dequantize"], tf.float32
        )

    return _probe(largest, 64 * 255.0 * 127.0)


def _probe(make: Callable[[Builder], Value], expected: float) -> bool:
    from tfvllm.graph.builder import Builder

    graph = Graph("probe")
    b = Builder(graph, "probe")
    graph.outputs = {"answer": b.Cast(make(b), DstT=tf.float32)}
    try:
        answer = executable.to_concrete(graph, ((), {}), pack=list)()[0].numpy()
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.NotFoundError):
        return False
    return bool(np.allclose(answer, expected, rtol=1e-3))


def available(emits: tuple[str, ...], dtype: tf.DType = tf.float32) -> str | None:
    """None if this TensorFlow has CPU kernels for all `emits`; otherwise the reason it has not."""
    for op in emits:
        if not ops.has_kernel(op, dtype):
            return f"this TensorFlow has no CPU kernel for {op} ({dtype.name})"
    return None

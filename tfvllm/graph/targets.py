"""Which ops a rewritten graph may hold, and whether the running TensorFlow can compute them.

`portable`: public ops only; any TensorFlow runs them. `onednn`: also TensorFlow's internal fused ops, which need a
TensorFlow built with oneDNN (the official x86-64 Linux wheels and images are) that has it on: TensorFlow's own choice
where the CPU has VNNI, bfloat16 or AMX instructions, elsewhere it takes `TF_ENABLE_ONEDNN_OPTS=1`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError, TfvllmError
from tfvllm.graph import ops
from tfvllm.graph.ir import Graph, Value

if TYPE_CHECKING:
    from tfvllm.graph.rewriter import Builder

PORTABLE = "portable"
ONEDNN = "onednn"
TARGETS = (PORTABLE, ONEDNN)
ONEDNN_OPS = frozenset(
    {
        "_FusedMatMul",
        "_MklLayerNorm",
        "_MklFusedBatchMatMulV2",
        "_MklNativeFusedMatMul",
        "_QuantizedMatMul",
        "_MklSwish",
    }
    | {"_FusedConv2D", "_FusedDepthwiseConv2dNative"}
)


def check(target: str) -> str:
    """`target`, or an InputError that lists what there is."""
    if target not in TARGETS:
        raise InputError(f"target: expected one of {', '.join(TARGETS)}, found {target!r}.")
    return target


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
    from tfvllm.rules.int8 import quantised_matmul

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
    from tfvllm.graph import convert
    from tfvllm.graph.rewriter import Builder

    graph = Graph("probe")
    b = Builder(graph, "probe")
    graph.outputs = {"answer": b.Cast(make(b), DstT=tf.float32)}
    try:
        answer = convert.to_concrete(graph, ((), {}), pack=list)()[0].numpy()
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.NotFoundError):
        return False
    return bool(np.allclose(answer, expected, rtol=1e-3))


def available(emits: tuple[str, ...], dtype: tf.DType = tf.float32) -> str | None:
    """None if this TensorFlow has CPU kernels for all `emits`; otherwise the reason it has not."""
    for op in emits:
        if not ops.has_kernel(op, dtype):
            return f"this TensorFlow has no CPU kernel for {op} ({dtype.name})"
    return None


def check_graph(graph: Graph, target: str) -> None:
    """Raises where the graph holds an op its target does not allow or this TensorFlow does not have."""
    for node in graph.live():
        internal = node.op.startswith("_") and node.op not in graph.library
        if internal and (target != ONEDNN or node.op not in ONEDNN_OPS):
            raise TfvllmError(f"node {node.name}: op {node.op} is not allowed for target {target!r}; this is a bug")
        if internal and not ops.has_kernel(node.op):
            raise TfvllmError(
                f"node {node.name}: this TensorFlow has no CPU kernel for {node.op}; use target='portable'"
            )


def internal_ops(graph: Graph) -> list[str]:
    """The internal ops a graph holds, sorted."""
    used = {n.attr(ops.COMPUTES, n.op) for n in graph.live()}
    return sorted(op for op in used if op.startswith("_") and op not in graph.library)

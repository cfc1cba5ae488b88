"""What a graph costs: nodes, floating-point operations, bytes of weights.

One multiply-add counts as two operations. Elementwise work counts one operation an element (transcendental functions
too). Sizes that are unknown until run time take the values of `sizes`: symbol -> number; see `example_sizes`.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from tfvllm.graph import dims, ops
from tfvllm.graph.ir import Graph, Node, Value

_ELEMENTWISE = frozenset(
    (
        *("AddV2", "Add", "Sub", "Mul", "RealDiv", "Pow", "Maximum", "Minimum", "SquaredDifference", "BiasAdd"),
        *("Relu", "Relu6", "Elu", "Selu", "LeakyRelu", "Tanh", "Sigmoid", "Erf", "Exp", "Log", "Sqrt", "Rsqrt"),
        *("Square", "Neg", "Abs", "Softplus", "SelectV2", "Mean", "Sum", "Max", "Min", "Prod", "FusedBatchNormV3"),
    )
)


def example_sizes(graph: Graph, batch: int = 1, length: int = 128) -> dict[str, int]:
    """Numbers for the unknown sizes of a graph's inputs: axis 0 is `batch`, any other unknown axis `length`."""
    sizes = {}
    for value in graph.inputs.values():
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, dims.Dim):
                for symbol in size.symbols():
                    sizes[symbol] = batch if axis == 0 else length
    # A string model's batch and lengths appear inside the graph, where the tokenizer makes them; a vector of all
    # tokens (rank 1) tells nothing about which of the two its size is.
    for node in graph.live():
        for value in node.outputs:
            if value.shape is None or len(value.shape) < 2:
                continue
            for axis, size in enumerate(value.shape):
                if isinstance(size, dims.Dim):
                    for symbol in size.symbols():
                        if node.op == "Where":  # as many as there can be: no position is padding
                            sizes.setdefault(symbol, _elements(node.inputs[0], sizes))
                        elif "(" not in symbol:
                            sizes.setdefault(symbol, batch if axis == 0 else length)
    return sizes


def count(graph: Graph, sizes: dict[str, int] | None = None) -> dict[str, Any]:
    """Nodes (constants, arguments and weight reads not counted), FLOPs, parameters, bytes of weights, ops by type."""
    sizes = example_sizes(graph) if sizes is None else sizes
    live = graph.live()
    work = [n for n in live if n.op not in ("Const", "Placeholder", "ReadVariableOp", "NoOp")]
    weights: dict[int, Any] = {}
    for node in live:
        capture = graph.captures.get(node.name)
        if capture is not None and hasattr(capture.owner, "shape") and hasattr(capture.owner, "dtype"):
            weights[id(capture.tensor)] = capture.owner
    parameters = sum(int(np.prod(w.shape.as_list(), dtype=np.int64)) for w in weights.values())
    return {
        "nodes": len(work),
        "flops": sum(flops(n, sizes) for n in work),
        "parameters": parameters,
        "bytes": sum(int(np.prod(w.shape.as_list(), dtype=np.int64)) * w.dtype.size for w in weights.values()),
        "ops": dict(Counter(n.attr(ops.COMPUTES, n.op) for n in work).most_common()),
    }


def flops(node: Node, sizes: dict[str, int]) -> int:
    """Floating-point operations of one node."""
    if not node.outputs:
        return 0
    out = _elements(node.output, sizes)
    if node.op in ("MatMul", "_FusedMatMul", "_MklNativeFusedMatMul", "_QuantizedMatMul"):
        a = _shape(node.inputs[0], sizes)
        inner = (a[0] if node.attr("transpose_a") else a[-1]) if a else 0
        return out * (2 * inner + len(node.attr("fused_ops", []) or []))
    if node.op in ("BatchMatMulV2", "BatchMatMul", "BatchMatMulV3", "_MklFusedBatchMatMulV2"):
        a = _shape(node.inputs[0], sizes)
        return out * 2 * ((a[-2] if node.attr("adj_x") else a[-1]) if a else 0)
    if node.op == "Einsum":
        return _einsum(node, sizes)
    if node.op in ("Conv2D", "_FusedConv2D", "Conv1D", "Conv3D"):
        kernel = _shape(node.inputs[1], sizes)
        return out * 2 * math.prod(kernel[:-1]) if kernel else 0
    if node.op in ("DepthwiseConv2dNative", "_FusedDepthwiseConv2dNative"):
        kernel = _shape(node.inputs[1], sizes)
        return out * 2 * math.prod(kernel[:2]) if kernel else 0
    if node.op in ("Softmax", "LogSoftmax"):
        return 5 * out
    if node.attr(ops.COMPUTES, node.op) == "_MklLayerNorm":
        return 8 * out
    if node.attr(ops.COMPUTES) == ops.ATTENTION:
        q, v = _shape(node.inputs[1], sizes), _shape(node.inputs[3], sizes)
        scores = math.prod(q[:-1]) * v[-2]
        return scores * (2 * q[-1] + 5 + 2 * v[-1])
    if node.op in _ELEMENTWISE and node.output.dtype.is_floating:
        return max([out, *(_elements(v, sizes) for v in node.inputs)])
    return 0


def _einsum(node: Node, sizes: dict[str, int]) -> int:
    left = node.attr("equation").replace(" ", "").split("->")[0]
    extent: dict[str, int] = {}
    for labels, value in zip(left.split(","), node.inputs):
        extent.update(zip(labels, _shape(value, sizes)))
    return 2 * math.prod(extent.values()) if len(node.inputs) > 1 else 0


def _shape(value: Value, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(max(0, dims.evaluate(d, sizes)) for d in value.shape or ())


def _elements(value: Value, sizes: dict[str, int]) -> int:
    return 0 if value.shape is None else math.prod(_shape(value, sizes))


def packed_weights(graph: Graph) -> list[Value]:
    """The weights of which kernels keep a packed copy, as large again, from the first request that uses it on."""
    found = []
    for node in graph.live():
        if node.op == _KEEPS:
            found.append(node.inputs[1])
        elif node.op == "StatelessIf" and any(
            inner.op == _KEEPS for inner in graph.library[node.attrs["then_branch"].func.name].node_def
        ):
            found.append(node.inputs[2])  # after the condition and x
    return found


_KEEPS = "_MklNativeFusedMatMul"

"""Which ops a rewritten graph may hold, and whether the running TensorFlow can compute them.

`portable`: public ops only; any TensorFlow runs them. `onednn`: also TensorFlow's internal fused ops, which need a
TensorFlow built with oneDNN (the official x86-64 Linux wheels and images are) that has it on: TensorFlow's own choice
where the CPU has VNNI, bfloat16 or AMX instructions, elsewhere it takes `TF_ENABLE_ONEDNN_OPTS=1`.
"""

from __future__ import annotations

from tfvllm.errors import InputError, TfvllmError
from tfvllm.graph import ops
from tfvllm.graph.ir import Graph

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

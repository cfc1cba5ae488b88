"""Weights are kept as oneDNN's products want them."""

import re
from typing import Any

import tensorflow as tf

from tfvllm.graph import onednn_costs
from tfvllm.graph.branches import either
from tfvllm.graph.builder import Builder
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.rewriter import Pass

_PACKED = "_MklNativeFusedMatMul"


class PrepackWeights(Pass):
    """_FusedMatMul(x, w, b, …) -> _MklNativeFusedMatMul(x, w, b, …), which packs w once, for weights w in bfloat16.

    Otherwise w is packed anew at every call: without that a product takes 0.6 to 0.9 of the time for up to 128 rows,
    and a little less for more. The packed copies of the weights come at the first request, as large as the weights in
    bfloat16. One layout serves all numbers of rows. In float32 oneDNN wants another for few rows than for many, and
    would pack anew all but those that come as the first did: there nothing is kept.

    What is kept are the weights of the first request: what is assigned to a variable later is not seen. So only those
    that this run made, from the original's, are kept; nobody else knows them.
    """

    guarantee = Reordered()  # another kernel may sum in another order
    targets = ("onednn",)
    emits = (_PACKED,)

    def run(self, rewriter):
        graph = rewriter.graph
        changed = False
        for node in graph.order():
            if node.op != "_FusedMatMul" or node.output.dtype != tf.bfloat16 or not rewriter.allowed(self, node):
                continue
            if not _keepable(graph, node) or not graph.captures[node.inputs[1].node.inputs[0].node.name].made:
                continue
            new = _packed(Builder(graph, node.name), node, node.inputs)
            new.shape = node.output.shape
            self.substitute(rewriter, node, new)
            changed = True
        return changed


class PrepackWeightsSmallBatch(Pass):
    """_FusedMatMul(x, w, b, …) -> the same with w packed once if x has 8 to 32 rows, for weights w in float32.

    For few rows as for many oneDNN packs w anew at every call, in another layout for few than for many: so the packed
    copy is used, and made, by the few alone. It takes as much memory as w once a request comes that uses it. What is
    assigned to w after that is not seen. It is one of the ways that dispatch by shape measures for a SavedModel; by
    itself `simplify` does not use it.
    """

    guarantee = Reordered()  # another kernel may sum in another order
    targets = ("onednn",)
    emits = (_PACKED,)

    def run(self, rewriter):
        graph = rewriter.graph
        few: dict[Any, Value] = {}  # number of rows -> whether there are few
        changed = False
        for node in graph.order():
            if node.op != "_FusedMatMul" or node.output.dtype != tf.float32 or not rewriter.allowed(self, node):
                continue
            x = node.inputs[0]
            if not _keepable(graph, node) or x.shape is None or node.attr("transpose_a"):
                continue
            b, rows = Builder(graph, node.name), x.shape[0]
            if isinstance(rows, int):
                if not onednn_costs.PACKED_ROWS[0] <= rows < onednn_costs.PACKED_ROWS[1]:
                    continue
                new = _packed(b, node, node.inputs)
            else:
                if rows not in few:
                    ends = (b.ints(0), b.ints(1), b.ints(1))
                    count = b.StridedSlice(b.Shape(x, out_type=tf.int32), *ends, shrink_axis_mask=1)
                    above = b.GreaterEqual(count, b.const(onednn_costs.PACKED_ROWS[0], tf.int32))
                    few[rows] = b.LogicalAnd(above, b.Less(count, b.const(onednn_costs.PACKED_ROWS[1], tf.int32)))
                # A kernel that keeps a weight must never be given another: no two nodes share their branches.
                own = re.sub(r"\W", "_", node.name)
                new = either(
                    rewriter,
                    f"{node.name}/by_rows",
                    few[rows],
                    node.inputs,
                    [
                        (f"product_packed_{own}", lambda b, v, n=node: _packed(b, n, v)),  # type: ignore[misc]
                        (f"product_{own}", lambda b, v, n=node: b.op(n.op, v, **n.own_attrs())[0]),  # type: ignore[misc]
                    ],
                    node.output,
                    node.op,
                )
            new.shape = node.output.shape
            self.substitute(rewriter, node, new)
            changed = True
        return changed


def _keepable(graph: Graph, node: Node) -> bool:
    # In the body of a loop weights are arguments: there another call could bring others.
    return graph.is_weight(node.inputs[1]) and node.attr("fused_ops", [])[:1] == ["BiasAdd"]


def _packed(b: Builder, node: Node, inputs: list[Value]) -> Value:
    # `_kernel` is the label under which TensorFlow registers the kernels of its own rewritten ops.
    return b.op(_PACKED, inputs, **node.own_attrs(), is_filter_const=True, _kernel="MklNameChangeOp")[0]

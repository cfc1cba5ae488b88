"""Weights are kept as oneDNN's products want them."""

import re
from functools import partial

import tensorflow as tf

from tfvllm.graph import onednn_costs
from tfvllm.graph.branches import BySize, as_it_is
from tfvllm.graph.builder import Builder
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.rewriter import NodePass

_PACKED = "_MklNativeFusedMatMul"


class PrepackWeights(NodePass):
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
    ops = frozenset({"_FusedMatMul"})

    def rewrite(self, b, node):
        if node.output.dtype != tf.bfloat16 or not _keepable(b.graph, node):
            return None
        if not b.graph.captures[node.inputs[1].node.inputs[0].node.name].made:
            return None
        return {node.output: _packed(b, node.inputs, node)}


class PrepackWeightsSmallBatch(NodePass):
    """_FusedMatMul(x, w, b, …) -> the same with w packed once if x has 8 to 32 rows, for weights w in float32.

    For few rows as for many oneDNN packs w anew at every call, in another layout for few than for many: so the packed
    copy is used, and made, by the few alone. It takes as much memory as w once a request comes that uses it. What is
    assigned to w after that is not seen. It is one of the variants that dispatch by shape measures for a SavedModel; by
    itself `simplify` does not use it.
    """

    guarantee = Reordered()  # another kernel may sum in another order
    targets = ("onednn",)
    emits = (_PACKED,)
    ops = frozenset({"_FusedMatMul"})

    def begin(self, rewriter):
        return partial(_chosen, BySize(rewriter, "by_rows", *onednn_costs.PACKED_ROWS))


def _chosen(sizes: BySize, b: Builder, node: Node) -> dict[Value, Value] | None:
    x = node.inputs[0]
    if node.output.dtype != tf.float32 or not _keepable(b.graph, node) or x.shape is None or node.attr("transpose_a"):
        return None
    # A kernel that keeps a weight must never be given another: no two nodes share their branches.
    own = re.sub(r"\W", "_", node.name)
    new = sizes.choose(
        b,
        x.shape[0],
        lambda b: _rows(b, x),
        node.inputs,
        [
            (f"product_packed_{own}", partial(_packed, node=node)),
            (f"product_{own}", partial(as_it_is, node=node)),
        ],
        node.output,
        node.op,
    )
    return None if new is None else {node.output: new}


def _rows(b: Builder, x: Value) -> Value:
    ends = (b.ints(0), b.ints(1), b.ints(1))
    return b.StridedSlice(b.Shape(x, out_type=tf.int32), *ends, shrink_axis_mask=1)


def _keepable(graph: Graph, node: Node) -> bool:
    # In the body of a loop weights are arguments: there another call could bring others.
    return graph.is_weight(node.inputs[1]) and node.attr("fused_ops", [])[:1] == ["BiasAdd"]


def _packed(b: Builder, values: list[Value], node: Node) -> Value:
    # `_kernel` is the label under which TensorFlow registers the kernels of its own rewritten ops.
    new = b.op(_PACKED, values, **node.own_attrs(), is_filter_const=True, _kernel="MklNameChangeOp")[0]
    new.shape = node.output.shape
    return new

"""Attention over few positions with ops that need no preparing."""

from functools import partial

import tensorflow as tf

from tfvllm.graph import attention, dims, onednn_costs, ops
from tfvllm.graph.branches import BySize
from tfvllm.graph.builder import Builder
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.ir import Node, Value
from tfvllm.graph.rewriter import NodePass


class AttentionWithoutOneDnn(NodePass):
    """softmax(f(q·kᵀ))·v -> the same by other kernels if there are fewer than 2¹³ scores: exp(log_softmax(f(q·kᵀ)))·v.

    `f` masks or scales. TensorFlow decides by an op's name what it gives to oneDNN: BatchMatMulV2 and Softmax go there,
    BatchMatMulV3 and LogSoftmax do not. Chosen when the graph runs (`StatelessIf`), or now if sizes are known.
    """

    guarantee = Approximate(
        2e-6, "all inputs", "p = exp(log p) has a relative error of at most (2 + |log p|)·2⁻²⁴; p·|log p| is below 0.37"
    )
    emits = ("BatchMatMulV3", "LogSoftmax")
    ops = frozenset({"Softmax"})

    def begin(self, rewriter):
        return partial(_chosen, BySize(rewriter, "by_scores", None, onednn_costs.ATTENTION_SCORES))


def _chosen(sizes: BySize, b: Builder, node: Node) -> dict[Value, Value] | None:
    core = attention.core(b.graph, node)
    if core is None or not _known(core):
        return None
    first, last = core[0], core[-1]
    b.scope = last.name
    q, k = first.inputs
    given = _outside(core)
    new = sizes.choose(
        b,
        dims.product(first.output.shape),
        lambda b: _matmuls(b, q, k, bool(first.attr("adj_y"))),
        given,
        [
            ("attention_small", partial(_computed, core=core, given=given, small=True)),
            ("attention", partial(_computed, core=core, given=given, small=False)),
        ],
        last.output,
        ops.ATTENTION,
        key=(q.shape, k.shape),
        unit=q.shape[-1],
    )
    return None if new is None else {last.output: new}


def _known(core: list[Node]) -> bool:
    query, values = core[0].inputs[0], core[-1]
    return query.dtype == tf.float32 and isinstance(query.shape[-1], int) and not values.attr("adj_y")


def _matmuls(b: Builder, q: Value, k: Value, transposed: bool) -> Value:
    """How many products the scores of q [batch, heads, queries, channels] and k are summed from, int64[]."""
    axis = 2 if transposed else 3
    shape = b.Shape(k, out_type=tf.int64)
    keys = b.StridedSlice(shape, b.ints(axis), b.ints(axis + 1), b.ints(1), shrink_axis_mask=1)
    return b.Mul(b.Size(q, out_type=tf.int64), keys)


def _computed(b: Builder, values: list[Value], core: list[Node], given: list[Value], small: bool) -> Value:
    """The result of `core`, with `values` in place of what is `given` to it."""
    known = dict(zip(given, values))
    for node in core:
        inputs = [known[v] for v in node.inputs]
        if small and node.op == "BatchMatMulV2":
            adjoint = {key: bool(node.attr(key)) for key in ("adj_x", "adj_y")}
            new = b.BatchMatMulV3(*inputs, Tout=node.output.dtype, **adjoint)
        elif small and node.op == "Softmax":
            new = b.Exp(b.LogSoftmax(*inputs))
        else:
            twin = b.graph.add(f"{b.scope}/{node.op}", node.op, inputs, node.own_attrs())
            b.made.append(twin)
            new = twin.output
        new.shape = node.output.shape
        known[node.output] = new
    return known[core[-1].output]


def _outside(core: list[Node]) -> list[Value]:
    """What is given to it. Queries, keys and values first: what is counted of an attention is counted by them."""
    main = [*core[0].inputs, core[-1].inputs[1]]
    every = dict.fromkeys(v for n in core for v in n.inputs if v.node not in core)
    return [*main, *(v for v in every if v not in main)]

"""Attention over few positions with ops that need no preparing."""

from typing import Any

import tensorflow as tf

from tfvllm.graph import attention, dims, onednn_costs, ops
from tfvllm.graph.branches import either
from tfvllm.graph.builder import Builder
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.ir import Node, Value
from tfvllm.graph.rewriter import Pass


class AttentionWithoutOneDnn(Pass):
    """softmax(f(q·kᵀ))·v -> the same by other kernels if there are fewer than 2¹³ scores: exp(log_softmax(f(q·kᵀ)))·v.

    `f` masks or scales. TensorFlow decides by an op's name what it gives to oneDNN: BatchMatMulV2 and Softmax go there,
    BatchMatMulV3 and LogSoftmax do not. Chosen when the graph runs (`StatelessIf`), or now if sizes are known.
    """

    guarantee = Approximate(
        2e-6, "all inputs", "p = exp(log p) has a relative error of at most (2 + |log p|)·2⁻²⁴; p·|log p| is below 0.37"
    )
    emits = ("BatchMatMulV3", "LogSoftmax")

    def run(self, rewriter):
        graph = rewriter.graph
        few: dict[Any, Value] = {}  # shapes of queries and keys -> whether there are few scores
        changed = False
        for node in graph.order():
            if node.op != "Softmax" or graph.nodes.get(node.name) is not node or not rewriter.allowed(self, node):
                continue
            core = attention.core(graph, node)
            if core is None or not _known(core):
                continue
            first, last = core[0], core[-1]
            b, scores = Builder(graph, last.name), dims.product(first.output.shape)
            if isinstance(scores, int) and scores >= onednn_costs.ATTENTION_SCORES:
                continue
            outside = list(dict.fromkeys(v for n in core for v in n.inputs if v.node not in core))
            if isinstance(scores, int):
                new = _copied(b, core, {v: v for v in outside}, small=True)
            else:
                q, k = first.inputs
                if (q.shape, k.shape) not in few:
                    few[q.shape, k.shape] = _few(b, q, k, bool(first.attr("adj_y")))
                given = _ordered(core, outside)
                new = either(
                    rewriter,
                    f"{last.name}/by_scores",
                    few[q.shape, k.shape],
                    given,
                    [
                        ("attention_small", lambda b, v, c=core, g=given: _copied(b, c, dict(zip(g, v)), small=True)),  # type: ignore[misc]
                        ("attention", lambda b, v, c=core, g=given: _copied(b, c, dict(zip(g, v)), small=False)),  # type: ignore[misc]
                    ],
                    last.output,
                    ops.ATTENTION,
                )
            rewriter.fire(self, node)
            graph.replace(last.output, new)
            self.removed(rewriter, last)
            changed = True
        return changed


def _known(core: list[Node]) -> bool:
    query, values = core[0].inputs[0], core[-1]
    return query.dtype == tf.float32 and isinstance(query.shape[-1], int) and not values.attr("adj_y")


def _few(b: Builder, q: Value, k: Value, transposed: bool) -> Value:
    """Whether q [batch, heads, queries, channels] and k give fewer than `onednn_costs.ATTENTION_SCORES` scores."""
    axis = 2 if transposed else 3
    shape = b.Shape(k, out_type=tf.int64)
    keys = b.StridedSlice(shape, b.ints(axis), b.ints(axis + 1), b.ints(1), shrink_axis_mask=1)
    products = b.Mul(b.Size(q, out_type=tf.int64), keys)
    return b.Less(products, b.const(onednn_costs.ATTENTION_SCORES * q.shape[-1], tf.int64))


def _copied(b: Builder, core: list[Node], given: dict[Value, Value], small: bool) -> Value:
    values = dict(given)
    for node in core:
        inputs = [values[v] for v in node.inputs]
        if small and node.op == "BatchMatMulV2":
            adjoint = {key: bool(node.attr(key)) for key in ("adj_x", "adj_y")}
            new = b.BatchMatMulV3(*inputs, Tout=node.output.dtype, **adjoint)
        elif small and node.op == "Softmax":
            new = b.Exp(b.LogSoftmax(*inputs))
        else:
            attrs = node.own_attrs()
            twin = b.graph.add(f"{b.scope}/{node.op}", node.op, inputs, attrs)
            b.made.append(twin)
            new = twin.output
        new.shape = node.output.shape
        values[node.output] = new
    return new


def _ordered(core: list[Node], outside: list[Value]) -> list[Value]:
    """Queries, keys and values first: what is counted of an attention is counted by them."""
    main = [*core[0].inputs, core[-1].inputs[1]]
    return [*main, *(v for v in outside if v not in main)]

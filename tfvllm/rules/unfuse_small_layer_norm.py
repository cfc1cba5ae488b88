"""Layer normalisation by the fused kernel over many rows, and with public ops over few."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfvllm.graph import dims, onednn_costs
from tfvllm.graph.branches import either
from tfvllm.graph.builder import Builder
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.ir import Node, Value
from tfvllm.graph.rewriter import Pass


class UnfuseSmallLayerNorm(Pass):
    """layernorm(x, γ, β) -> _MklLayerNorm(x, γ, β) if x has 2¹⁶ elements or more, else (x - μ)·r·γ + β.

    Chosen while rewriting where the size is known, and when the graph runs (`StatelessIf`) where it is not.
    """

    guarantee = Reordered()
    targets = ("onednn",)
    emits = ("_MklLayerNorm",)

    def run(self, rewriter):
        graph = rewriter.graph
        many: dict[Any, Value] = {}  # shape -> whether it has that many elements
        changed = False
        for node in graph.order():
            x = node.inputs[0] if node.op == "_MklLayerNorm" else None
            if x is None or x.rank is None or not isinstance(x.shape[-1], int) or not rewriter.allowed(self, node):
                continue
            b, size = Builder(graph, node.name), dims.product(x.shape)
            if isinstance(size, int):
                if size >= onednn_costs.LAYER_NORM_ELEMENTS:
                    continue
                new = plain(b, node)
            else:
                # In the order of the graph: nothing that decides can follow from what it decides on.
                if x.shape not in many:
                    count = b.Size(x, out_type=tf.int64)
                    many[x.shape] = b.GreaterEqual(count, b.const(onednn_costs.LAYER_NORM_ELEMENTS, tf.int64))
                new = either(
                    rewriter,
                    f"{node.name}/by_rows",
                    many[x.shape],
                    node.inputs,
                    [
                        ("layer_norm_fused", lambda b, v, n=node: b.op(n.op, v, epsilon=n.attr("epsilon"))[0]),  # type: ignore[misc]
                        ("layer_norm_plain", lambda b, v, n=node: plain(b, n, v)),  # type: ignore[misc]
                    ],
                    node.output,
                    node.op,
                )
            self.substitute(rewriter, node, new)
            changed = True
        return changed


def plain(b: Builder, node: Node, inputs: Sequence[Value] | None = None) -> Value:
    """What a `_MklLayerNorm` computes, with public ops, in float32; not a form that `FuseLayerNorm` takes back."""
    kind = node.output.dtype
    x, gamma, beta = (v if kind == tf.float32 else b.Cast(v, DstT=tf.float32) for v in inputs or node.inputs)
    axis = b.ints(-1)
    mean = b.Mean(x, axis, keep_dims=True)
    centred = b.Sub(x, mean)
    variance = b.Mean(b.Square(centred), axis, keep_dims=True)
    r = b.Rsqrt(b.AddV2(variance, b.const(node.attr("epsilon"), tf.float32)))
    y = b.AddV2(b.Mul(b.Mul(centred, r), gamma), beta)
    return y if kind == tf.float32 else b.Cast(y, DstT=kind)

"""Layer normalisation by the fused kernel over many rows, and with public ops over few."""

from collections.abc import Sequence
from functools import partial

import tensorflow as tf

from tfvllm.graph import dims, onednn_costs
from tfvllm.graph.branches import BySize, as_it_is
from tfvllm.graph.builder import Builder
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.ir import Node, Value
from tfvllm.graph.rewriter import NodePass


class UnfuseSmallLayerNorm(NodePass):
    """layernorm(x, γ, β) -> _MklLayerNorm(x, γ, β) if x has 2¹⁶ elements or more, else (x - μ)·r·γ + β.

    Chosen while rewriting where the size is known, and when the graph runs (`StatelessIf`) where it is not.
    """

    guarantee = Reordered()
    targets = ("onednn",)
    emits = ("_MklLayerNorm",)
    ops = frozenset({"_MklLayerNorm"})

    def begin(self, rewriter):
        return partial(_chosen, BySize(rewriter, "by_rows", onednn_costs.LAYER_NORM_ELEMENTS, None, kept=0))


def _chosen(sizes: BySize, b: Builder, node: Node) -> dict[Value, Value] | None:
    x = node.inputs[0]
    if x.rank is None or not isinstance(x.shape[-1], int):
        return None
    fused, apart = partial(as_it_is, node=node), partial(plain, node=node)
    new = sizes.choose(
        b,
        dims.product(x.shape),
        lambda b: b.Size(x, out_type=tf.int64),
        node.inputs,
        [("layer_norm_fused", fused), ("layer_norm_plain", apart)],
        node.output,
        node.op,
        key=x.shape,
    )
    return None if new is None else {node.output: new}


def plain(b: Builder, values: Sequence[Value], node: Node) -> Value:
    """What a `_MklLayerNorm` computes, with public ops, in float32; not a form that `FuseLayerNorm` takes back."""
    kind = node.output.dtype
    x, gamma, beta = (v if kind == tf.float32 else b.Cast(v, DstT=tf.float32) for v in values)
    axis = b.ints(-1)
    mean = b.Mean(x, axis, keep_dims=True)
    centred = b.Sub(x, mean)
    variance = b.Mean(b.Square(centred), axis, keep_dims=True)
    r = b.Rsqrt(b.AddV2(variance, b.const(node.attr("epsilon"), tf.float32)))
    y = b.AddV2(b.Mul(b.Mul(centred, r), gamma), beta)
    return y if kind == tf.float32 else b.Cast(y, DstT=kind)

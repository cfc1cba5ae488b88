"""Layer normalisation by the fused kernel over many rows, and with public ops over few."""

from typing import Any

import tensorflow as tf
from tensorflow.core.framework import function_pb2

from tfvllm.graph import dims, functions, infer, ops
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.rewriter import Builder, Pass

WORTH = 1 << 16
"""Elements from which the fused kernel is faster.

TensorFlow prepares the kernel and copies γ and β at every call: 130 to 190 µs whatever the size. Nine public ops take
40 to 60 µs for small inputs and draw level at 58,000 elements (width 384) to 65,000 (768), on two AVX-512 cores.
"""


class NormByRows(Pass):
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
                if size >= WORTH:
                    continue
                new = plain(b, node)
            else:
                # In the order of the graph: nothing that decides can follow from what it decides on.
                if x.shape not in many:
                    count = b.Size(x, out_type=tf.int64)
                    many[x.shape] = b.GreaterEqual(count, b.const(WORTH, tf.int64))
                new = _either(rewriter, node, many[x.shape])
            rewriter.fire(self, node)
            graph.replace(node.output, new)
            self.removed(rewriter, node)
            changed = True
        return changed


def plain(b: Builder, node: Node) -> Value:
    """What a `_MklLayerNorm` computes, with public ops, in float32; not a form that `FuseLayerNorm` takes back."""
    kind = node.output.dtype
    x, gamma, beta = (v if kind == tf.float32 else b.Cast(v, DstT=tf.float32) for v in node.inputs)
    axis = b.ints(-1)
    mean = b.Mean(x, axis, keep_dims=True)
    centred = b.Sub(x, mean)
    variance = b.Mean(b.Square(centred), axis, keep_dims=True)
    r = b.Rsqrt(b.AddV2(variance, b.const(node.attr("epsilon"), tf.float32)))
    y = b.AddV2(b.Mul(b.Mul(centred, r), gamma), beta)
    return y if kind == tf.float32 else b.Cast(y, DstT=kind)


def _either(rewriter, node: Node, many: Value) -> Value:
    graph = rewriter.graph
    names = [_function(graph, node, fused) for fused in (True, False)]
    then, otherwise, shapes = ops.AttrValue(), ops.AttrValue(), ops.AttrValue()
    then.func.name, otherwise.func.name = names
    shapes.list.shape.append(tf.TensorShape(infer.static_shape(node.output)).as_proto())
    attrs = {
        "then_branch": then,
        "else_branch": otherwise,
        "Tout": [node.output.dtype],
        "output_shapes": shapes,
        "_lower_using_switch_merge": True,
        ops.COMPUTES: node.op,
    }
    choice = graph.add(f"{node.name}/by_rows", "StatelessIf", [many, *node.inputs], attrs)
    choice.output.shape = node.output.shape
    for name in names:  # there is nothing left to rewrite in them
        rewriter.settled.add((name, str(functions.argument_shapes(choice))))
    return choice.output


def _function(graph: Graph, node: Node, fused: bool) -> str:
    """Adds a branch to the library, one for all norms alike."""
    inner = Graph("norm", library={})
    for name, value in zip(("x", "gamma", "beta"), node.inputs):
        argument = inner.add(name, "Placeholder", [], {"dtype": value.dtype})
        argument.output.shape = value.shape
        inner.inputs[name] = argument.output
    twin = inner.add("y", node.op, list(inner.inputs.values()), {"epsilon": node.attr("epsilon")})
    twin.output.shape = node.output.shape
    inner.outputs["result"] = twin.output if fused else plain(Builder(inner, "y"), twin)
    original = function_pb2.FunctionDef()
    original.signature.name = "layer_norm_fused" if fused else "layer_norm_plain"
    for name in inner.inputs:
        original.signature.input_arg.add(name=name)
    original.signature.output_arg.add(name="result")
    definition = functions.to_definition(inner, original)
    graph.library[definition.signature.name] = definition
    return definition.signature.name

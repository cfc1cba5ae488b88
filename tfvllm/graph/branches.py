"""One of two ways to compute a value, chosen when the graph runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf
from tensorflow.core.framework import function_pb2

from tfvllm.graph import functions, graphdef, ops
from tfvllm.graph.builder import Builder
from tfvllm.graph.ir import Graph, Value
from tfvllm.graph.rewriter import Rewriter

Build = Callable[[Builder, list[Value]], Value]  # makes a branch's nodes from its arguments


def either(
    rewriter: Rewriter,
    name: str,
    condition: Value,
    inputs: Sequence[Value],
    branches: Sequence[tuple[str, Build]],
    like: Value,
    computes: str,
) -> Value:
    """A `StatelessIf` on `condition` (bool[]) over two branches: the first where it holds.

    TensorFlow lowers it to a switch and a merge, so that its own passes see what is inside.

    Args:
        name: of the node.
        branches: (name, what makes it) of each. Branches of one content and name are one function of the library.
        like: a value of the result's type and shape.
        computes: the op that costs are counted as.
    """
    graph = rewriter.graph
    names = [_function(graph, part, inputs, build, like) for part, build in branches]
    then, otherwise, shapes = ops.AttrValue(), ops.AttrValue(), ops.AttrValue()
    then.func.name, otherwise.func.name = names
    shapes.list.shape.append(tf.TensorShape(graphdef.static_shape(like)).as_proto())
    attrs = {
        "then_branch": then,
        "else_branch": otherwise,
        "Tout": [like.dtype],
        "output_shapes": shapes,
        "_lower_using_switch_merge": True,
        ops.COMPUTES: computes,
    }
    choice = graph.add(name, "StatelessIf", [condition, *inputs], attrs)
    choice.output.shape = like.shape
    for part in names:  # there is nothing left to rewrite in them
        rewriter.settled.add((part, str(functions.argument_shapes(choice))))
    return choice.output


def _function(graph: Graph, name: str, inputs: Sequence[Value], build: Build, like: Value) -> str:
    """Adds a branch to the library; returns the name it got there."""
    inner = Graph(name, library={})
    original = function_pb2.FunctionDef()
    original.signature.name = name
    for number, value in enumerate(inputs):
        argument = inner.add(f"x{number}", "Placeholder", [], {"dtype": value.dtype})
        argument.output.shape = value.shape
        inner.inputs[argument.name] = argument.output
        original.signature.input_arg.add(name=argument.name)
    result = build(Builder(inner, "y"), list(inner.inputs.values()))
    result.shape = like.shape
    inner.outputs["result"] = result
    original.signature.output_arg.add(name="result")
    definition = functions.to_definition(inner, original)
    graph.library[definition.signature.name] = definition
    return definition.signature.name

"""One of two ways to compute a value, chosen when the graph runs or, where what decides is known, now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import function_pb2

from tfvllm.graph import functions, graphdef, ops
from tfvllm.graph.builder import Builder
from tfvllm.graph.ir import Graph, Node, Value
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


def as_it_is(b: Builder, values: list[Value], node: Node) -> Value:
    """A branch that computes what `node` does, of `values`."""
    return b.op(node.op, values, **node.own_attrs())[0]


class BySize:
    """Chooses between two ways to compute a value by a size: now where it is known, else when the graph runs.

    One for each run of a rule, which goes through the nodes in the order of the graph. What decides is made once for
    each size, at the first node of it: so nothing that decides can follow from what it decides on.

    Args:
        suffix: ends the names of the choices.
        low, high: from and up to which sizes the first way is taken; None for no bound.
        kept: which way, 0 or 1, the graph has: where that one is known to be taken there is nothing to do.
    """

    def __init__(self, rewriter: Rewriter, suffix: str, low: int | None, high: int | None, kept: int = 1):
        self.rewriter, self.suffix, self.kept = rewriter, suffix, kept
        self.low, self.high = low, high
        self._conditions: dict[Any, Value] = {}

    def choose(
        self,
        b: Builder,
        size: Any,
        count: Callable[[Builder], Value],
        inputs: Sequence[Value],
        ways: Sequence[tuple[str, Build]],
        like: Value,
        computes: str,
        *,
        key: Any = None,
        unit: int = 1,
    ) -> Value | None:
        """The value computed one way, or by whichever `either` takes; None where it stays as it is.

        Args:
            size: an int or a `Dim`.
            count: makes the size, int32[] or int64[], when the graph runs.
            inputs, ways, like, computes: see `either`.
            key: what has one size, by which it is counted once; `size` itself if None.
            unit: what one of `size` is in `count`.
        """
        if isinstance(size, int):
            within = (self.low is None or self.low <= size) and (self.high is None or size < self.high)
            taken = 0 if within else 1
            return None if taken == self.kept else ways[taken][1](b, list(inputs))
        key = size if key is None else key
        if key not in self._conditions:
            self._conditions[key] = self._within(b, count(b), unit)
        return either(self.rewriter, f"{b.scope}/{self.suffix}", self._conditions[key], inputs, ways, like, computes)

    def _within(self, b: Builder, count: Value, unit: int) -> Value:
        bounds = []
        if self.low is not None:
            bounds.append(b.GreaterEqual(count, b.const(self.low * unit, count.dtype)))
        if self.high is not None:
            bounds.append(b.Less(count, b.const(self.high * unit, count.dtype)))
        return bounds[0] if len(bounds) == 1 else b.LogicalAnd(*bounds)


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

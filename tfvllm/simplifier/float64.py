"""A graph computed in float64: the reference that says how exact float32 is."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.graph import effects, functions, ops
from tfvllm.graph.ir import Graph, Node, Value


def widened(specs: Any) -> Any:
    """Specs of arguments with float32 as float64."""

    def widen(spec):
        if isinstance(spec, tf.TensorSpec) and spec.dtype == tf.float32:
            return tf.TensorSpec(spec.shape, tf.float64, spec.name)
        if isinstance(spec, tf.SparseTensorSpec) and spec.dtype == tf.float32:
            return tf.SparseTensorSpec(spec.shape, tf.float64)
        if isinstance(spec, tf.RaggedTensorSpec) and spec.dtype == tf.float32:
            return tf.RaggedTensorSpec(spec.shape, tf.float64, spec.ragged_rank, spec.row_splits_dtype)
        return spec

    return tf.nest.map_structure(widen, specs)


def to_float64(graph: Graph) -> Graph:
    """The same graph computed in float64: float32 constants, arguments and weights are widened, and every op's type."""
    wide = graph.copy()
    settled = _widen_weights(wide)
    for node in list(wide.nodes.values()):
        if any(a.WhichOneof("value") == "func" or a.list.func for a in node.attrs.values()):
            _widen_functions(wide, node)
        if node in settled:
            continue
        for key, attr in list(node.attrs.items()):
            if attr.WhichOneof("value") == "type" and attr.type == tf.float32.as_datatype_enum:
                node.attrs[key] = ops.python_to_attr(tf.float64, "type")
            elif attr.WhichOneof("value") == "list" and tf.float32.as_datatype_enum in attr.list.type:
                types = [tf.float64 if t == tf.float32.as_datatype_enum else t for t in attr.list.type]
                node.attrs[key] = ops.python_to_attr(types, "list(type)")
        if node.op == "Const" and node.output.dtype == tf.float32:
            node.attrs["value"] = ops.python_to_attr(node.attr("value").astype(np.float64), "tensor")
        for value in node.outputs:
            if value.dtype == tf.float32:
                value.dtype = tf.float64
    return wide


def _widen_weights(wide: Graph) -> set[Node]:
    """Puts casts around what must stay in float32: reads of weights, all that touches variables and tables, draws.

    Returns the nodes that stay as they are, and the casts. Each use of a weight has a cast of its own, which waits for
    its turn: all weights widened at once would be twice the model beside it. Of a table that is looked up in, only the
    rows found are widened. Random ops give other numbers in float64, so they stay too.
    """
    fixed = [n for n in wide.nodes.values() if _stays(n)]
    settled: set[Node] = set(fixed)
    for node in fixed:
        for weight in [v for v in node.outputs if v.dtype == tf.float32]:
            found = [r for r, position in weight.uses if r.op == "GatherV2" and position == 0]
            settled.update(found)
            for value in (weight, *(r.output for r in found)):
                uses = [use for use in value.uses if use[0] not in settled]
                for reader, position in uses:
                    cast = _cast(wide, value, f"{value.node.name}/wide", tf.float32, tf.float64)
                    wide.set_input(reader, position, cast.output)
                    if value is weight and wide.is_weight(weight):
                        _delay(wide, cast)
                    settled.add(cast)
                for key in [k for k, v in wide.outputs.items() if v is value]:
                    cast = _cast(wide, value, f"{value.node.name}/wide", tf.float32, tf.float64)
                    wide.outputs[key] = cast.output
                    settled.add(cast)
    for node in fixed:
        for position, value in enumerate(node.inputs):
            if value.dtype == tf.float32 and value.node not in settled:
                cast = _cast(wide, value, f"{node.name}/narrow", tf.float64, tf.float32)
                wide.set_input(node, position, cast.output)
                settled.add(cast)
    return settled


def _stays(node: Node) -> bool:
    if node.op in functions.CONTROL_FLOW or node.op.startswith(("TensorArray", "Stack")):
        return False
    touches = any(v.dtype == tf.resource for v in node.inputs)
    return touches or node.op.startswith("Stateless") or effects.is_seedable(node.op)


def _cast(wide: Graph, value: Value, name: str, source: tf.DType, destination: tf.DType) -> Node:
    return wide.add(name, "Cast", [value], {"SrcT": source, "DstT": destination})


def _widen_functions(wide: Graph, node: Node) -> None:
    """Widens the bodies of a loop or the branches of a choice; other functions cannot be widened."""
    if node.op not in functions.CONTROL_FLOW:
        raise ValueError(f"{node.op} calls a function in float32")
    shapes = functions.argument_shapes(node)
    for key in functions.CONTROL_FLOW[node.op]:
        renamed = {}
        for name in functions.names_in(node, key):
            inner = to_float64(functions.from_definition(wide, name, shapes))
            definition = functions.to_definition(inner, wide.library[name])
            wide.library.update(inner.library)
            wide.library[definition.signature.name] = definition
            renamed[name] = definition.signature.name
        functions.rename(node, key, renamed)


def _delay(graph: Graph, cast: Node) -> None:
    """Lets a weight be widened only when the other operand of what it goes into is there."""
    reader = graph.single_use(cast.output)
    while reader is not None and len(reader.outputs) == 1 and graph.is_static(reader.output):
        reader = graph.single_use(reader.output)
    if reader is not None:
        others = (v.node for v in reader.inputs if not graph.is_static(v))
        cast.controls = [n for n in others if n.op != "Placeholder"][:1]  # arguments are there from the start

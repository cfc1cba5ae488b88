"""Functions of the library (bodies and conditions of loops, branches) to `Graph` and back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import function_pb2, node_def_pb2

from tfvllm.graph import graphdef, infer, ops
from tfvllm.graph.importer import Imported, Importer
from tfvllm.graph.ir import Graph, Node, Value

# Op -> the attributes that name its functions.
CONTROL_FLOW = {
    "While": ("cond", "body"),
    "StatelessWhile": ("cond", "body"),
    "If": ("then_branch", "else_branch"),
    "StatelessIf": ("then_branch", "else_branch"),
    "Case": ("branches",),
    "StatelessCase": ("branches",),
}


def argument_shapes(node: Node) -> list[tf.TensorShape]:
    """What is known of the shapes of the arguments of a control flow node's functions."""
    if "While" in node.op:  # what holds for every turn, not for the first alone
        proto = node.attrs["output_shapes"].list.shape if "output_shapes" in node.attrs else []
        shapes = [tf.TensorShape(s) for s in proto]
        return shapes if len(shapes) == len(node.inputs) else [tf.TensorShape(None)] * len(node.inputs)
    return [tf.TensorShape(graphdef.static_shape(v)) for v in node.inputs[1:]]


def from_definition(graph: Graph, name: str, shapes: Sequence[tf.TensorShape]) -> Graph:
    """The function `name` of a graph's library as a `Graph`; its arguments are the inputs, by name."""
    definition = graph.library[name]
    inner = Graph(name, library=dict(graph.library))
    importer = Importer(inner)
    scope: dict[str, Any] = {}
    known = {}
    for arg, shape in zip(definition.signature.input_arg, shapes, strict=True):
        node = inner.add(arg.name, "Placeholder", [], {"dtype": tf.as_dtype(arg.type)})
        scope[arg.name] = Imported(node.outputs)
        inner.inputs[arg.name] = node.output
        known[node.name] = shape
    importer.run(definition.node_def, "", "function", scope)
    for arg in definition.signature.output_arg:
        inner.outputs[arg.name] = importer.value(definition.ret[arg.name], scope)
    infer.infer_graph(inner, known)
    return inner


def to_definition(inner: Graph, original: function_pb2.FunctionDef) -> function_pb2.FunctionDef:
    """A `Graph` as a function with the arguments and results of `original`, under a name of its own."""
    definition = function_pb2.FunctionDef()
    definition.signature.CopyFrom(original.signature)
    del definition.signature.control_output[:]
    for arg in definition.signature.input_arg:
        arg.type = inner.inputs[arg.name].dtype.as_datatype_enum
    for arg in definition.signature.output_arg:
        arg.type = inner.outputs[arg.name].dtype.as_datatype_enum
    for key, attr in original.attr.items():
        definition.attr[key].CopyFrom(attr)
    for index, arg_attr in original.arg_attr.items():
        definition.arg_attr[index].CopyFrom(arg_attr)
    for index, identity in original.resource_arg_unique_id.items():
        definition.resource_arg_unique_id[index] = identity
    arguments = {v.node for v in inner.inputs.values()}
    live = [n for n in inner.live() if n not in arguments]
    for node in live:
        definition.node_def.append(_node_def(node, arguments))
    for name, value in inner.outputs.items():
        definition.ret[name] = _reference(value, arguments)
    for node in inner.effects:
        definition.signature.control_output.append(node.name)
        definition.control_ret[node.name] = node.name
    digest = hashlib.sha256(definition.SerializeToString(deterministic=True)).hexdigest()[:12]
    definition.signature.name = f"{original.signature.name}_{digest}"
    return definition


def names_in(node: Node, key: str) -> list[str]:
    """The functions that an attribute names."""
    attr = node.attrs[key]
    return [f.name for f in attr.list.func] or [attr.func.name]


def rename(node: Node, key: str, names: dict[str, str]) -> None:
    """Lets an attribute name other functions."""
    attr = type(node.attrs[key])()
    attr.CopyFrom(node.attrs[key])
    for func in [*attr.list.func, *([attr.func] if attr.HasField("func") else [])]:
        func.name = names.get(func.name, func.name)
    node.attrs[key] = attr


def _node_def(node: Node, arguments: set[Node]) -> node_def_pb2.NodeDef:
    node_def = node_def_pb2.NodeDef(name=node.name, op=node.op)
    node_def.input.extend(_reference(v, arguments) for v in node.inputs)
    node_def.input.extend("^" + c.name for c in node.controls)
    for key, attr in node.attrs.items():
        node_def.attr[key].CopyFrom(attr)
    return node_def


def _reference(value: Value, arguments: set[Node]) -> str:
    """`node:output_arg:index`, as tensors are named inside a FunctionDef; an argument by its own name."""
    node = value.node
    if node in arguments:
        return node.name
    starts = ops.output_ranges(node.op, node.attrs)
    name, start = max(((n, s) for n, s in starts.items() if s <= value.index), key=lambda item: item[1])
    return f"{node.name}:{name}:{value.index - start}"

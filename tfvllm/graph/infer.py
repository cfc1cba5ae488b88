"""Shapes and small integer contents of every value, with symbolic unknown sizes.

Two sources are joined: TensorFlow's own shape functions give ranks and known sizes for every op there is; the rules
below follow unknown sizes symbolically (`[batch, seq, 64]` reshaped to `[batch*seq, 64]`), which TensorFlow does not
show. A value's `content` is what an integer scalar (a size) or vector (a tuple of sizes) holds, where it follows from
shapes and constants: it is how a `Reshape` to `Pack(Shape(x)[0], 12, 64)` is understood.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import graph_pb2

from tfvllm.graph import dims, graphdef
from tfvllm.graph.graphdef import static_shape
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.known_values import content_of
from tfvllm.graph.ops import INTEGERS
from tfvllm.graph.shape_rules import SHAPES


def infer_graph(graph: Graph, arguments: dict[str, tf.TensorShape] | None = None) -> None:
    """Sets `shape` and `content` of every value. `arguments`: node name -> static shape of the graph's inputs."""
    arguments = arguments or {}
    static = _tensorflow_shapes(graph, arguments)
    for node in graph.order():
        for value in node.outputs:
            value.shape = None if node.op != "Placeholder" or value.shape is None else value.shape
        known = static.get(node.name)
        if node.op == "Placeholder" and node.name in arguments:
            known = [arguments[node.name]]
        infer_node(graph, node, known)


def infer_node(graph: Graph, node: Node, static: Sequence[tf.TensorShape] | None = None) -> None:
    """Sets `shape` and `content` of one node's outputs from its inputs."""
    shapes: Sequence[tuple | None] = [None] * len(node.outputs)
    rule = SHAPES.get(node.op)
    if rule is not None:
        try:
            inferred = rule(node)
        except (IndexError, ValueError, TypeError, KeyError):
            inferred = None
        if inferred is not None:
            shapes = inferred if isinstance(inferred, list) else [inferred]
    if node.op in ("ReadVariableOp", "ResourceGather"):
        capture = graph.captures.get(node.inputs[0].node.name)
        owner = capture.owner if capture is not None else None
        if isinstance(owner, tf.Variable) and owner.shape.rank is not None:
            sizes = tuple(dims.fresh("variable") if d is None else d for d in owner.shape.as_list())
            if node.op == "ReadVariableOp":
                shapes = [sizes]
            elif node.inputs[1].shape is not None and not node.attr("batch_dims"):
                shapes = [(*node.inputs[1].shape, *sizes[1:])]
    if static is None and any(s is None for s in shapes):
        static = _one_node(node)
    for value, shape in zip(node.outputs, shapes):
        known = static[value.index] if static is not None and value.index < len(static) else None
        value.shape = _join(shape, known, f"{node.name}:{value.index}")
    for value in node.outputs[:1]:
        value.known_value = content_of(node) if value.dtype in INTEGERS else None


def _join(shape: tuple | None, known: tf.TensorShape | None, name: str) -> tuple | None:
    if known is None or known.rank is None:
        return shape
    sizes = known.as_list()
    if shape is None or len(shape) != len(sizes):
        return tuple(dims.symbol(f"{name}:{i}") if d is None else d for i, d in enumerate(sizes))
    return tuple(s if d is None else d for s, d in zip(shape, sizes))


# ------------------------------------------------------------------------------------------ TensorFlow's own inference


def _tensorflow_shapes(graph: Graph, arguments: dict[str, tf.TensorShape]) -> dict[str, list[tf.TensorShape]]:
    graph_def = graphdef.to_graph_def(graph)
    for node_def in graph_def.node:
        if node_def.op == "Placeholder":
            shape = arguments.get(node_def.name)
            node_def.attr["shape"].shape.CopyFrom((shape if shape is not None else tf.TensorShape(None)).as_proto())
    scratch = tf.Graph()
    with scratch.as_default():
        tf.graph_util.import_graph_def(graph_def, name="")
    return {op.name: [t.shape for t in op.outputs] for op in scratch.get_operations()}


def _one_node(node: Node) -> list[tf.TensorShape]:
    """TensorFlow's shape function for one node, given what is known of its inputs."""
    graph_def = graph_pb2.GraphDef()
    scratch = tf.Graph()
    with scratch.as_default():
        mapping: dict[str, Any] = {}
        node_def = graph_def.node.add(name="node", op=node.op)
        for i, value in enumerate(node.inputs):
            node_def.input.append(f"i{i}")
            graph_def.node.add(name=f"i{i}", op="Placeholder").attr["dtype"].type = value.dtype.as_datatype_enum
            content = _known_value(value)
            if value.node.op == "Const" and value.dtype in INTEGERS:
                tensor = tf.constant(value.node.attr("value"), value.dtype)
            elif content is not None:
                tensor = tf.constant(content, value.dtype)
            else:
                tensor = tf.compat.v1.placeholder(value.dtype, static_shape(value))
            mapping[f"i{i}:0"] = tensor
        for key, attr in node.attrs.items():
            if attr.WhichOneof("value") == "func" or attr.list.func:
                return [tf.TensorShape(None)] * len(node.outputs)
            node_def.attr[key].CopyFrom(attr)
        try:
            tf.graph_util.import_graph_def(graph_def, input_map=mapping, name="x")
        except ValueError:
            return [tf.TensorShape(None)] * len(node.outputs)
        return [t.shape for t in scratch.get_operation_by_name("x/node").outputs]


def _known_value(value: Value) -> Any:
    content = value.known_value
    if isinstance(content, int):
        return content
    if isinstance(content, tuple) and all(isinstance(c, int) for c in content):
        return list(content)
    return None

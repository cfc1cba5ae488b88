"""A graph as a GraphDef."""

from __future__ import annotations

from collections.abc import Iterable

import tensorflow as tf
from tensorflow.core.framework import graph_pb2, node_def_pb2

from tfvllm.graph.ir import Graph, Node, Value


def to_graph_def(graph: Graph, rename: dict[str, str] | None = None, skip: Iterable[str] = ()) -> graph_pb2.GraphDef:
    """The live nodes as a GraphDef; `skip` names nodes that the importer supplies (arguments, captures)."""
    rename, skip = rename or {}, set(skip)
    graph_def = graph_pb2.GraphDef()
    used: set[str] = set()
    for node in graph.live():
        if node.name in skip:
            continue
        graph_def.node.append(to_node_def(node, rename))
        for attr in node.attrs.values():
            used.update(f.name for f in [attr.func, *attr.list.func] if f.name)
        if node.op in graph.library:
            used.add(node.op)
    pending = list(used)
    seen: set[str] = set()
    while pending:  # the library: only what is still called
        name = pending.pop()
        if name in seen or name not in graph.library:
            continue
        seen.add(name)
        definition = graph.library[name]
        graph_def.library.function.append(definition)
        for node_def in definition.node_def:
            pending.append(node_def.op)
            for attr in node_def.attr.values():
                pending.extend(f.name for f in [attr.func, *attr.list.func] if f.name)
    graph_def.versions.producer = tf.version.GRAPH_DEF_VERSION
    return graph_def


def to_node_def(node: Node, rename: dict[str, str]) -> node_def_pb2.NodeDef:
    node_def = node_def_pb2.NodeDef(name=rename.get(node.name, node.name), op=node.op)
    for value in node.inputs:
        name = rename.get(value.node.name, value.node.name)
        node_def.input.append(name if value.index == 0 else f"{name}:{value.index}")
    for control in node.controls:
        node_def.input.append("^" + rename.get(control.name, control.name))
    for key, attr in node.attrs.items():
        node_def.attr[key].CopyFrom(attr)
    return node_def


def static_shape(value: Value) -> list[int | None] | None:
    """A shape as TensorFlow states it: unknown sizes as None."""
    if value.shape is None:
        return None
    return [d if isinstance(d, int) and d >= 0 else None for d in value.shape]

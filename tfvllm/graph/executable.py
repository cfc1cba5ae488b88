"""A graph as something that TensorFlow runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import graph_pb2
from tensorflow.python.eager import context

from tfvllm.graph import graphdef
from tfvllm.graph.graphdef import to_graph_def, to_node_def
from tfvllm.graph.ir import Graph, Node, Value


def fingerprint(graph: Graph) -> tuple:
    """Equal for graphs that are the same node by node: same names, inputs, outputs, variables and tables."""
    live = {n.name for n in graph.live()}
    return (
        to_graph_def(graph).SerializeToString(deterministic=True),
        tuple((name, id(c.tensor)) for name, c in sorted(graph.captures.items()) if name in live),
        tuple((key, v.name, str(graphdef.static_shape(v))) for key, v in graph.inputs.items()),
        tuple((key, v.name) for key, v in graph.outputs.items()),
    )


def to_concrete(graph: Graph, specs: tuple[tuple, dict], pack: Callable[[list], Any] | None = None) -> Any:
    """A `ConcreteFunction` that computes `graph`.

    Args:
        specs: (args, kwargs) of `tf.TensorSpec`s, nested as the caller passes tensors; flattened they are, in order,
            the graph's inputs.
        pack: makes the structured result from the flat list of results; a dict by output name if None.
    """
    args, kwargs = specs
    names = list(graph.inputs)

    def call(*args, **kwargs):
        tensors = [t for t in tf.nest.flatten((args, kwargs), expand_composites=True) if isinstance(t, tf.Tensor)]
        here = tf.compat.v1.get_default_graph()
        supplied = dict(zip(names, tensors, strict=True))
        live = {n.name for n in graph.live()}
        for name, capture in graph.captures.items():
            if name in live:
                supplied[name] = here.capture(capture.tensor)
        taken = {operation.name for operation in here.get_operations()}
        rename = {}
        for name in live - set(supplied):
            candidate, n = name, 0
            while candidate in taken:
                n += 1
                candidate = f"{name}__{n}"
            rename[name] = candidate
            taken.add(candidate)
        graph_def = to_graph_def(graph, rename, skip=supplied)
        for definition in graph_def.library.function:  # importing makes them known to the graph alone
            # Also where it is known: TensorFlow counts, and the original that made it known may be collected.
            context.context().add_function_def(definition)
        used = {i.split(":")[0] for n in graph_def.node for i in n.input}
        values = list(graph.outputs.values())
        fetched = [v for v in values if v.node.name not in supplied]
        effective = [n for n in graph.effects if n.name in live]
        elements = (
            tf.graph_util.import_graph_def(
                graph_def,
                input_map={f"{name}:0": t for name, t in supplied.items() if name in used},
                return_elements=[f"{rename[v.node.name]}:{v.index}" for v in fetched]
                + [rename[n.name] for n in effective],
                name="",
            )
            or []
        )
        results = iter(elements)
        tensors_out = [supplied[v.node.name] if v.node.name in supplied else next(results) for v in values]
        for value, tensor in zip(values, tensors_out):
            if tensor.shape.rank is None or not tensor.shape.is_fully_defined():
                known = graphdef.static_shape(value)
                if known is not None:
                    tensor.set_shape(known)
        with tf.control_dependencies(list(results)):
            tensors_out = [tf.identity(t, name=key) for key, t in zip(graph.outputs, tensors_out)]
        if pack is not None:
            return pack(tensors_out)
        return dict(zip(graph.outputs, tensors_out))

    return tf.function(call, autograph=False).get_concrete_function(*args, **kwargs)


def evaluate(graph: Graph, values: list[Value], given: dict[Value, np.ndarray]) -> list[np.ndarray]:
    """Computes `values`, which must depend on nothing but constants and `given`, with TensorFlow's own kernels."""
    if not values:
        return []
    stop = {v.node for v in given}
    todo: dict[Node, None] = {}
    stack = [v.node for v in values]
    while stack:
        node = stack.pop()
        if node not in todo and node not in stop:
            todo[node] = None
            stack.extend(v.node for v in node.inputs)
    graph_def = graph_pb2.GraphDef()
    graph_def.node.extend(to_node_def(n, {}) for n in todo)
    graph_def.versions.producer = tf.version.GRAPH_DEF_VERSION
    keys = list(given)

    def call(*tensors):
        used = {i for n in graph_def.node for i in n.input}
        names = {k: k.node.name if k.index == 0 else f"{k.node.name}:{k.index}" for k in keys}
        mapping = {f"{k.node.name}:{k.index}": t for k, t in zip(keys, tensors) if names[k] in used}
        return tf.graph_util.import_graph_def(
            graph_def, input_map=mapping, return_elements=[f"{v.node.name}:{v.index}" for v in values], name=""
        )

    specs = [tf.TensorSpec(np.shape(given[k]), k.dtype) for k in keys]
    function = tf.function(call, autograph=False).get_concrete_function(*specs)
    results = function(*(tf.convert_to_tensor(given[k], k.dtype) for k in keys))
    return [r.numpy() for r in results]

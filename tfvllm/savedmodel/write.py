"""Saving signatures as a SavedModel: shared by every task."""

import collections
import os
from collections.abc import Iterable, Mapping, Set
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import function_pb2
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow.python.trackable.resource import TrackableResource

from tfvllm.savedmodel.protos import read_proto, set_method_names, write_proto

PREDICT = "tensorflow/serving/predict"
CLASSIFY = "tensorflow/serving/classify"
REGRESS = "tensorflow/serving/regress"


def weights_module(model, *holders: Any) -> tf.Module:
    """A bare `tf.Module` that owns what `model`'s graph reads: its variables, and the tables and tokenizer models of
    its layers and of `holders` (a tokenizer, a preprocessor).

    Saving this instead of the Keras model keeps the SavedModel free of Keras objects.
    """
    module = tf.Module(name="tfvllm")
    module.weights = [variable.value for variable in getattr(model, "variables", ())]
    module.resources = resources(model, *holders)
    return module


def resources(*holders: Any) -> list[TrackableResource]:
    """The lookup tables and tokenizer models held, directly or through attributes, by `holders`."""
    found: list[TrackableResource] = []
    seen: set[int] = set()
    waiting: list[Any] = list(holders)
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, TrackableResource):
            found.append(value)
        elif isinstance(value, Mapping):
            waiting.extend(value.values() if len(value) <= 4096 else ())  # layers, not vocabularies
        elif isinstance(value, list | tuple | set):
            waiting.extend(value if len(value) <= 4096 else ())
        elif type(value).__module__.split(".")[0] in _LOOK_INSIDE or isinstance(value, tf.Module):
            waiting.extend(getattr(value, "__dict__", {}).values())
    return found


_LOOK_INSIDE = {"keras", "keras_hub", "keras_nlp", "tensorflow_text"}


def save(
    module: tf.Module,
    signatures: Mapping[str, Any],
    directory: str | os.PathLike,
    method_names: Mapping[str, str] | None = None,
) -> None:
    """Writes `signatures` and what `module` tracks as a SavedModel in `directory`.

    `signatures`: name to tf.function with an input signature, or ConcreteFunction.
    Defaults of a tf.function's arguments become the signature's defaults; a ConcreteFunction has lost them.
    `method_names` sets the method name of some signatures, e.g. `{"classify": CLASSIFY}`: TensorFlow itself always
    writes the predict method, with which TF Serving refuses a Classify request.
    """
    options = tf.saved_model.SaveOptions(save_debug_info=False)
    tf.saved_model.save(module, str(directory), signatures=dict(signatures), options=options)
    proto = read_proto(directory)
    for graph in proto.meta_graphs:
        named = named_from_outside(graph)
        for function in graph.graph_def.library.function:
            merge_repeats(function, named[function.signature.name])
    write_proto(directory, proto)
    if method_names:
        set_method_names(directory, method_names)


# Constants and arithmetic on shapes: cheap, stateless, and never written to in place.
_SHAPE_OPS = frozenset({"Const", "Shape", "Size", "StridedSlice", "Pack"})


def named_from_outside(graph: meta_graph_pb2.MetaGraphDef) -> Mapping[str, Set[str]]:
    """For each function of a saved graph, the nodes that the object graph refers to by name.

    A stored custom gradient (`tf.nn.silu` has one) reads tensors of the function it belongs to; TensorFlow looks them
    up there when it loads the SavedModel. All else refers to functions, their arguments, or nodes outside of them.
    """
    named: dict[str, set[str]] = collections.defaultdict(set)
    for node in graph.object_graph_def.nodes:
        if node.HasField("captured_tensor"):
            named[node.captured_tensor.concrete_function].add(node.captured_tensor.name.split(":")[0])
    return named


def merge_repeats(function: function_pb2.FunctionDef, keep: Set[str] = frozenset()) -> None:
    """Leaves one of several constants and shape computations that are the same, and none that nothing reads.

    The nodes named in `keep` stay, whatever reads them.

    TensorFlow does this itself before it runs a function. But it loads every node first, and tracing leaves many
    as such repeats (9,140 of the 15,087 nodes of a GPT-2 with 12 layers), and loading takes time for each.
    """
    classes = [name for node in function.node_def if "_class" in node.attr for name in node.attr["_class"].list.s]
    held = {name.decode().removeprefix("loc:@") for name in classes}  # other nodes want to be where these are
    held |= keep

    def node_of(tensor: str) -> str:
        return tensor.removeprefix("^").split(":")[0]

    while True:
        first: dict[tuple, str] = {}
        same: dict[str, str] = {}
        for node in function.node_def:
            if node.op in _SHAPE_OPS and node.name not in held and not any(i.startswith("^") for i in node.input):
                attrs = tuple((k, node.attr[k].SerializeToString(deterministic=True)) for k in sorted(node.attr))
                found = first.setdefault((node.op, node.device, tuple(node.input), attrs), node.name)
                if found != node.name:
                    same[node.name] = found

        def renamed(tensor: str, same: dict[str, str] = same) -> str:
            name = node_of(tensor)
            return tensor.replace(name, same[name], 1) if name in same else tensor

        for node in function.node_def:
            node.input[:] = [renamed(tensor) for tensor in node.input]
        for results in (function.ret, function.control_ret):
            for key, tensor in results.items():
                results[key] = renamed(tensor)
        read = {node_of(tensor) for node in function.node_def for tensor in node.input}
        read |= {node_of(tensor) for results in (function.ret, function.control_ret) for tensor in results.values()}
        kept = [n for n in function.node_def if n.op not in _SHAPE_OPS or n.name in read or n.name in held]
        if len(kept) == len(function.node_def):
            return
        del function.node_def[:]
        function.node_def.extend(kept)


def signature_summary(directory: str | os.PathLike, names: Iterable[str] | None = None) -> dict[str, dict]:
    """JSON-able signatures of a SavedModel: method, inputs and outputs with dtype and shape (None for unknown)."""
    graph = read_proto(directory).meta_graphs[0]
    wanted = set(graph.signature_def) - {"__saved_model_init_op"} if names is None else set(names)
    return {
        name: {
            "method": signature.method_name,
            "inputs": {key: _spec(info) for key, info in sorted(signature.inputs.items())},
            "outputs": {key: _spec(info) for key, info in sorted(signature.outputs.items())},
        }
        for name, signature in sorted(graph.signature_def.items())
        if name in wanted
    }


def _spec(info) -> dict:
    shape = None
    if not info.tensor_shape.unknown_rank:
        shape = [None if dim.size < 0 else dim.size for dim in info.tensor_shape.dim]
    return {"dtype": tf.as_dtype(info.dtype).name, "shape": shape}

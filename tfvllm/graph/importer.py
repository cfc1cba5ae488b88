"""TensorFlow functions as a `Graph`; the way back is `executable`, SavedModels are `loading`.

Everything goes through what TensorFlow itself offers for it: a function's GraphDef is read, calls are inlined, and the
rewritten graph is imported into a new `tf.function`, whose captures are the variables and tables that it still needs.
`tf.saved_model.save` then writes the object graph, the checkpoint, the assets and the initialisers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

from tfvllm.errors import InputError
from tfvllm.graph import effects, infer, ops
from tfvllm.graph.ir import Capture, Graph, Node, Value

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_V1_LOOPS = frozenset({"Enter", "RefEnter", "NextIteration", "Exit", "Switch", "Merge", "LoopCond"})
_REFERENCE_VARIABLES = frozenset({"Variable", "VariableV2"})
_SMALL_CAPTURE = 1024  # captured plain tensors of at most this many elements become constants


# --------------------------------------------------------------------------------------------------- function -> Graph


def from_concrete(function: Any, owners: dict[int, Any] | None = None, name: str = "graph") -> Graph:
    """A `ConcreteFunction` as a flat `Graph`, shapes inferred.

    Args:
        function: a `tf.types.experimental.ConcreteFunction`.
        owners: resource handle id -> the trackable that owns it (see `owners_of`); the function's own variables are
            known without.
    """
    owners = {**owners_of(function.variables), **(owners or {})}
    func_graph = function.graph
    graph = Graph(name)
    graph_def = func_graph.as_graph_def()
    for definition in graph_def.library.function:
        graph.library[definition.signature.name] = definition
    importer = Importer(graph)

    captured = func_graph.captures
    inner_names = {inner.op.name for _, inner in captured}
    arguments = [t for t in func_graph.inputs if t.op.name not in inner_names]
    for tensor in arguments:
        value = importer.placeholder(tensor.op.name, tensor.dtype)
        graph.inputs[tensor.op.name] = value
    for outer, inner in captured:
        importer.capture(inner.op.name, outer, owners)

    importer.run(graph_def.node, prefix="", style="graph")
    results = func_graph.outputs
    for position, tensor in enumerate(results):
        graph.outputs[f"output_{position}"] = importer.value(tensor.name, importer.scope)
    _freeze(graph)
    infer.infer_graph(graph, {t.op.name: t.shape for t in arguments})
    _transposes_of_floats(graph)
    return graph


def owners_of(trackables: Iterable[Any]) -> dict[int, Any]:
    """Resource handle id -> the trackable that owns it."""
    owners = {}
    for item in trackables:
        # Tables and tokenizers have a resource_handle. Keras variables have the handle of the tf.Variable inside.
        handle = item.handle if isinstance(item, tf.Variable) else getattr(item, "resource_handle", None)
        if isinstance(handle, tf.Tensor):
            owners[id(handle)] = item
    return owners


class Importer:
    """Adds NodeDefs to a `Graph`, inlining calls, keeping only the control edges that order effects."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.scope: dict[str, Any] = {}
        self.ordered: dict[Node, None] = {}  # effects, and reads of what may be written
        self.waits: dict[Node, dict[Node, None]] = {}  # what a node without an effect waits for, and what reads it too

    def placeholder(self, name: str, dtype: tf.DType) -> Value:
        node = self.graph.add(name, "Placeholder", [], {"dtype": dtype})
        self.scope[name] = Imported(node.outputs)
        return node.output

    def capture(self, name: str, outer: Any, owners: dict[int, Any]) -> None:
        if outer.dtype in (tf.resource, tf.variant):
            value = self.placeholder(name, outer.dtype)
            value.shape = ()
            owner = owners.get(id(outer))
            self.graph.captures[value.node.name] = Capture(outer, owner, frozen=isinstance(owner, tf.Variable))
            return
        array = np.asarray(outer.numpy(), outer.dtype.as_numpy_dtype)  # of a string scalar, bytes
        if array.size <= _SMALL_CAPTURE or array.dtype == object:
            node = self.graph.add(name, "Const", [], {"dtype": outer.dtype, "value": array})
        else:
            node = self.graph.weight(name, array, outer.dtype).node
        self.scope[name] = Imported(node.outputs)

    def value(self, reference: str, scope: dict[str, Any]) -> Value:
        name, *rest = reference.split(":")
        imported = scope[name]
        if len(rest) == 2:  # FunctionDef: node:output_arg:index
            return imported.values[imported.ranges[rest[0]] + int(rest[1])]
        return imported.values[int(rest[0]) if rest else 0]

    def run(
        self, node_defs, prefix: str, style: str, scope: dict | None = None, controls: tuple = ()
    ) -> dict[str, Any]:
        """Imports nodes in the order of their needs; returns name -> `_Imported`."""
        scope = self.scope if scope is None else scope
        waiting = {n.name: n for n in node_defs if n.name not in scope}
        for first in list(waiting):
            stack = [first]
            while stack:
                name = stack[-1]
                if name in scope:
                    stack.pop()
                    continue
                node_def = waiting[name]
                if node_def.op in _V1_LOOPS:
                    raise InputError(
                        f"node {name!r} is TF 1 control flow ({node_def.op}); expected functional control flow "
                        "(While, If). Export the model again with TensorFlow 2."
                    )
                if node_def.op in _REFERENCE_VARIABLES:
                    raise InputError(
                        f"node {name!r} is a TensorFlow 1 reference variable, which TensorFlow 2 cannot store in a "
                        "SavedModel; expected resource variables. Save the model again after "
                        "tf.compat.v1.enable_resource_variables()."
                    )
                needed = [_base(i) for i in node_def.input]
                missing = [n for n in needed if n not in scope]
                if missing:
                    unknown = [n for n in missing if n not in waiting]
                    if unknown:
                        raise InputError(
                            f"node {name!r} reads {unknown[0]!r}, which is not in the graph: it is corrupt."
                        )
                    stack.extend(missing)
                    continue
                scope[name] = self._import(node_def, prefix, scope, controls)
                stack.pop()
        return scope

    def _import(self, node_def, prefix: str, scope: dict, outer_controls: tuple) -> Imported:
        inputs = [self.value(i, scope) for i in node_def.input if not i.startswith("^")]
        controls: dict[Node, None] = dict.fromkeys(outer_controls)
        for reference in node_def.input:
            if reference.startswith("^"):
                controls.update(dict.fromkeys(self._behind(scope[reference[1:]])))
        for value in inputs:
            controls.update(self.waits.get(value.node, {}))
        callee = self._callee(node_def)
        if callee is not None:
            return self._inline(callee, node_def, inputs, prefix, tuple(controls))
        attrs = {
            k: v
            for k, v in node_def.attr.items()
            if k not in ("_output_shapes", "_class", "_has_manual_control_dependencies")
        }
        found = ops.definition(node_def.op)
        if found is None and node_def.op not in self.graph.library:
            raise InputError(
                f"op {node_def.op!r} (node {node_def.name!r}) is not registered in this TensorFlow; "
                "import the package that provides it (for text ops: tensorflow_text), or use a newer TensorFlow."
            )
        node = self.graph.add(prefix + node_def.name, node_def.op, inputs, attrs)
        before: tuple[Node, ...] | None = None if node.outputs else tuple(controls)
        if ops.has_effect(node_def.op):
            self.graph.effects.append(node)
        if ops.has_effect(node_def.op) or ops.reads_state(node_def.op):
            node.controls = list(controls)
            self.ordered[node] = None
            before = (node,)
        elif controls and node.outputs:
            self.waits[node] = controls
        ranges = ops.output_ranges(node_def.op, node.attrs) if found is not None else {}
        return Imported(node.outputs, ranges, before)

    def _behind(self, imported: Imported) -> Iterable[Node]:
        """What a control edge from `imported` waits for: what has an effect, or reads state, at or before it."""
        if imported.effects is not None or not self.ordered:
            return imported.effects or ()
        found: dict[Node, None] = {}
        stack, seen = [v.node for v in imported.values], set()
        while stack:
            node = stack.pop()
            if node in self.ordered:
                found[node] = None
            elif node not in seen:
                seen.add(node)
                found.update(self.waits.get(node, {}))
                stack.extend(v.node for v in node.inputs)
        return found

    def _callee(self, node_def):
        if node_def.op in self.graph.library:
            return self.graph.library[node_def.op]
        if node_def.op not in _CALLS:
            return None
        name = node_def.attr["f"].func.name
        if name not in self.graph.library:
            found = context.context().get_function_def(name) if context.context().has_function(name) else None
            if found is None:
                raise InputError(
                    f"node {node_def.name!r} calls {name!r}, which the graph does not hold: it is corrupt."
                )
            self.graph.library[name] = found
        callee = self.graph.library[name]
        # XLA-compiled calls and calls with attributes to be filled in stay calls.
        if node_def.attr["_XlaMustCompile"].b or callee.attr["_XlaMustCompile"].b or callee.signature.attr:
            return None
        return callee

    def _inline(self, callee, node_def, inputs: list[Value], prefix: str, controls: tuple) -> Imported:
        scope: dict[str, Any] = {arg.name: Imported([value]) for arg, value in zip(callee.signature.input_arg, inputs)}
        before = len(self.ordered)
        # An inlined call's own name tells nothing: the layer's name is inside.
        self.run(callee.node_def, prefix, "function", scope, controls)
        values = [self.value(callee.ret[arg.name], scope) for arg in callee.signature.output_arg]
        inside = tuple(list(self.ordered)[before:]) or controls
        ranges = (
            {"output": 0} if node_def.op in _CALLS else {a.name: i for i, a in enumerate(callee.signature.output_arg)}
        )
        return Imported(values, ranges, inside)


@dataclass
class Imported:
    """What a name stands for: its tensors, their ranges by output argument, what a control edge from it waits for."""

    values: list[Value]
    ranges: dict[str, int] = field(default_factory=dict)
    effects: tuple[Node, ...] | None = None  # None: to be found from its values


def _base(reference: str) -> str:
    return reference.removeprefix("^").split(":")[0]


def _freeze(graph: Graph) -> None:
    """A variable that anything in this graph may write is not frozen; reads of what nothing writes need no order."""
    written = effects.find(graph, graph.nodes.values()).written
    for name in set(written) & set(graph.captures):
        graph.captures[name].frozen = False
    free: dict[Node, list[Node]] = {}  # such reads, and what they waited for
    for node in graph.order():
        node.controls = list(dict.fromkeys(n for c in node.controls for n in free.get(c, [c])))
        source = node.inputs[0].node.name if node.inputs else ""
        if ops.reads_state(node.op) and source in graph.captures and source not in written:
            free[node], node.controls = node.controls, []


def _transposes_of_floats(graph: Graph) -> None:
    """bitcast(transpose(bitcast(x, int32)), float32) -> transpose(x), the form that rules and the reference know."""
    for node in graph.order():
        moved = node.inputs[0].node if node.op == "Bitcast" else None
        if moved is None or moved.op != "Transpose":
            continue
        before = moved.inputs[0].node
        if before.op != "Bitcast" or before.inputs[0].dtype != node.output.dtype:
            continue
        attrs = {"T": node.output.dtype, "Tperm": moved.inputs[1].dtype}
        twin = graph.add(f"{moved.name}/of_floats", "Transpose", [before.inputs[0], moved.inputs[1]], attrs)
        twin.output.shape = moved.output.shape
        graph.replace(node.output, twin.output)
        graph.prune(node)

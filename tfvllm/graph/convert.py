"""TensorFlow functions and SavedModels to `Graph` and back. The only file that touches protos of whole graphs.

Everything goes through what TensorFlow itself offers for it: a function's GraphDef is read, calls are inlined, and the
rewritten graph is imported into a new `tf.function`, whose captures are the variables and tables that it still needs.
`tf.saved_model.save` then writes the object graph, the checkpoint, the assets and the initialisers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework import graph_pb2, node_def_pb2
from tensorflow.core.protobuf import saved_model_pb2, trackable_object_graph_pb2
from tensorflow.python.eager import context

from tfvllm.errors import InputError
from tfvllm.graph import effects, infer, ops
from tfvllm.graph.ir import Capture, Graph, Node, Value
from tfvllm.savedmodel import loading, text_ops
from tfvllm.savedmodel.protos import set_method_names

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
    importer = _Importer(graph)

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


class _Importer:
    """Adds NodeDefs to a `Graph`, inlining calls, keeping only the control edges that order effects."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.scope: dict[str, Any] = {}
        self.ordered: dict[Node, None] = {}  # effects, and reads of what may be written
        self.waits: dict[Node, dict[Node, None]] = {}  # what a node without an effect waits for, and what reads it too

    def placeholder(self, name: str, dtype: tf.DType) -> Value:
        node = self.graph.add(name, "Placeholder", [], {"dtype": dtype})
        self.scope[name] = _Imported(node.outputs)
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
        self.scope[name] = _Imported(node.outputs)

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

    def _import(self, node_def, prefix: str, scope: dict, outer_controls: tuple) -> _Imported:
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
        return _Imported(node.outputs, ranges, before)

    def _behind(self, imported: _Imported) -> Iterable[Node]:
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

    def _inline(self, callee, node_def, inputs: list[Value], prefix: str, controls: tuple) -> _Imported:
        scope: dict[str, Any] = {arg.name: _Imported([value]) for arg, value in zip(callee.signature.input_arg, inputs)}
        before = len(self.ordered)
        # An inlined call's own name tells nothing: the layer's name is inside.
        self.run(callee.node_def, prefix, "function", scope, controls)
        values = [self.value(callee.ret[arg.name], scope) for arg in callee.signature.output_arg]
        inside = tuple(list(self.ordered)[before:]) or controls
        ranges = (
            {"output": 0} if node_def.op in _CALLS else {a.name: i for i, a in enumerate(callee.signature.output_arg)}
        )
        return _Imported(values, ranges, inside)


@dataclass
class _Imported:
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


# --------------------------------------------------------------------------------------------------- Graph -> function


def _transposes_of_floats(graph: Graph) -> None:
    """bitcast(transpose(bitcast(x, int32)), float32) -> transpose(x), the form that rules and the yardstick know."""
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


def to_graph_def(graph: Graph, rename: dict[str, str] | None = None, skip: Iterable[str] = ()) -> graph_pb2.GraphDef:
    """The live nodes as a GraphDef; `skip` names nodes that the importer supplies (arguments, captures)."""
    rename, skip = rename or {}, set(skip)
    graph_def = graph_pb2.GraphDef()
    used: set[str] = set()
    for node in graph.live():
        if node.name in skip:
            continue
        graph_def.node.append(_node_def(node, rename))
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


def fingerprint(graph: Graph) -> tuple:
    """Equal for graphs that are the same node by node: same names, inputs, outputs, variables and tables."""
    live = {n.name for n in graph.live()}
    return (
        to_graph_def(graph).SerializeToString(deterministic=True),
        tuple((name, id(c.tensor)) for name, c in sorted(graph.captures.items()) if name in live),
        tuple((key, v.name, str(infer.static_shape(v))) for key, v in graph.inputs.items()),
        tuple((key, v.name) for key, v in graph.outputs.items()),
    )


def _node_def(node: Node, rename: dict[str, str]) -> node_def_pb2.NodeDef:
    node_def = node_def_pb2.NodeDef(name=rename.get(node.name, node.name), op=node.op)
    for value in node.inputs:
        name = rename.get(value.node.name, value.node.name)
        node_def.input.append(name if value.index == 0 else f"{name}:{value.index}")
    for control in node.controls:
        node_def.input.append("^" + rename.get(control.name, control.name))
    for key, attr in node.attrs.items():
        node_def.attr[key].CopyFrom(attr)
    return node_def


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
                known = infer.static_shape(value)
                if known is not None:
                    tensor.set_shape(known)
        with tf.control_dependencies(list(results)):
            tensors_out = [tf.identity(t, name=key) for key, t in zip(graph.outputs, tensors_out)]
        if pack is not None:
            return pack(tensors_out)
        return dict(zip(graph.outputs, tensors_out))

    return tf.function(call, autograph=False).get_concrete_function(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------- SavedModel


@dataclass
class Signature:
    """One signature: its graph (outputs by their public names), the specs of its inputs, its method name."""

    graph: Graph
    specs: dict[str, tf.TensorSpec]
    method_name: str
    original: Any  # the ConcreteFunction as loaded


@dataclass
class SavedModel:
    """A loaded SavedModel: its signatures as graphs. `loaded` keeps the original's resources alive."""

    path: Path
    signatures: dict[str, Signature]
    loaded: Any


def read_proto(path: str | os.PathLike) -> saved_model_pb2.SavedModel:
    """The saved_model.pb of a folder, or one clear `InputError`."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; expected a SavedModel folder (with saved_model.pb).")
    file = path / "saved_model.pb"
    if not file.is_file():
        versions = sorted((p.name for p in path.iterdir() if p.name.isdigit()), key=int) if path.is_dir() else []
        hint = f" Did you mean {path / versions[-1]}?" if versions else " Pass the folder that holds saved_model.pb."
        raise InputError(f"{path} is not a SavedModel: no saved_model.pb in it.{hint}")
    proto = saved_model_pb2.SavedModel()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise InputError(
            f"{file} is corrupt or truncated, not a SavedModel proto ({error}); export the model again."
        ) from None
    if not proto.meta_graphs:
        raise InputError(f"{file} holds no graph: it is empty or truncated; export the model again.")
    if proto.saved_model_schema_version > 1:
        raise InputError(
            f"{file} has schema version {proto.saved_model_schema_version}; this version reads 1. Upgrade."
        )
    producer = max(m.graph_def.versions.min_consumer for m in proto.meta_graphs)
    if producer > tf.version.GRAPH_DEF_VERSION:
        raise InputError(
            f"{file} needs a TensorFlow with graph version {producer}; this one has {tf.version.GRAPH_DEF_VERSION}. "
            "Upgrade TensorFlow, or export the model with this one."
        )
    return proto


def load(path: str | os.PathLike, only: str | None = None) -> SavedModel:
    """Reads every signature of a SavedModel (or the one named `only`) as a `Graph`."""
    path = Path(path)
    proto = read_proto(path)
    _register_ops(proto)
    restore = _Restore.of(path)
    try:
        loaded = loading.load(path, tf.saved_model.LoadOptions(experimental_skip_checkpoint=restore is not None))
    except Exception as error:
        raise InputError(f"{path} cannot be loaded: {_first_line(error)}") from error
    definitions = next(iter(proto.meta_graphs)).signature_def
    names = [n for n in loaded.signatures if only is None or n == only]
    if not names:
        available = ", ".join(loaded.signatures) or "none"
        wanted = f"signature {only!r}" if only else "at least one signature"
        raise InputError(f"{path}: expected {wanted}, found {available}. Pass signature= with one of these.")
    owners = owners_of(tf.train.TrackableView(loaded).descendants())
    signatures = {}
    for name in names:
        function = loaded.signatures[name]
        graph = from_concrete(function, owners, name)
        specs = {k: s for k, s in function.structured_input_signature[1].items()}
        # TensorFlow orders a signature's inputs and outputs by key.
        graph.inputs = dict(zip(sorted(specs), graph.inputs.values(), strict=True))
        graph.outputs = dict(zip(sorted(function.structured_outputs), graph.outputs.values(), strict=True))
        signatures[name] = Signature(graph, specs, definitions[name].method_name, function)
    graphs = [s.graph for s in signatures.values()]
    if restore is not None:
        try:
            stored = {id(owner) for owner in owners.values()}  # not weights made of captured constants just now
            used = (c.owner for g in graphs for c in g.captures.values())
            restore.run(loaded, {id(owner): owner for owner in used if id(owner) in stored})
        except (tf.errors.OpError, ValueError) as error:
            raise InputError(f"{path} cannot be loaded: {_first_line(error)}") from error
    _thaw_shared(graphs)
    return SavedModel(path, signatures, loaded)


@dataclass
class _Restore:
    """Reads from a checkpoint the variables that are needed, one by one.

    TensorFlow's own restore reads all there are; a Keras export holds every weight twice.
    """

    prefix: str
    objects: Any  # the checkpoint's TrackableObjectGraph

    @classmethod
    def of(cls, path: Path) -> _Restore | None:
        """None where the checkpoint holds more than variables (the contents of tables): TensorFlow reads those."""
        prefix = str(path / "variables" / "variables")
        if not tf.io.gfile.exists(prefix + ".index"):
            return None
        try:
            text = tf.train.load_checkpoint(prefix).get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH")
        except (tf.errors.OpError, ValueError, IndexError, RuntimeError):
            return None  # TensorFlow's own restore says what is wrong with it
        objects = trackable_object_graph_pb2.TrackableObjectGraph.FromString(text)
        plain = all(a.name == "VARIABLE_VALUE" for n in objects.nodes for a in n.attributes)
        return cls(prefix, objects) if plain else None

    def run(self, loaded: Any, needed: dict[int, Any]) -> None:
        """Restores those of the trackables of `loaded` that are `needed` (id -> trackable) and are variables.

        Raises ValueError where one is not in the checkpoint.
        """
        missing = {i: v for i, v in needed.items() if isinstance(v, tf.Variable)}
        found = {0: loaded}
        queue = [0]
        while queue:
            number = queue.pop()
            node, trackable = self.objects.nodes[number], found[number]
            if missing.pop(id(trackable), None) is not None:
                (attribute,) = node.attributes
                tensor = tf.raw_ops.RestoreV2(
                    prefix=self.prefix,
                    tensor_names=[attribute.checkpoint_key],
                    shape_and_slices=[""],
                    dtypes=[trackable.dtype],
                )
                trackable.assign(tensor[0])
            children = tf.train.TrackableView.children(trackable) if node.children else {}
            for child in node.children:
                if child.node_id not in found and child.local_name in children:
                    found[child.node_id] = children[child.local_name]
                    queue.append(child.node_id)
        if missing:
            raise ValueError(f"the checkpoint does not hold {next(iter(missing.values())).name!r}")


def _register_ops(proto) -> None:
    used = {n.op for m in proto.meta_graphs for n in m.graph_def.node}
    used.update(n.op for m in proto.meta_graphs for f in m.graph_def.library.function for n in f.node_def)
    if any(ops.definition(op) is None for op in used):
        text_ops.load()
        ops.definition.cache_clear()
        ops.is_stateful.cache_clear()


def _thaw_shared(graphs: list[Graph]) -> None:
    """A variable that one signature writes is frozen in none."""
    written = {id(c.tensor) for g in graphs for c in g.captures.values() if not c.frozen}
    for graph in graphs:
        for capture in graph.captures.values():
            capture.frozen = capture.frozen and id(capture.tensor) not in written


def save(
    signatures: dict[str, Signature], directory: Path, extra_assets: Path | None = None, loaded: Any = None
) -> None:
    """Writes the signatures' graphs as a SavedModel into `directory` (which must not exist or be empty).

    `loaded` is the SavedModel they are of: one of TF 1 fills the tables in its graph by an initialiser of its own.
    """
    holder = tf.Module()
    owners: dict[int, Any] = {}
    functions = {}
    for name, signature in signatures.items():
        graph = signature.graph
        specs = {k: tf.TensorSpec(s.shape, s.dtype, name=k) for k, s in sorted(signature.specs.items())}
        functions[name] = to_concrete(graph, ((), specs))
        live = {n.name for n in graph.live()}
        for key, capture in graph.captures.items():
            if key in live:
                if capture.owner is None:
                    raise InputError(f"{key}: a captured resource has no owner that could be saved with the model.")
                owners[id(capture.owner)] = capture.owner
    holder.tfvllm_resources = list(owners.values())
    tables = any("HashTable" in n.op for s in signatures.values() for n in s.graph.live())
    if tables and hasattr(loaded, "initializer"):  # it belongs to a graph that holds all the variables
        holder.tfvllm_resources += [loaded.initializer, *loaded.asset_paths, *loaded.variables]
    tf.saved_model.save(holder, str(directory), signatures=functions)
    set_method_names(directory, {n: s.method_name for n, s in signatures.items() if s.method_name})
    if extra_assets is not None and extra_assets.is_dir():
        shutil.copytree(extra_assets, directory / "assets.extra", dirs_exist_ok=True)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


# --------------------------------------------------------------------------------------------------------- evaluation


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
    graph_def.node.extend(_node_def(n, {}) for n in todo)
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

"""SavedModels as graphs with their weights, and back."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2, trackable_object_graph_pb2

from tfvllm.errors import InputError
from tfvllm.graph import ops
from tfvllm.graph.executable import to_concrete
from tfvllm.graph.importer import from_concrete, owners_of
from tfvllm.graph.ir import Graph
from tfvllm.savedmodel import read, text_ops
from tfvllm.savedmodel.protos import set_method_names


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
        loaded = read.load(path, tf.saved_model.LoadOptions(experimental_skip_checkpoint=restore is not None))
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
        # TensorFlow orders a signature's inputs and outputs by key; this dict has the order of a proto map.
        specs = dict(sorted(function.structured_input_signature[1].items()))
        graph.inputs = dict(zip(specs, graph.inputs.values(), strict=True))
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

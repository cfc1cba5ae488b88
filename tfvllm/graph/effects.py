"""What running a graph does besides giving results: what it writes, where it is random, what it does outside.

Functions are followed: a loop's body may assign the variable that is handed to the loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import function_pb2

from tfvllm.graph import ops
from tfvllm.graph.ir import Graph, Node

PRINTS = frozenset({"Print", "PrintV2"})
TABLE_WRITES = frozenset({"LookupTableInsertV2", "LookupTableRemoveV2", "LookupTableImportV2"})

_VARIABLE_WRITES = (
    "Assign",
    "ResourceScatter",
    "ResourceStridedSlice",
    "ResourceApply",
    "ResourceSparseApply",
    "ResourceCountUpTo",
)
_GENERATORS = ("Stateful", "RngReadAndSkip", "RngSkip")
_ARGUMENTS = {  # op that calls functions -> the attribute with the types of what it hands on, from which input on
    "PartitionedCall": ("Tin", 0),
    "StatefulPartitionedCall": ("Tin", 0),
    "While": ("T", 0),
    "StatelessWhile": ("T", 0),
    "If": ("Tin", 1),
    "StatelessIf": ("Tin", 1),
    "Case": ("Tin", 1),
    "StatelessCase": ("Tin", 1),
}
_GIVES_ON = frozenset({"Identity", "IdentityN", "Switch", "RefSwitch", "Merge", "Enter", "Exit", "NextIteration"})
# Stateful in TensorFlow's registry, yet nothing is left of them after the run.
_HARMLESS = (
    *("Assert", "CheckNumerics", "NoOp", "StatelessRandomGetAlg", "DeviceIndex", "GuaranteeConst", "Empty"),
    *("TensorArray", "Stack", "Anonymous", "Mutex", "ConsumeMutexLock", "Sleep", "TemporaryVariable"),
    *("GraphDefVersion", "LookupTableExportV2", "IsResourceHandleRefCounting", "DisableCopyOnRead", "DeepCopy"),
    *("Sentencepiece", "Wordpiece", "XlaCallModule", "InitializeTable", "ReadVariableXlaSplitND", "CudnnRNN"),
    *("MutableHashTable", "MutableDenseHashTable", "HashTable", "VariableV2", "Variable"),
)
_KEPT_BY_NAME = frozenset(
    {"VarHandleOp", "MutableHashTableV2", "MutableDenseHashTableV2", "MutableHashTableOfTensorsV2"}
)
_UNSEEDED = frozenset({"Timestamp", "NonDeterministicInts"})


@dataclass(frozen=True)
class Writing:
    """One op that writes a resource."""

    op: str
    node: str
    attrs: Mapping[str, Any]


@dataclass(frozen=True)
class Draw:
    """One op that is random. `top`: the node of the graph itself that it is, or that calls it."""

    op: str
    node: str
    top: str


@dataclass
class Effects:
    """What a graph or function does.

    Attributes:
        written: name of the argument or capture -> the ops that write it.
        outside: "op (node)" of what cannot be undone: queues, files, Python code and the like.
        draws: the random ops that keep their own state.
        generators: the random ops that keep it in a variable, which they write.
        prints: whether anything is printed.
    """

    written: dict[str, list[Writing]] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    generators: list[Draw] = field(default_factory=list)
    prints: bool = False


def find(graph: Graph, nodes: Iterable[Node] | None = None) -> Effects:
    """The effects of the live nodes of a graph, or of those given; `written` goes by the names of its captures."""
    records = {
        n.name: _Record(n.op, n.attrs, [(v.node.name, v.index) for v in n.inputs])
        for n in (graph.live() if nodes is None else nodes)
    }
    return _Survey(graph.library).run(records)


def is_seedable(op: str) -> bool:
    """Whether an op draws random numbers from a state of its own that its attributes `seed` and `seed2` begin."""
    definition = ops.definition(op)
    return ops.is_stateful(op) and definition is not None and {"seed", "seed2"} <= {a.name for a in definition.attr}


def called(attrs: Mapping[str, Any]) -> list[str]:
    """The functions that a node's attributes name."""
    return [f.name for a in attrs.values() for f in (a.func, *a.list.func) if f.name]


@dataclass
class _Record:
    """A node of a graph or of a function, with what it reads as (name, index)."""

    op: str
    attrs: Mapping[str, Any]
    inputs: list[tuple[str, int]]


class _Survey:
    def __init__(self, library: Mapping[str, function_pb2.FunctionDef]):
        self.library = library
        self.functions: dict[str, Effects] = {}

    def function(self, name: str) -> Effects | None:
        """The effects of a function of the library, by the names of its arguments; None where it is not there."""
        if name not in self.functions:
            definition = self.library.get(name)
            if definition is None:
                return None
            self.functions[name] = Effects()  # what calls itself
            records = {
                n.name: _Record(n.op, n.attr, [_reference(i) for i in n.input if not i.startswith("^")])
                for n in definition.node_def
            }
            self.functions[name] = self.run(records)
        return self.functions[name]

    def run(self, records: Mapping[str, _Record]) -> Effects:
        found = Effects()
        for name, record in records.items():
            if record.op in _ARGUMENTS or record.op in self.library:
                self._call(found, records, name, record)
            elif record.op in PRINTS:
                found.prints = True
            elif _writes_reference(record.op):
                self._escape(found, records, name, record)
            elif ops.definition(record.op) is None or called(record.attrs):
                if ops.is_stateful(record.op):
                    self._escape(found, records, name, record)
            elif not ops.is_stateful(record.op) or ops.is_read_only(record.op):
                continue
            elif is_seedable(record.op) or record.op in _UNSEEDED:
                found.draws.append(Draw(record.op, name, name))
            elif record.op in TABLE_WRITES or record.op.startswith((*_VARIABLE_WRITES, *_GENERATORS)):
                if record.op.startswith(_GENERATORS):
                    found.generators.append(Draw(record.op, name, name))
                for position in _resources(record):
                    self._write(found, records, record.inputs[position], Writing(record.op, name, record.attrs))
            elif not record.op.startswith(_HARMLESS):
                self._escape(found, records, name, record)
        return found

    def _escape(self, found: Effects, records, name: str, record: _Record) -> None:
        """Notes an op of which nobody knows what it does: it may write whatever it is given."""
        found.outside.append(f"{record.op} ({name})")
        for reference in record.inputs:
            self._write(found, records, reference, Writing(record.op, name, record.attrs))

    def _write(self, found: Effects, records, reference: tuple[str, int], writing: Writing) -> None:
        for owner in _owners(records, reference):
            made_here = records[owner].op if owner in records else "Placeholder"
            if made_here == "Placeholder":
                found.written.setdefault(owner, []).append(writing)
            elif made_here in _KEPT_BY_NAME:
                found.outside.append(f"{writing.op} ({writing.node})")

    def _call(self, found: Effects, records, name: str, record: _Record) -> None:
        _, start = _ARGUMENTS.get(record.op, ("", 0))
        for callee in called(record.attrs) if record.op in _ARGUMENTS else [record.op]:
            inner = self.function(callee)
            if inner is None:
                self._escape(found, records, name, record)
                continue
            found.outside.extend(inner.outside)
            found.draws.extend(Draw(d.op, d.node, name) for d in inner.draws)
            found.generators.extend(Draw(d.op, d.node, name) for d in inner.generators)
            found.prints |= inner.prints
            position = {a.name: i for i, a in enumerate(self.library[callee].signature.input_arg)}
            for argument, writings in inner.written.items():
                for writing in writings:
                    self._write(found, records, record.inputs[start + position[argument]], writing)


def _reference(text: str) -> tuple[str, int]:
    name, *rest = text.split(":")
    return name, int(rest[-1]) if rest else 0


def _owners(records: Mapping[str, _Record], reference: tuple[str, int]) -> set[str]:
    """The arguments, captures and local resources that a handle may stand for."""
    owners: set[str] = set()
    stack, seen = [reference], set()
    while stack:
        reference = stack.pop()
        if reference in seen:
            continue
        seen.add(reference)
        name, index = reference
        record = records.get(name)
        if record is None or not (record.op in _ARGUMENTS or record.op in _GIVES_ON):
            owners.add(name)
        elif "While" in record.op or record.op == "IdentityN":
            stack.append(record.inputs[index])
        elif record.op in _ARGUMENTS:
            stack.extend(record.inputs[i] for i in _resources(record))
        else:
            stack.extend(record.inputs[:1] if record.op != "Merge" else record.inputs)
    return owners


def _resources(record: _Record) -> list[int]:
    """The positions of the inputs that are handles of resources."""
    if record.op in _ARGUMENTS:
        attribute, start = _ARGUMENTS[record.op]
        types = record.attrs[attribute].list.type
        return [start + i for i, t in enumerate(types) if t == tf.resource.as_datatype_enum]
    found: list[int] = []
    position = 0
    for argument in ops.definition(record.op).input_arg:  # type: ignore[union-attr]
        kind = argument.type or (record.attrs[argument.type_attr].type if argument.type_attr else 0)
        if argument.type_list_attr:
            count = len(record.attrs[argument.type_list_attr].list.type)
        else:
            count = record.attrs[argument.number_attr].i if argument.number_attr else 1
        if kind == tf.resource.as_datatype_enum:
            found.extend(range(position, position + count))
        position += count
    return found


def _writes_reference(op: str) -> bool:
    """Whether an op writes one of the reference variables of TensorFlow 1."""
    definition = ops.definition(op)
    return (
        definition is not None
        and op.startswith(("Assign", "Scatter", "Apply", "SparseApply", "CountUpTo", "StridedSliceAssign"))
        and any(a.is_ref for a in definition.input_arg)
    )

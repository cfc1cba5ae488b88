"""A graph made ready to be run for a trial: nothing that it writes stays, nothing is printed, and it draws the same
random numbers every time."""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import node_def_pb2

from tfvllm.errors import InputError
from tfvllm.graph import effects, executable, ops
from tfvllm.graph.ir import Graph
from tfvllm.simplifier.arguments import pack
from tfvllm.simplifier.state import State


class Trial:
    """A graph that can be run on samples (lists of arrays, in the order of its inputs) without a trace.

    Every run starts from the same state of variables, tables and generators, and with the same draws.

    Args:
        specs: (args, kwargs) of TensorSpecs, as for `executable.to_concrete`.
        state: what the graph writes, if that is known; that of the original for a graph made from it.

    Raises InputError where the graph does what cannot be undone: see `State.outside`.
    """

    def __init__(self, graph: Graph, specs: tuple[tuple, dict], state: State | None = None):
        self.state = State.of(graph) if state is None else state
        refuse_outside(self.state)
        self.graph, self.specs = tame(graph), specs
        self._fresh = bool(self.state.draws)  # only a new function begins its draws anew
        self._function: Any = None

    @property
    def function(self) -> Any:
        if self._function is None or self._fresh:
            self._function = executable.to_concrete(self.graph, self.specs, pack=list)
        return self._function

    def run(self, sample: Sequence[Any]) -> list[np.ndarray]:
        """The results on a sample."""
        return self.run_and_look(sample)[0]

    def run_and_look(self, sample: Sequence[Any]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """The results on a sample, and what the run left in variables and tables before these were put back."""
        function = self.function
        args, kwargs = self._packed(sample)
        with self.state.kept():
            results = [r.numpy() for r in function(*args, **kwargs)]
            return results, self.state.arrays()

    def call(self, sample: Sequence[Any]) -> Callable[[], Any]:
        """For timing, inside `state.kept()`: the call on a sample, its arguments converted already."""
        args, kwargs = self._packed(sample)
        return functools.partial(self.function, *args, **kwargs)

    def _packed(self, sample: Sequence[Any]) -> Any:
        tensors = [tf.convert_to_tensor(a, v.dtype) for a, v in zip(sample, self.graph.inputs.values())]
        return pack(self.specs, tensors)


def refuse_outside(state: State, what: str = "this") -> None:
    """Raises InputError where a trial run could not be undone."""
    if state.outside:
        raise InputError(
            f"{what} needs runs of the graph that leave no trace, and {state.outside[0]} may write what cannot be "
            "put back; leave it out of the function (or signature), or do not ask for what has to be measured."
        )


# -------------------------------------------------------------------------------------------------------------- taming


def tame(graph: Graph) -> Graph:
    """The same graph without prints, in which random ops without a seed have one that goes by their name.

    So a graph and what was made of it draw alike. A graph without either is returned as it is.
    """
    found = effects.find(graph)
    if not found.prints and not found.draws:
        return graph
    tamed = graph.copy()
    library = _Library(tamed)
    for node in tamed.nodes.values():
        if node.op in effects.PRINTS:
            kept = node.inputs[:1] if node.outputs else []
            for position, value in list(enumerate(node.inputs))[len(kept) :]:
                value.uses.pop((node, position), None)
            node.inputs = kept
            node.attrs = {"T": ops.python_to_attr(kept[0].dtype, "type")} if kept else {}
            node.op = "Identity" if kept else "NoOp"
            continue
        if effects.is_seedable(node.op) and not (node.attr("seed", 0) or node.attr("seed2", 0)):
            node.attrs["seed"], node.attrs["seed2"] = (ops.python_to_attr(n, "int") for n in _seeds(node.name))
        for key, attr in list(node.attrs.items()):
            if effects.called({key: attr}):
                node.attrs[key] = library.renamed(attr)
    return tamed


class _Library:
    """Tamed twins of the functions of a graph's library, made as they are asked for."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.names: dict[str, str] = {}

    def renamed(self, attr: Any) -> Any:
        """An attribute that names the tamed twins of the functions it named."""
        twin = type(attr)()
        twin.CopyFrom(attr)
        for func in [*twin.list.func, *([twin.func] if twin.HasField("func") else [])]:
            func.name = self.tamed(func.name)
        return twin

    def tamed(self, name: str) -> str:
        """The name of a function's twin; its own where there is nothing to be tamed in it."""
        if name in self.names or name not in self.graph.library:
            return self.names.get(name, name)
        self.names[name] = name  # what calls itself stays as it is
        original = self.graph.library[name]
        twin = type(original)()
        twin.CopyFrom(original)
        for node_def in twin.node_def:
            self._tame(node_def)
            if node_def.op in self.graph.library:
                node_def.op = self.tamed(node_def.op)
        if twin != original:
            digest = hashlib.sha256(twin.SerializeToString(deterministic=True)).hexdigest()[:12]
            self.names[name] = twin.signature.name = f"{name}_{digest}"
            self.graph.library[twin.signature.name] = twin
        return self.names[name]

    def _tame(self, node_def: node_def_pb2.NodeDef) -> None:
        if node_def.op in effects.PRINTS:
            data = [i for i in node_def.input if not i.startswith("^")]
            kept = data[:1] if node_def.op == "Print" else []
            controls = [i for i in node_def.input if i.startswith("^")]
            del node_def.input[:]
            node_def.input.extend([*kept, *controls])
            for key in [k for k in node_def.attr if not (kept and k == "T")]:
                del node_def.attr[key]
            node_def.op = "Identity" if kept else "NoOp"
            return
        if effects.is_seedable(node_def.op) and not (node_def.attr["seed"].i or node_def.attr["seed2"].i):
            node_def.attr["seed"].i, node_def.attr["seed2"].i = _seeds(node_def.name)
        for key in [k for k, a in node_def.attr.items() if effects.called({k: a})]:
            node_def.attr[key].CopyFrom(self.renamed(node_def.attr[key]))


def _seeds(name: str) -> tuple[int, int]:
    return 11, zlib.crc32(name.encode()) + 1

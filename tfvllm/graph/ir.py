"""The graph that rules rewrite: nodes, the values they produce, and who reads them.

A `Graph` is one TensorFlow function, flat: calls are inlined, weights are `Placeholder`s of resources bound to the
variables they come from. Control edges are kept only where they order something that has an effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2, function_pb2

from tfvllm.graph import ops


class Value:
    """One output of one node. `shape` is a tuple of sizes (int or `Dim`), or None where the rank is unknown."""

    __slots__ = ("dtype", "index", "known_value", "node", "shape", "uses")

    def __init__(self, node: Node, index: int, dtype: tf.DType):
        self.node = node
        self.index = index
        self.dtype = dtype
        self.shape: Any = None
        self.known_value: Any = None  # what an integer scalar or vector holds, as sizes: see infer.py
        self.uses: dict[tuple[Node, int], None] = {}

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    @property
    def name(self) -> str:
        return self.node.name if self.index == 0 else f"{self.node.name}:{self.index}"

    def __repr__(self):
        return f"<{self.name} {self.node.op} {self.dtype.name}{'?' if self.shape is None else list(self.shape)}>"


class Node:
    """One operation. `attrs` holds AttrValue protos as TensorFlow wants them."""

    __slots__ = ("attrs", "controls", "inputs", "name", "op", "outputs")

    def __init__(self, name: str, op: str, attrs: dict[str, attr_value_pb2.AttrValue]):
        self.name = name
        self.op = op
        self.attrs = attrs
        self.inputs: list[Value] = []
        self.controls: list[Node] = []
        self.outputs: list[Value] = []

    def attr(self, key: str, default: Any = None) -> Any:
        """An attribute as a plain Python value (int, float, bool, str, bytes, DType, list, ndarray)."""
        return ops.attr_to_python(self.attrs[key]) if key in self.attrs else default

    def own_attrs(self, *without: str) -> dict[str, Any]:
        """The attributes that a node like this one is made with: no notes to the runtime (`_class` and its like)."""
        return {key: value for key, value in self.attrs.items() if key not in without and not key.startswith("_")}

    @property
    def output(self) -> Value:
        return self.outputs[0]

    def __repr__(self):
        return f"<Node {self.name} {self.op}>"


@dataclass
class Capture:
    """What a resource placeholder stands for outside the graph: a variable, a table, or another tensor."""

    tensor: Any  # the handle (or a plain eager tensor)
    owner: Any = None  # the tf.Variable or table to be saved with the graph
    frozen: bool = False  # a variable that nothing assigns: its value may be used in rewriting
    made: bool = False  # a variable that a rewrite made: nobody outside knows it


@dataclass
class Graph:
    """Nodes in insertion order, by name; arguments, results, captures, effects, and the function library."""

    name: str = "graph"
    nodes: dict[str, Node] = field(default_factory=dict)
    inputs: dict[str, Value] = field(default_factory=dict)
    outputs: dict[str, Value] = field(default_factory=dict)
    captures: dict[str, Capture] = field(default_factory=dict)  # by placeholder name
    effects: list[Node] = field(default_factory=list)  # nodes that must run though nothing reads them
    library: dict[str, function_pb2.FunctionDef] = field(default_factory=dict)
    version: int = 0  # changes whenever a node or an edge does
    _ordered: tuple[int, list[Node]] | None = None  # the version it is the order of, and the order

    # ----------------------------------------------------------------- building

    def add(self, name: str, op: str, inputs: Iterable[Value], attrs: dict | None = None, controls=()) -> Node:
        """Adds a node; its type attributes follow from its inputs, the rest from `attrs` and the op's defaults."""
        inputs = list(inputs)
        protos = ops.complete_attrs(op, [v.dtype for v in inputs], attrs or {})
        node = Node(self.unique(name), op, protos)
        for dtype in ops.output_dtypes(op, protos, self.library):
            node.outputs.append(Value(node, len(node.outputs), dtype))
        self.nodes[node.name] = node
        self.version += 1
        for value in inputs:
            self._append_input(node, value)
        node.controls.extend(controls)
        return node

    def unique(self, name: str) -> str:
        if name not in self.nodes:
            return name
        n = 1
        while f"{name}_{n}" in self.nodes:
            n += 1
        return f"{name}_{n}"

    def _append_input(self, node: Node, value: Value) -> None:
        value.uses[(node, len(node.inputs))] = None
        node.inputs.append(value)

    def set_input(self, node: Node, position: int, value: Value) -> None:
        self.version += 1
        del node.inputs[position].uses[(node, position)]
        node.inputs[position] = value
        value.uses[(node, position)] = None

    def replace(self, old: Value, new: Value) -> None:
        """Makes every reader of `old` (results of the graph included) read `new`."""
        if old is new:
            return
        for node, position in list(old.uses):
            self.set_input(node, position, new)
        for key, value in self.outputs.items():
            if value is old:
                self.outputs[key] = new
        self.version += 1

    def remove(self, node: Node) -> None:
        for position, value in enumerate(node.inputs):
            value.uses.pop((node, position), None)
        del self.nodes[node.name]
        self.version += 1

    def forget(self, made: list[Node], mark: tuple[int, int]) -> None:
        """Removes nodes that were made since `mark` and that nothing reads: the graph is what it was then."""
        for node in reversed(made):
            self.remove(node)
        if len(self.nodes) == mark[1]:
            self.version = mark[0]

    def mark(self) -> tuple[int, int]:
        """For `forget`: the version and the number of nodes."""
        return self.version, len(self.nodes)

    def prune(self, node: Node) -> int:
        """Removes a node that nobody reads, and what only it needed; returns how many nodes went."""
        keep = {v.node for v in self.inputs.values()} | {v.node for v in self.outputs.values()} | set(self.effects)
        keep.update(c for n in self.effects for c in n.controls)
        stack, gone = [node], 0
        while stack:
            n = stack.pop()
            if n in keep or self.nodes.get(n.name) is not n or any(v.uses for v in n.outputs):
                continue
            self.remove(n)
            self.captures.pop(n.name, None)
            gone += 1
            stack.extend(v.node for v in n.inputs)
        return gone

    def weight(self, name: str, content: np.ndarray | tf.Variable, dtype: tf.DType) -> Value:
        """A new variable with the given content (or the variable given), and a node that reads it."""
        variable = content
        if not isinstance(variable, tf.Variable):
            variable = tf.Variable(tf.convert_to_tensor(content, dtype), trainable=False, name=name.rsplit("/", 1)[-1])
        handle = self.add(f"{name}/handle", "Placeholder", [], {"dtype": tf.resource, "shape": []})
        self.captures[handle.name] = Capture(variable.handle, variable, frozen=True, made=True)
        handle.output.shape = ()
        node = self.add(name, "ReadVariableOp", [handle.output], {"dtype": dtype})
        node.output.shape = tuple(variable.shape.as_list())
        return node.output

    # ------------------------------------------------------------------ reading

    def uses(self, value: Value) -> list[Node]:
        return [node for node, _ in value.uses]

    def is_output(self, value: Value) -> bool:
        return any(value is v for v in self.outputs.values())

    def single_use(self, value: Value) -> Node | None:
        """The one place that reads a value, or None where there are more or none, or the value is a result."""
        if len(value.uses) != 1 or self.is_output(value):
            return None
        return next(iter(value.uses))[0]

    def is_weight(self, value: Value) -> bool:
        """Whether a value is a plain read of a variable that nothing assigns."""
        if value.node.op != "ReadVariableOp":
            return False
        capture = self.captures.get(value.node.inputs[0].node.name)
        return capture is not None and capture.frozen

    def constant(self, value: Value) -> np.ndarray | None:
        """The content of a `Const`, or None."""
        return value.node.attr("value") if value.node.op == "Const" else None

    def array(self, value: Value) -> np.ndarray | None:
        """The content of a constant or of a weight that nothing assigns, or None."""
        if value.node.op == "Const":
            return value.node.attr("value")
        if self.is_weight(value):
            return self.captures[value.node.inputs[0].node.name].owner.numpy()
        return None

    def is_static(self, value: Value) -> bool:
        """Whether a value follows from constants and unchanging weights alone."""
        seen: set[Node] = set()
        stack = [value]
        while stack:
            v = stack.pop()
            if v.node in seen or v.node.op == "Const" or self.is_weight(v):
                continue
            if not v.node.inputs or not ops.is_pure(v.node.op) or v.node.op == "Placeholder":
                return False
            seen.add(v.node)
            stack.extend(v.node.inputs)
        return True

    def is_private(self, value: Value, small: int = 1 << 16) -> bool:
        """Whether a new weight may be made from a static value without keeping the old one beside it.

        So it is where nothing but its one reader uses it or what it is made from, and where it is small (elements).
        """
        stack = [value]
        while stack:
            v = stack.pop()
            sizes = v.shape if v.shape is not None else (small + 1,)
            if all(isinstance(d, int) for d in sizes) and int(np.prod(sizes, dtype=np.int64)) <= small:
                continue
            if v.dtype != tf.resource and (len(v.uses) > 1 or self.is_output(v)):
                return False
            if v.node.op == "ReadVariableOp":
                if len(v.node.inputs[0].uses) > 1:
                    return False
                continue
            stack.extend(v.node.inputs)
        return True

    def order(self, roots: Iterable[Node] | None = None) -> list[Node]:
        """Nodes so that each comes after what it reads; only those the roots need, if roots are given."""
        if roots is None:
            if self._ordered is None or self._ordered[0] != self.version:
                self._ordered = (self.version, self._order(list(self.nodes.values())))
            return list(self._ordered[1])
        return self._order(roots)

    def _order(self, roots: Iterable[Node]) -> list[Node]:
        done: dict[Node, None] = {}
        for root in roots:
            stack: list[tuple[Node, Iterator[Node]]] = []
            if root not in done:
                stack.append((root, self._needs(root)))
            on_path = {root}
            while stack:
                node, needs = stack[-1]
                for needed in needs:
                    if needed not in done and needed not in on_path:
                        on_path.add(needed)
                        stack.append((needed, self._needs(needed)))
                        break
                else:
                    stack.pop()
                    on_path.discard(node)
                    done[node] = None
        return list(done)

    @staticmethod
    def _needs(node: Node) -> Iterator[Node]:
        yield from node.controls
        for value in node.inputs:
            yield value.node

    def live(self) -> list[Node]:
        """The nodes that the results and the effects need, in order."""
        return self.order([*(v.node for v in self.outputs.values()), *self.effects])

    def copy(self) -> Graph:
        """An independent graph with the same nodes; captures and the library are shared."""
        other = Graph(self.name, captures=dict(self.captures), library=dict(self.library))
        twin: dict[Node, Node] = {}
        for node in self.order():
            copied = Node(node.name, node.op, dict(node.attrs))
            for value in node.outputs:
                v = Value(copied, value.index, value.dtype)
                v.shape, v.known_value = value.shape, value.known_value
                copied.outputs.append(v)
            for value in node.inputs:
                other._append_input(copied, twin[value.node].outputs[value.index])
            copied.controls = [twin[c] for c in node.controls]
            twin[node] = copied
        other.nodes = {name: twin[node] for name, node in self.nodes.items()}
        other.inputs = {k: twin[v.node].outputs[v.index] for k, v in self.inputs.items()}
        other.outputs = {k: twin[v.node].outputs[v.index] for k, v in self.outputs.items()}
        other.effects = [twin[n] for n in self.effects]
        return other

    def check(self) -> None:
        """Raises AssertionError where readers and inputs disagree; for tests."""
        for node in self.nodes.values():
            for position, value in enumerate(node.inputs):
                assert (node, position) in value.uses, f"{node} reads {value}, which does not know it"
                assert self.nodes.get(value.node.name) is value.node, f"{node} reads {value}, which is not in the graph"
            for value in node.outputs:
                for reader, position in value.uses:
                    assert reader.inputs[position] is value, f"{value} believes that {reader} reads it"

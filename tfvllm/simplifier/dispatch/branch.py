"""Several variants as one graph with a branch; what all compute alike stands before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import function_pb2

from tfvllm.graph import dims, functions, graphdef, ops
from tfvllm.graph.builder import Builder
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.simplifier import trial
from tfvllm.simplifier.dispatch.decision_tree import Leaf, Split, leaves
from tfvllm.simplifier.dispatch.measure import FEATURES
from tfvllm.simplifier.dispatch.variants import Variant

_SCOPE = "tfvllm_dispatch"


class VariantMerger:
    """Several variants side by side: what they compute alike, and where batch and length can be read off.

    Args:
        variants: graphs of the same inputs and outputs, made from the same original: equal sizes have equal names.

    Those that cannot be branches (they have effects, or read variables that are written) are left out: see `declined`.
    """

    def __init__(self, variants: Sequence[Variant]):
        self.table: dict[Any, int] = {}
        numbered = [(variant, self._number(variant.graph)) for variant in variants]
        self.declined: dict[str, str] = {}
        self._settle(numbered)
        for variant, _ in numbered:
            reason = self._why_not(variant)
            if reason:
                self.declined[variant.name] = reason
        self._settle([(v, n) for v, n in numbered if v.name not in self.declined])
        self.shape_value = self._shape_value() if self.variants else None

    def _settle(self, numbered: list[tuple[Variant, dict[str, int]]]) -> None:
        self.variants = [variant for variant, _ in numbered]
        self.numbers = {variant.name: numbers for variant, numbers in numbered}  # variant -> node -> its number
        common = [set(numbers.values()) for _, numbers in numbered]
        self.common = set.intersection(*common) if common else set()

    def _number(self, graph: Graph) -> dict[str, int]:
        """A number for each live node: the same for nodes that compute the same from the same inputs and weights."""
        arguments = {value.node: name for name, value in graph.inputs.items()}
        numbers: dict[str, int] = {}
        for node in graph.live():
            key: Any
            if node in arguments:
                key = ("argument", arguments[node])
            elif node.name in graph.captures:
                key = ("capture", id(graph.captures[node.name].tensor))
            else:
                attrs = tuple(
                    (k, a.SerializeToString(deterministic=True))
                    for k, a in sorted(node.attrs.items())
                    if k not in ("_output_shapes", "_class")
                )
                reads = tuple((numbers[v.node.name], v.index) for v in node.inputs)
                alone = None if ops.is_pure(node.op) or ops.reads_state(node.op) else node.name
                key = (node.op, attrs, reads, tuple(numbers[c.name] for c in node.controls), alone)
            numbers[node.name] = self.table.setdefault(key, len(self.table))
        return numbers

    def _is_common(self, variant: Variant, node: Node) -> bool:
        return self.numbers[variant.name][node.name] in self.common

    def _why_not(self, variant: Variant) -> str | None:
        graph = variant.graph
        for node in graph.live():
            if self._is_common(variant, node):
                continue
            if node in graph.effects:
                return f"it has an effect of its own: {node.op}"
            if node.controls:
                return f"{node.op} waits for something else"
            if node.op in ("ReadVariableOp", "ResourceGather", "ResourceGatherNd"):
                capture = graph.captures.get(node.inputs[0].node.name)
                if capture is None or not capture.frozen:
                    return "it reads a variable that is written"
        return None

    def _shape_value(self) -> tuple[Value, bool] | None:
        """The value whose first sizes are batch and length (whether it has a length), in the first variant's graph."""
        variant = self.variants[0]
        graph = variant.graph
        for value in graph.inputs.values():
            if value.shape is not None and len(value.shape) > 1 and isinstance(value.shape[1], dims.Dim):
                return value, True
        wanted = [
            node.inputs[1].shape
            for v in self.variants
            for node in v.graph.live()
            if node.op == "GatherV2" and v.graph.is_static(node.inputs[0])
        ]
        wanted = [s for s in wanted if s is not None and len(s) == 2 and isinstance(s[1], dims.Dim)]
        for node in graph.live():
            for value in node.outputs:
                if value.shape is not None and value.shape[:2] in wanted and self._is_common(variant, node):
                    return value, True
        for value in graph.inputs.values():
            if value.shape and isinstance(value.shape[0], dims.Dim):
                return value, False
        return None

    def measurer(self, specs: tuple[tuple, dict]) -> Callable[[list[Any]], tuple[int, int | None]]:
        """(batch, length) of a request, given as arrays in the order of the inputs."""
        assert self.shape_value is not None
        value, has_length = self.shape_value
        graph = self.variants[0].graph.copy()
        twin = graph.nodes[value.node.name].outputs[value.index]
        graph.outputs = {"shape": Builder(graph, _SCOPE).Shape(twin, out_type=tf.int32)}
        graph.effects = []
        attempt = trial.Trial(graph, specs)

        def measured(sample: list[Any]) -> tuple[int, int | None]:
            shape = attempt.run(sample)[0]
            return int(shape[0]), int(shape[1]) if has_length else None

        return measured

    def build(self, tree: Leaf | Split) -> Graph:
        """The graph that chooses between the variants that `tree` names."""
        assert self.shape_value is not None
        named = list(dict.fromkeys(leaf.variant for leaf in leaves(tree)))
        used = [next(v for v in self.variants if v.name == name) for name in named]
        crossing = self._crossing(used)
        first = self.variants[0]
        graph = first.graph.copy()
        mine = {(self.numbers[first.name][n.name], v.index): v for n in graph.live() for v in n.outputs}
        arguments = [mine[key] for key in crossing]
        captures: dict[int, tuple[str, Any]] = {}  # variable -> the capture, over all variants
        for variant in used:
            held = variant.graph.captures
            live = {n.name for n in variant.graph.live() if not self._is_common(variant, n) or n.name in held}
            for name, capture in held.items():
                if name in live and self._needed(variant, variant.graph.nodes[name]):
                    captures.setdefault(id(capture.tensor), (name, capture))
        handles = []
        for key, (name, capture) in captures.items():
            known = next((n for n, c in graph.captures.items() if id(c.tensor) == key and n in graph.nodes), None)
            if known is None:
                node = graph.add(name, "Placeholder", [], {"dtype": tf.resource, "shape": []})
                node.output.shape = ()
                graph.captures[node.name] = capture
                known = node.name
            handles.append(graph.nodes[known].output)
        outputs = [k for k, v in first.graph.outputs.items() if not self._is_common(first, v.node)]
        signature = _signature([v.dtype for v in arguments], len(handles), [graph.outputs[k].dtype for k in outputs])
        branches = []
        for variant in used:
            definition = self._branch(variant, crossing, list(captures), outputs, signature, graph.library)
            graph.library[definition.signature.name] = definition
            branches.append(definition.signature.name)
        b = Builder(graph, _SCOPE)
        index = self._index(b, graph, tree, named)
        attrs = _case_attrs(branches, [graph.outputs[k] for k in outputs])
        node = graph.add(f"{_SCOPE}/Case", "StatelessCase", [index, *arguments, *handles], attrs)
        for result, value in zip(outputs, node.outputs):
            value.shape = graph.outputs[result].shape
            graph.outputs[result] = value
        kept = set(graph.live()) | {v.node for v in graph.inputs.values()}
        for dead in reversed([n for n in graph.order() if n not in kept]):
            graph.remove(dead)
            graph.captures.pop(dead.name, None)
        return graph

    def _crossing(self, used: Sequence[Variant]) -> list[tuple[int, int]]:
        """What goes into the branches, as (number, output): computed before them, and not made of weights alone."""
        found: dict[tuple[int, int], None] = {}
        for variant in used:
            for node in variant.graph.live():
                if self._is_common(variant, node):
                    continue
                for value in node.inputs:
                    if (
                        self._is_common(variant, value.node)
                        and not variant.graph.is_static(value)
                        and value.dtype != tf.resource
                    ):
                        found[(self.numbers[variant.name][value.node.name], value.index)] = None
        return list(found)

    def _needed(self, variant: Variant, handle: Node) -> bool:
        """Whether a branch reads a variable, by itself or through what is made of weights alone."""
        stack, seen = [handle.output], set()
        while stack:
            for reader in variant.graph.uses(stack.pop()):
                if reader in seen or reader.name not in self.numbers[variant.name]:
                    continue
                seen.add(reader)
                if not self._is_common(variant, reader):
                    return True
                stack.extend(v for v in reader.outputs if variant.graph.is_static(v))
        return False

    def _branch(self, variant: Variant, crossing, captured: list[int], outputs: list[str], signature, library):
        """A variant's own part as a function."""
        graph = variant.graph.copy()
        numbers = self.numbers[variant.name]
        graph.effects = []
        inner: dict[str, Value] = {}
        graph.outputs = {f"out_{i}": graph.outputs[k] for i, k in enumerate(outputs)}
        live = graph.live()
        for i, (number, index) in enumerate(crossing):
            twins = [n for n in live if numbers[n.name] == number]
            dtype = tf.as_dtype(signature.signature.input_arg[i].type)
            value = graph.add(f"arg_{i}", "Placeholder", [], {"dtype": dtype}).output
            value.node.name = _renamed(graph, value.node, f"arg_{i}")
            for twin in twins:
                value.shape = twin.outputs[index].shape
                graph.replace(twin.outputs[index], value)
            inner[f"arg_{i}"] = value
        by_variable = {id(c.tensor): n for n, c in graph.captures.items() if n in graph.nodes}
        for i, key in enumerate(captured, len(crossing)):
            value = graph.add(f"arg_{i}", "Placeholder", [], {"dtype": tf.resource, "shape": []}).output
            value.node.name = _renamed(graph, value.node, f"arg_{i}")
            value.shape = ()
            if key in by_variable:
                graph.replace(graph.nodes[by_variable[key]].output, value)
            inner[f"arg_{i}"] = value
        graph.inputs = inner
        library.update({k: v for k, v in graph.library.items() if k not in library})
        return functions.to_definition(graph, signature)

    def _index(self, b: Builder, graph: Graph, tree: Leaf | Split, named: list[str]) -> Value:
        """The number of the branch: int32[]."""
        assert self.shape_value is not None
        value, has_length = self.shape_value
        twin = graph.nodes[value.node.name].outputs[value.index]
        shape = b.Shape(twin, out_type=tf.int32)

        def size(axis: int) -> Value:
            return b.StridedSlice(shape, b.ints(axis), b.ints(axis + 1), b.ints(1), shrink_axis_mask=1)

        made: dict[str, Value] = {FEATURES[2]: size(0)}
        if has_length:
            made[FEATURES[1]] = size(1)
            made[FEATURES[0]] = b.Mul(made[FEATURES[2]], made[FEATURES[1]])
        else:
            made[FEATURES[0]] = made[FEATURES[2]]

        def number(part: Leaf | Split) -> Value:
            if isinstance(part, Leaf):
                return b.const(named.index(part.variant), tf.int32)
            high = b.GreaterEqual(made[part.feature], b.const(part.threshold, tf.int32))
            return b.SelectV2(high, number(part.high), number(part.low))

        return number(tree)


def _renamed(graph: Graph, node: Node, name: str) -> str:
    """Gives a node a name that a function's argument may have; what has it gives way."""
    if node.name != name:
        other = graph.nodes.pop(name)
        graph.nodes.pop(node.name)
        other.name, node.name = node.name, name
        graph.nodes[other.name], graph.nodes[name] = other, node
    return name


def _signature(dtypes: Sequence[tf.DType], handles: int, results: Sequence[tf.DType]) -> function_pb2.FunctionDef:
    definition = function_pb2.FunctionDef()
    definition.signature.name = _SCOPE
    for i, dtype in enumerate([*dtypes, *[tf.resource] * handles]):
        definition.signature.input_arg.add(name=f"arg_{i}", type=dtype.as_datatype_enum)
    for i, dtype in enumerate(results):
        definition.signature.output_arg.add(name=f"out_{i}", type=dtype.as_datatype_enum)
    return definition


def _case_attrs(branches: Sequence[str], results: Sequence[Value]) -> dict[str, Any]:
    called, shapes = ops.AttrValue(), ops.AttrValue()
    called.list.SetInParent()
    shapes.list.SetInParent()
    for name in branches:
        called.list.func.add(name=name)
    for value in results:
        shapes.list.shape.append(tf.TensorShape(graphdef.static_shape(value)).as_proto())
    # Lowered into the surrounding graph, the branches see TensorFlow's own passes, without which the internal fused ops
    # have no oneDNN kernels.
    return {
        "Tout": [v.dtype for v in results],
        "branches": called,
        "output_shapes": shapes,
        "_lower_using_switch_merge": True,
    }


def case_node(graph: Graph) -> Node:
    return next(n for n in graph.live() if n.name == f"{_SCOPE}/Case")


def branch_body(graph: Graph, name: str) -> Graph:
    return functions.from_definition(graph, name, functions.argument_shapes(case_node(graph)))

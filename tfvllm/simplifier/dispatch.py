"""One graph that computes the same in several ways, and chooses at run time by batch and length.

Packing tokens pays for a large batch and costs nodes for a single short request; a fused norm is faster over many rows
and slower over few. So the ways are measured on this CPU at the shapes of the user's requests, and where no single one
is best, the graph gets a branch: what all ways compute alike stands before it, the rest of each is a branch of one
`StatelessCase`, over the same variables, and a few comparisons of batch, length and their product choose.

The choice is a small decision tree. A branch has to earn its place: a way is chosen over the default only at shapes
where it is faster beyond the noise, and the finished graph is measured once more against the best single way.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import function_pb2

from tfvllm.errors import InputError
from tfvllm.graph import dims, functions, graphdef, ops, targets
from tfvllm.graph.builder import Builder
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.simplifier import cost, requests, trial, verify
from tfvllm.simplifier.requests import Kind
from tfvllm.simplifier.state import State

MEMORY_LIMIT = 2.0  # all ways together, as a multiple of the original's bytes of weights
FEATURES = ("batch × length", "length", "batch")
_LEAVES = 4
_WORTH = 0.03  # a branch must save this share of the time of the requests it takes
_WORTH_WEIGHTS = 0.10  # and this one if it brings weights of its own
_SCOPE = "tfvllm_dispatch"
_FEWEST, _MOST = 7, 200  # rounds of one measurement
_CONTENDER = 1.15  # what takes more than this times the fastest after the fewest rounds is not measured further
Rounds = dict[str, list[float]]  # way -> milliseconds in each round


@dataclass
class Way:
    """One way to compute the whole: its name, its graph, and how far its results may lie from the original's."""

    name: str
    graph: Graph
    slack: float = 0.0
    weights: dict[Any, int] = field(default_factory=dict)  # id of a variable, or of its packed copy -> bytes

    def __post_init__(self):
        for value in cost.packed_weights(self.graph):
            capture = self.graph.captures[value.node.inputs[0].node.name]
            self.weights["packed", id(capture.tensor)] = _bytes(capture.owner)
        for node in self.graph.live():
            capture = self.graph.captures.get(node.name)
            if capture is not None and isinstance(capture.owner, tf.Variable):
                self.weights[id(capture.tensor)] = _bytes(capture.owner)


def _bytes(variable: tf.Variable) -> int:
    return int(np.prod(variable.shape.as_list(), dtype=np.int64)) * variable.dtype.size


def styles(target: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """Ways to write a graph for a target: (name, target, rules left out). The first is the target's own."""
    if target == targets.PORTABLE:
        return [("public ops", target, ())]
    return [
        ("fused", target, ()),
        ("fused, plain norms", target, ("FuseLayerNorm",)),
        ("public ops", targets.PORTABLE, ()),
    ]


def name_of(*parts: str | bool) -> str:
    """A way's name: "float32, packed, fused"."""
    return ", ".join(str(p) for p in parts if p) or "rewritten"


def bytes_of(ways: Sequence[Way]) -> int:
    """Of the weights of all ways together, and of the packed copies that kernels keep, each counted once."""
    together: dict[Any, int] = {}
    for way in ways:
        together.update(way.weights)
    return sum(together.values())


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Point:
    """One kind of request, as measured: milliseconds of each round by way."""

    kind: Kind
    batch: int
    length: int | None
    tokens: int  # rows of the padded batch
    sample: list[Any]
    rounds: Rounds = field(default_factory=dict)

    def median(self, way: str) -> float:
        return statistics.median(self.rounds[way])

    def ratio(self, way: str, other: str) -> tuple[float, float]:
        """How many times as long `way` takes as `other`, and how far from it the truth may lie.

        The median over the rounds, in each of which both were measured; three standard errors of it, taken from the
        median absolute deviation, and one percent at least.
        """
        ratios = [a / b for a, b in zip(self.rounds[way], self.rounds[other])]
        middle = statistics.median(ratios)
        deviation = 1.4826 * statistics.median(abs(r - middle) for r in ratios)
        return middle, max(0.01, 3 * 1.2533 * deviation / math.sqrt(len(ratios)))

    def relative(self, way: str, other: str) -> float:
        """The ratio where it stands out from the noise, else 1."""
        middle, noise = self.ratio(way, other)
        return middle if abs(middle - 1) > noise else 1.0

    def feature(self, name: str) -> int:
        length = self.length or 1
        return {FEATURES[0]: self.batch * length, FEATURES[1]: length, FEATURES[2]: self.batch}[name]


def take_turns(calls: Mapping[str, Callable[[], Any]], rounds: int, seconds: float, warm: int = 0) -> Rounds:
    """Milliseconds of every call in each round; the order turns from round to round.

    `warm` untimed rounds, then `rounds`, or as many as are done in `seconds` (seven at least).
    """
    names = list(calls)
    times: Rounds = {name: [] for name in names}
    for _ in range(warm):
        for name in names:
            calls[name]()
    end = time.perf_counter() + seconds
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            calls[name]()
            times[name].append(1000 * (time.perf_counter() - began))
        if turn >= _FEWEST - 1 and time.perf_counter() > end:
            break
    return times


def measure(points: Sequence[Point], ways: Sequence[Way], specs: tuple[tuple, dict], seconds: float) -> None:
    """Times all ways at all points: a few rounds each, then more for those that may be the best somewhere."""
    state = State.of(ways[0].graph)
    made = {way.name: trial.Trial(way.graph, specs, state) for way in ways}
    calls = [{name: _fetched(attempt.call(point.sample)) for name, attempt in made.items()} for point in points]
    with state.kept():
        _measure(points, calls, seconds)


def _measure(points: Sequence[Point], calls: Sequence[Mapping[str, Callable[[], Any]]], seconds: float) -> None:
    began = time.perf_counter()
    for point, mine in zip(points, calls):
        point.rounds = take_turns(mine, _FEWEST, 0.0, warm=2)
    left = (seconds - (time.perf_counter() - began)) / len(points)
    overall = sorted(calls[0], key=lambda name: sum(p.kind.count * math.log(p.median(name)) for p in points))
    for point, mine in zip(points, calls):
        bar = _CONTENDER * min(point.median(name) for name in mine)
        chosen = [name for name in mine if name in overall[:2] or point.median(name) <= bar]
        for name, times in take_turns({n: mine[n] for n in chosen}, _MOST, left).items():
            point.rounds[name].extend(times)


def _fetched(call: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: [t.numpy() for t in call()]


# ------------------------------------------------------------------------------------------------------------ deciding


@dataclass
class Leaf:
    """The requests that come here are computed in this way."""

    way: str


@dataclass
class Split:
    """`feature` >= `threshold` goes to `high`."""

    feature: str
    threshold: int
    low: Leaf | Split
    high: Leaf | Split


def leaves(tree: Leaf | Split) -> list[Leaf]:
    return [tree] if isinstance(tree, Leaf) else [*leaves(tree.low), *leaves(tree.high)]


def splits(tree: Leaf | Split) -> list[Split]:
    return [] if isinstance(tree, Leaf) else [tree, *splits(tree.low), *splits(tree.high)]


def chosen(tree: Leaf | Split, point: Point) -> str:
    """The way that a request of this point's shape is computed in."""
    while isinstance(tree, Split):
        tree = tree.high if point.feature(tree.feature) >= tree.threshold else tree.low
    return tree.way


def lines(tree: Leaf | Split, conditions: tuple[str, ...] = ()) -> list[str]:
    """The decisions as sentences: "batch × length < 220: padded"."""
    if isinstance(tree, Leaf):
        return [f"{' and '.join(conditions) or 'always'}: {tree.way}"]
    below, above = f"{tree.feature} < {tree.threshold}", f"{tree.feature} ≥ {tree.threshold}"
    return [*lines(tree.low, (*conditions, below)), *lines(tree.high, (*conditions, above))]


def best_single(ways: Sequence[Way], points: Sequence[Point], limit: float) -> str:
    """The way with the smallest mean of the logarithm of the time: each request counts alike, short or long."""
    allowed = [w.name for w in ways if bytes_of([w]) <= limit] or [min(ways, key=lambda w: bytes_of([w])).name]
    return min(allowed, key=lambda w: sum(p.kind.count * math.log(p.median(w)) for p in points))


def decide(ways: Sequence[Way], points: Sequence[Point], limit: float) -> Leaf | Split:
    """The decision tree: grown split by split, as long as one saves enough beyond the noise.

    Args:
        limit: bytes that the weights of all chosen ways may take together.
    """
    default = best_single(ways, points, limit)
    by_name = {w.name: w for w in ways}
    # The time of each way at each point, relative to the default's; within the noise it is the default's.
    relative = {w.name: [p.relative(w.name, default) for p in points] for w in ways}
    counts = [p.kind.count for p in points]
    first = Leaf(default)
    tree: Leaf | Split = first
    mine = {id(first): list(range(len(points)))}  # leaf -> the points that come there
    while len(leaves(tree)) < _LEAVES:
        used = {leaf.way for leaf in leaves(tree)}
        held = bytes_of([by_name[w] for w in used])
        best: tuple[float, Leaf, Split] | None = None
        for leaf in leaves(tree):
            for feature, threshold in _thresholds([points[i] for i in mine[id(leaf)]]):
                for high in (False, True):
                    moved = [i for i in mine[id(leaf)] if (points[i].feature(feature) >= threshold) == high]
                    before = sum(counts[i] * relative[leaf.way][i] for i in moved)
                    for name in by_name:
                        together = bytes_of([by_name[w] for w in used | {name}])
                        gain = before - sum(counts[i] * relative[name][i] for i in moved)
                        worth = _WORTH_WEIGHTS if together > held else _WORTH
                        if together > limit or gain < worth * before or (best is not None and gain <= best[0]):
                            continue
                        sides = (Leaf(leaf.way), Leaf(name)) if high else (Leaf(name), Leaf(leaf.way))
                        best = (gain, leaf, Split(feature, threshold, *sides))
        if best is None:
            break
        _, old, new = best
        for side, high in ((new.low, False), (new.high, True)):
            here = mine[id(old)]
            mine[id(side)] = [i for i in here if (points[i].feature(new.feature) >= new.threshold) == high]
        tree = _grown(tree, old, new)
    return tree


def _grown(tree: Leaf | Split, old: Leaf, new: Split) -> Leaf | Split:
    if tree is old:
        return new
    if isinstance(tree, Split):
        return Split(tree.feature, tree.threshold, _grown(tree.low, old, new), _grown(tree.high, old, new))
    return tree


def _thresholds(points: Sequence[Point]) -> list[tuple[str, int]]:
    """Between any two neighbouring values of each feature, their geometric mean."""
    found = []
    for feature in FEATURES:
        values = sorted({p.feature(feature) for p in points})
        for low, high in itertools.pairwise(values):
            found.append((feature, min(high, max(low + 1, round(math.sqrt(low * high))))))
    return found


# ------------------------------------------------------------------------------------------------------------ building


class Merged:
    """Several ways side by side: what they compute alike, and where batch and length can be read off.

    Args:
        ways: graphs of the same inputs and outputs, made from the same original, so that equal sizes have equal names.

    Ways that cannot be branches (they have effects, or read variables that are written) are left out: see `declined`.
    """

    def __init__(self, ways: Sequence[Way]):
        self.table: dict[Any, int] = {}
        numbered = [(way, self._number(way.graph)) for way in ways]
        self.declined: dict[str, str] = {}
        self._settle(numbered)
        for way, _ in numbered:
            reason = self._why_not(way)
            if reason:
                self.declined[way.name] = reason
        self._settle([(w, n) for w, n in numbered if w.name not in self.declined])
        self.shape_value = self._shape_value() if self.ways else None

    def _settle(self, numbered: list[tuple[Way, dict[str, int]]]) -> None:
        self.ways = [way for way, _ in numbered]
        self.numbers = {way.name: numbers for way, numbers in numbered}  # way -> name of a node -> its number
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

    def _is_common(self, way: Way, node: Node) -> bool:
        return self.numbers[way.name][node.name] in self.common

    def _why_not(self, way: Way) -> str | None:
        graph = way.graph
        for node in graph.live():
            if self._is_common(way, node):
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
        """The value whose first sizes are batch and length (whether it has a length), in the first way's graph."""
        way = self.ways[0]
        graph = way.graph
        for value in graph.inputs.values():
            if value.shape is not None and len(value.shape) > 1 and isinstance(value.shape[1], dims.Dim):
                return value, True
        wanted = [
            node.inputs[1].shape
            for w in self.ways
            for node in w.graph.live()
            if node.op == "GatherV2" and w.graph.is_static(node.inputs[0])
        ]
        wanted = [s for s in wanted if s is not None and len(s) == 2 and isinstance(s[1], dims.Dim)]
        for node in graph.live():
            for value in node.outputs:
                if value.shape is not None and value.shape[:2] in wanted and self._is_common(way, node):
                    return value, True
        for value in graph.inputs.values():
            if value.shape and isinstance(value.shape[0], dims.Dim):
                return value, False
        return None

    def measurer(self, specs: tuple[tuple, dict]) -> Callable[[list[Any]], tuple[int, int | None]]:
        """(batch, length) of a request, given as arrays in the order of the inputs."""
        assert self.shape_value is not None
        value, has_length = self.shape_value
        graph = self.ways[0].graph.copy()
        twin = graph.nodes[value.node.name].outputs[value.index]
        graph.outputs = {"shape": Builder(graph, _SCOPE).Shape(twin, out_type=tf.int32)}
        graph.effects = []
        attempt = trial.Trial(graph, specs)

        def measured(sample: list[Any]) -> tuple[int, int | None]:
            shape = attempt.run(sample)[0]
            return int(shape[0]), int(shape[1]) if has_length else None

        return measured

    def build(self, tree: Leaf | Split) -> Graph:
        """The graph that chooses between the ways that `tree` names."""
        assert self.shape_value is not None
        named = list(dict.fromkeys(leaf.way for leaf in leaves(tree)))
        used = [next(w for w in self.ways if w.name == name) for name in named]
        crossing = self._crossing(used)
        first = self.ways[0]
        graph = first.graph.copy()
        mine = {(self.numbers[first.name][n.name], v.index): v for n in graph.live() for v in n.outputs}
        arguments = [mine[key] for key in crossing]
        captures: dict[int, tuple[str, Any]] = {}  # variable -> the capture, over all ways
        for way in used:
            live = {n.name for n in way.graph.live() if not self._is_common(way, n) or n.name in way.graph.captures}
            for name, capture in way.graph.captures.items():
                if name in live and self._needed(way, way.graph.nodes[name]):
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
        for way in used:
            definition = self._branch(way, crossing, list(captures), outputs, signature, graph.library)
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

    def _crossing(self, used: Sequence[Way]) -> list[tuple[int, int]]:
        """What goes into the branches, as (number, output): computed before them, and not made of weights alone."""
        found: dict[tuple[int, int], None] = {}
        for way in used:
            for node in way.graph.live():
                if self._is_common(way, node):
                    continue
                for value in node.inputs:
                    if (
                        self._is_common(way, value.node)
                        and not way.graph.is_static(value)
                        and value.dtype != tf.resource
                    ):
                        found[(self.numbers[way.name][value.node.name], value.index)] = None
        return list(found)

    def _needed(self, way: Way, handle: Node) -> bool:
        """Whether a branch reads a variable, by itself or through what is made of weights alone."""
        stack, seen = [handle.output], set()
        while stack:
            for reader in way.graph.readers(stack.pop()):
                if reader in seen or reader.name not in self.numbers[way.name]:
                    continue
                seen.add(reader)
                if not self._is_common(way, reader):
                    return True
                stack.extend(v for v in reader.outputs if way.graph.is_static(v))
        return False

    def _branch(self, way: Way, crossing, captured: list[int], outputs: list[str], signature, library):
        """A way's own part as a function."""
        graph = way.graph.copy()
        numbers = self.numbers[way.name]
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
                return b.const(named.index(part.way), tf.int32)
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


# ------------------------------------------------------------------------------------------------------- all of it


@dataclass(frozen=True)
class Options:
    """What a user may choose: the requests, and how much memory all ways together may take."""

    kinds: tuple[Kind, ...]
    memory_limit: float = MEMORY_LIMIT  # a multiple of the original's bytes of weights
    seconds: float = 40.0  # for measuring one signature, about

    @classmethod
    def check(cls, profile: Any, memory_limit: float | None) -> Options | None:
        """The options, None without a profile, or an InputError."""
        if profile is None:
            if memory_limit is not None:
                raise InputError("memory_limit is for dispatch by shape; give a profile of requests with it.")
            return None
        if memory_limit is not None and not 0 < memory_limit < math.inf:
            raise InputError(f"memory_limit: expected a number above 0, found {memory_limit}.")
        return cls(tuple(requests.read(profile)), MEMORY_LIMIT if memory_limit is None else memory_limit)

    def limit(self, original: Way) -> float:
        return self.memory_limit * bytes_of([original])

    def for_inputs(self, names: Sequence[str]) -> list[Kind]:
        """The kinds that a signature with these inputs can be asked."""
        return [k for k in self.kinds if k.inputs is None or set(k.inputs) == set(names)]


@dataclass
class Outcome:
    """The graph to export, how it compares with the original, and what was measured and decided."""

    graph: Graph
    comparison: verify.Comparison
    details: dict[str, Any]
    example: Graph | None = None  # the way that is chosen at batch 1, length 128; None where there is no choice


def count(outcome: Outcome) -> dict[str, Any]:
    """Costs as `cost.count` has them: nodes and weights of all branches together, FLOPs of the one that runs."""
    found = cost.count(outcome.graph)
    if outcome.example is not None:
        bodies = [_body(outcome.graph, name) for name in functions.names_in(_case(outcome.graph), "branches")]
        counted = [cost.count(body) for body in bodies]
        found["nodes"] += sum(c["nodes"] for c in counted)
        for c in counted:
            for op, times in c["ops"].items():
                found["ops"][op] = found["ops"].get(op, 0) + times
        found["flops"] = cost.count(outcome.example)["flops"]
    return found


def run(ways: Sequence[Way], specs: tuple[tuple, dict], verifier: verify.Verifier, options: Options) -> Outcome:
    """Measures the ways on the requests of the profile, and makes the graph that chooses between them.

    Args:
        ways: verified ways to compute the same; the original is the last.
        specs: (args, kwargs) of the signature, as for `convert.to_concrete`.
        verifier: holds the original and the samples that every result is compared on.

    The result is one of the ways, unchanged, where choosing does not pay.
    """
    original = ways[-1]
    kinds = options.for_inputs(list(original.graph.inputs))
    merged = Merged(ways)
    if not kinds or merged.shape_value is None:
        why = "no size of its inputs is unknown: every request has one shape"
        if not kinds:
            why = "the profile holds no requests with these inputs"
        return _single(ways[0], verifier, [], {"reason": why, "declined": merged.declined})
    measured = merged.measurer(specs)
    kinds = requests.summed_up([_seen(k, original.graph, measured) for k in kinds])
    points = []
    for kind in kinds:
        sample = requests.sample(original.graph, kind, measured)
        batch, length = measured(sample)
        points.append(Point(kind, batch, length, sum(kind.lengths) if kind.lengths else batch * (length or 1), sample))
    measure(points, ways, specs, options.seconds)
    limit = options.limit(original)
    tree = decide(merged.ways, points, limit)
    default = best_single(merged.ways, points, limit)
    details: dict[str, Any] = {"declined": merged.declined, "limit": int(limit)}
    by_name = {w.name: w for w in merged.ways}
    if isinstance(tree, Leaf):
        details["reason"] = "no other way is faster anywhere beyond the noise, by enough to pay"
        return _single(by_name[default], verifier, points, details)
    graph = merged.build(tree)
    used = [by_name[name] for name in dict.fromkeys(leaf.way for leaf in leaves(tree))]
    slack = max(w.slack for w in used)
    comparison = verifier.compare(graph, slack)
    shapes, empty = _check_shapes(original.graph, tree, points, verifier, measured)
    if shapes:
        around = verify.Verifier(original.graph, specs, [s for _, s in shapes], verifier.rtol, verifier.atol)
        comparison = joined(comparison, around.compare(graph, slack))
    if not comparison.agrees:
        details["reason"] = f"the graph that chooses is wrong ({comparison.failures[0]}); please report this"
        return _single(by_name[default], verifier, points, details)
    details["checked"] = [list(shape) for shape, _ in shapes]
    details["empty_batch"] = empty
    duels = [Point(p.kind, p.batch, p.length, p.tokens, p.sample) for p in points]
    measure(duels, [by_name[default], Way(CHOOSING, graph)], specs, options.seconds / 2)
    total = sum(p.kind.count for p in duels)
    saved = 1 - sum(p.kind.count * p.relative(CHOOSING, default) for p in duels) / total
    details["saved"] = saved
    if saved < 0.01:
        details["reason"] = (
            f"the branch costs what it saves: the mean request takes {1 - saved:.2f} times as long with it"
        )
        return _single(by_name[default], verifier, points, details)
    details |= {
        "pays": True,
        "bytes": bytes_of(used),
        "ways": _ways(used, points),
        "decision": lines(tree),
        "points": _rows(points, tree, duels),
        "default": default,
    }
    return Outcome(graph, comparison, details, by_name[_at_example(tree)].graph)


CHOOSING = "chosen at run time"


def joined(first: verify.Comparison, second: verify.Comparison) -> verify.Comparison:
    """Two comparisons as one: all samples, the largest differences."""
    worst = max(first, second, key=lambda c: c.max_abs_error / (c.tolerance or 1.0))
    checked = {k: first.checked.get(k, 0) + second.checked.get(k, 0) for k in {**first.checked, **second.checked}}
    return verify.Comparison(
        first.samples + second.samples,
        max(first.max_abs_error, second.max_abs_error),
        max(first.max_rel_error, second.max_rel_error),
        worst.tolerance,
        first.yardstick,
        [*first.failures, *second.failures],
        {k: why for k, why in {**second.unverified, **first.unverified}.items() if k not in checked},
        checked,
        first.random,
    )


def _seen(kind: Kind, graph: Graph, measured: Callable[[list[Any]], tuple[int, int | None]]) -> Kind:
    """A real request with its batch and length as the graph sees them."""
    if kind.inputs is None:
        return kind
    batch, length = measured(requests.sample(graph, kind, measured))
    return Kind(batch, length, kind.lengths, kind.count, kind.inputs)


def _check_shapes(graph: Graph, tree: Leaf | Split, points: Sequence[Point], verifier: verify.Verifier, measured):
    """Requests on both sides of every threshold, of one row, and of none where the original takes that.

    Their rows are of different lengths, so that there is padding.

    Returns:
        [((batch, length), sample)], and what became of the empty batch.
    """
    wanted: dict[tuple[int, int | None], None] = {}
    for split in splits(tree):
        near = min(points, key=lambda p: abs(math.log(p.feature(split.feature) / split.threshold)))
        rows, size, at = near.batch, near.length or 1, split.threshold
        if split.feature == FEATURES[2]:
            pairs = [(at - 1, size), (at, size)]
        elif split.feature == FEATURES[1]:
            pairs = [(rows, at - 1), (rows, at)]
        else:
            above = -(-at // size)
            pairs = [(above - 1, size), (above, size)] if above > 1 else [(1, at - 1), (1, at)]
        wanted.update({(b, n if near.length else None): None for b, n in pairs if b > 0 and n > 0})
    for point in (min(points, key=lambda p: p.tokens), max(points, key=lambda p: p.length or 1)):
        wanted[1, point.length] = None
    found = []
    for batch, length in wanted:
        each = None if length is None else tuple(max(1, length - (i * 7) % length) for i in range(batch))
        sample = requests.sample(graph, Kind(batch, length, each), measured)
        found.append((measured(sample), sample))
    nothing = requests.sample(graph, Kind(0, points[0].length, ()), measured)
    try:
        verifier.run(verifier.original, nothing)
    except (tf.errors.OpError, ValueError):
        return found, "the original fails on it"
    return [*found, ((0, points[0].length), nothing)], "checked"


def _single(way: Way, verifier: verify.Verifier, points: Sequence[Point], details, duels=()) -> Outcome:
    """One way for all requests."""
    tree = Leaf(way.name)
    details = {
        **details,
        "pays": False,
        "bytes": bytes_of([way]),
        "ways": [],
        "decision": lines(tree),
        "points": _rows(points, tree, duels),
        "default": way.name,
    }
    return Outcome(way.graph, verifier.compare(way.graph, way.slack), details)


def _ways(used: Sequence[Way], points: Sequence[Point]) -> list[dict[str, Any]]:
    return [{"name": w.name, "nodes": cost.count(w.graph)["nodes"], "bytes": bytes_of([w])} for w in used]


def _rows(points: Sequence[Point], tree: Leaf | Split, duels: Sequence[Point] = ()) -> list[dict[str, Any]]:
    """The decision table: one row a kind of request. `again`: the default beside the graph that chooses."""
    rows = []
    for i, point in enumerate(points):
        name = chosen(tree, point)
        row = {
            "batch": point.batch,
            "length": point.length,
            "tokens": point.tokens,
            "count": point.kind.count,
            "ms": {n: round(point.median(n), 4) for n in point.rounds},
            "noise": {n: round(point.ratio(n, name)[1], 4) for n in point.rounds if n != name},
            "choice": name,
        }
        if duels:
            row["again"] = {n: round(duels[i].median(n), 4) for n in duels[i].rounds}
        rows.append(row)
    return rows


def _case(graph: Graph) -> Node:
    return next(n for n in graph.live() if n.name == f"{_SCOPE}/Case")


def _body(graph: Graph, name: str) -> Graph:
    return functions.from_definition(graph, name, functions.argument_shapes(_case(graph)))


def _at_example(tree: Leaf | Split) -> str:
    """The way at the shape that FLOPs are counted at: batch 1, length 128."""
    return chosen(tree, Point(Kind(1, 128), 1, 128, 128, []))

"""What follows from unchanging weights alone is computed once, now, into a new variable."""

import numpy as np

from tfvllm.graph import executable, ops
from tfvllm.graph.guarantee import Exact
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.rewriter import Pass

TOGETHER = 1 << 22  # bytes of sources that are computed with in one go
SMALL = 1 << 20  # bytes that may be added for a folded weight whose sources stay in use
PACKED = 8  # bytes of float32 for a byte of weights, at most: there two int4 weights share one


class FoldWeights(Pass):
    """f(w1, w2, …) -> w.   The sources go unless something else still reads them.

    A result is kept only if the model does not grow by it: it replaces its sources, or it is under 1 MiB. Weights of a
    byte or less may grow where a lower precision follows, which makes them small again.
    """

    guarantee = Exact()  # TensorFlow's own kernels compute the new weight

    def __init__(self, unpack: bool = False):
        self.unpack = unpack  # whether weights of a byte or less may become floats

    def run(self, rewriter):
        graph = rewriter.graph
        frontier = [v for v in self._frontier(graph) if rewriter.allowed(self, v.node)]
        if rewriter.limit is not None:
            frontier = frontier[: max(0, rewriter.limit - len(rewriter.fired))]
        folded = [v for v in frontier if self._pays(rewriter, v)]
        for value, key, content in self._contents(rewriter, folded):
            new = graph.weight(graph.unique(value.node.name + "/folded"), content, value.dtype)
            rewriter.shared_weights[key] = graph.captures[new.node.inputs[0].node.name].owner
            rewriter.fire(self, value.node)
            graph.replace(value, new)
        return bool(folded)

    def _pays(self, rewriter, value: Value) -> bool:
        graph, size = rewriter.graph, _bytes(value)
        sources = _sources(graph, value)
        leaving = [s for s in sources if self._only_feeds(graph, s, value)]
        held = sum((_bytes(s) or 0) * (PACKED if self.unpack and s.dtype.size == 1 else 1) for s in leaving)
        if size is not None and size <= held + SMALL:
            return True
        reason = "the folded weight would be kept beside its sources, which others read"
        if size is not None and len(leaving) == len(sources):
            reason = f"the folded weight would take {size / max(1, held):.0f} times the bytes of its sources"
            if any(s.dtype.size == 1 for s in sources):
                reason += "; precision int8 (target onednn) or bfloat16 unpacks it"
        rewriter.decline(self, value.node, reason)
        return False

    @staticmethod
    def _contents(rewriter, values: list[Value]):
        """Each value, its key, and its content or the variable that holds it; computed a few MiB at a time."""
        graph, known = rewriter.graph, rewriter.shared_weights
        keys = {v: _key(graph, v) for v in values}
        while values:
            batch: list[Value] = []
            size = 0
            while values and (not batch or size < TOGETHER):
                batch.append(values[0])
                size += sum(_bytes(s) or 0 for s in _sources(graph, values[0]))
                values = values[1:]
            new = {keys[v]: v for v in batch if keys[v] not in known}
            sources = {s: graph.array(s) for v in new.values() for s in _sources(graph, v)}
            arrays = dict(zip(new, executable.evaluate(graph, list(new.values()), sources)))
            for value in batch:
                yield value, keys[value], known.get(keys[value], arrays.get(keys[value]))

    @staticmethod
    def _frontier(graph: Graph) -> list[Value]:
        static: set[Node] = set()
        leaves: set[Node] = set()
        for node in graph.order():
            if node.op == "Const" or (node.outputs and graph.is_weight(node.output)):
                leaves.add(node)
            elif (
                node.inputs
                and len(node.outputs) == 1
                and ops.is_pure(node.op)
                and all(v.node in static or v.node in leaves for v in node.inputs)
                and not all(v.node.op == "Const" for v in node.inputs)
            ):
                static.add(node)
        return [
            n.output
            for n in graph.order()
            if n in static and (graph.is_output(n.output) or any(r not in static for r in graph.uses(n.output)))
        ]

    @staticmethod
    def _only_feeds(graph: Graph, source: Value, value: Value) -> bool:
        """Whether everything that reads a source does so for `value`."""
        inside: set[Node] = set()
        stack = [value.node]
        while stack:
            node = stack.pop()
            if node not in inside:
                inside.add(node)
                stack.extend(v.node for v in node.inputs)
        handle = source.node.inputs[0] if source.node.op == "ReadVariableOp" else source
        reads = [r for r in graph.uses(handle) if r in inside] if handle is not source else [source.node]
        if handle is not source and len(reads) != len(graph.uses(handle)):
            return False
        for node in inside:
            if node is value.node or node.op in ("Placeholder", "Const") or source.node not in _feeds(node):
                continue
            if any(r not in inside for v in node.outputs for r in graph.uses(v)):
                return False
        return True


def _feeds(node: Node) -> set[Node]:
    seen: set[Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            stack.extend(v.node for v in n.inputs)
    return seen


def _key(graph: Graph, value: Value) -> tuple:
    """Equal for the same expression over the same variables, whichever signature it stands in."""
    node = value.node
    if node.op == "Const":
        return ("const", node.attrs["value"].SerializeToString(deterministic=True))
    if graph.is_weight(value):
        return ("weight", id(graph.captures[node.inputs[0].node.name].tensor))
    attrs = tuple(sorted((k, a.SerializeToString(deterministic=True)) for k, a in node.attrs.items()))
    return (node.op, attrs, *(_key(graph, v) for v in node.inputs))


def _sources(graph: Graph, value: Value) -> list[Value]:
    found: dict[Value, None] = {}
    stack = [value]
    seen = set()
    while stack:
        v = stack.pop()
        if graph.is_weight(v):
            found[v] = None
        elif v not in seen:
            seen.add(v)
            stack.extend(v.node.inputs)
    return list(found)


def _bytes(value: Value) -> int | None:
    if value.shape is None or not all(isinstance(d, int) for d in value.shape):
        return None
    return int(np.prod(value.shape, dtype=np.int64)) * value.dtype.size

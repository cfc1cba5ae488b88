"""Common subexpressions: what is computed twice is computed once."""

from tfvllm.graph import op_traits, ops
from tfvllm.graph.guarantee import Exact
from tfvllm.graph.ir import Graph, Node
from tfvllm.graph.rewriter import Pass


class MergeDuplicates(Pass):
    """f(x), f(x) -> y = f(x), y, y.   Constants, reads of unchanging weights, and sizes that are provably equal too."""

    guarantee = Exact()

    def run(self, rewriter):
        graph = rewriter.graph
        seen: dict[tuple, Node] = {}
        contents: dict[tuple, Node] = {}
        changed = False
        for node in graph.order():
            if not node.outputs or graph.nodes.get(node.name) is not node:
                continue
            first = self._twin(graph, node, seen, contents)
            if first is None or not any(v.uses or graph.is_output(v) for v in node.outputs):
                continue
            if not rewriter.allowed(self, node):
                continue
            self.substitute(rewriter, node, *first.outputs)
            changed = True
        return changed

    @staticmethod
    def _twin(graph: Graph, node: Node, seen: dict, contents: dict) -> Node | None:
        read = graph.is_weight(node.output)
        if not read and (not ops.is_pure(node.op) or node.op == "Placeholder"):
            return None
        value = node.output
        if len(node.outputs) == 1 and node.op != "Const" and value.known_value is not None:
            rank = 1 if isinstance(value.known_value, tuple) else 0
            first = _first(graph, contents, (value.dtype, rank, value.known_value), node)
            if first is not node:
                return first
        inputs = [(id(v.node), v.index) for v in node.inputs]
        if node.op in op_traits.COMMUTATIVE:
            inputs.sort()
        attrs = tuple(sorted((k, a.SerializeToString(deterministic=True)) for k, a in node.attrs.items()))
        first = _first(graph, seen, (node.op, tuple(inputs), attrs), node)
        return None if first is node else first


def _first(graph: Graph, known: dict, key: tuple, node: Node) -> Node:
    """The first node of its kind that is still there: merging others may have left one without readers."""
    first = known.setdefault(key, node)
    if graph.nodes.get(first.name) is not first:
        first = known[key] = node
    return first

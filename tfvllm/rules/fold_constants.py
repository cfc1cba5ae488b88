"""What follows from constants alone is computed now."""

import numpy as np
import tensorflow as tf

from tfvllm.graph import executable, infer, ops
from tfvllm.graph.guarantee import Exact
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.rewriter import Pass

MAX_ELEMENTS = 16_384


class FoldConstants(Pass):
    """f(c1, c2, …) -> c, where the result has at most 16,384 elements or is no larger than what it is made from.

    Integer tensors that hold sizes (the shape of a reshape) fold as soon as all their sizes are known, even where the
    tensor whose shape was asked for is not constant.
    """

    guarantee = Exact()  # TensorFlow's own kernels compute the constant

    def run(self, rewriter):
        graph = rewriter.graph
        changed = False
        for node in list(graph.nodes.values()):
            for value in node.outputs:
                if node.op != "Const" and value.uses and _known(value) and rewriter.allowed(self, node):
                    array = np.asarray(value.known_value, value.dtype.as_numpy_dtype)
                    self._replace(rewriter, value, array)
                    changed = True
        frontier = self._foldable(graph)
        frontier = [v for v in frontier if rewriter.allowed(self, v.node)]
        if rewriter.limit is not None:
            frontier = frontier[: max(0, rewriter.limit - len(rewriter.fired))]
        for value, array in zip(frontier, executable.evaluate(graph, frontier, {})):
            if array.size <= max(MAX_ELEMENTS, sum(_elements(v) for v in value.node.inputs)):
                self._replace(rewriter, value, array)
                changed = True
        return changed

    def _replace(self, rewriter, value: Value, array: np.ndarray) -> None:
        graph = rewriter.graph
        node = graph.add(value.node.name + "/folded", "Const", [], {"dtype": value.dtype, "value": array})
        infer.infer_node(graph, node)
        rewriter.fire(self, value.node)
        graph.replace(value, node.output)

    @staticmethod
    def _foldable(graph: Graph) -> list[Value]:
        """The last values of constant expressions, in order."""
        constant: dict[Node, None] = {}  # in order: graphs that are alike come out alike
        for node in graph.order():
            if node.op == "Const" or (
                node.inputs
                and ops.is_pure(node.op)
                and all(v.node in constant for v in node.inputs)
                and not any(a.WhichOneof("value") == "func" for a in node.attrs.values())
                and all(v.dtype not in (tf.resource, tf.variant) and _small(v, node) for v in node.outputs)
            ):
                constant[node] = None
        return [
            v
            for n in constant
            if n.op != "Const"
            for v in n.outputs
            if graph.is_output(v) or any(r not in constant for r in graph.uses(v))
        ]


def _known(value: Value) -> bool:
    content = value.known_value
    if content is None:
        return False
    return all(isinstance(c, int) and c >= 0 for c in (content if isinstance(content, tuple) else (content,)))


def _elements(value: Value) -> int:
    if value.shape is None or not all(isinstance(d, int) for d in value.shape):
        return 0
    return int(np.prod(value.shape, dtype=np.int64))


def _small(value: Value, node: Node) -> bool:
    if value.shape is None or not all(isinstance(d, int) for d in value.shape):
        return True  # only evaluation can tell; the result is measured before it is kept
    return _elements(value) <= max(MAX_ELEMENTS, sum(_elements(v) for v in node.inputs))

"""The heads of query, key and value are moved in front in one go."""

from tfvllm.graph import dims
from tfvllm.graph.guarantee import Exact
from tfvllm.graph.ir import Node
from tfvllm.graph.rewriter import NodePass

_HEADS_FIRST = (0, 2, 1, 3)


class OneTransposeForHeads(NodePass):
    """[transpose(reshape(p, [b, s, h, d])) for p in split(y, n)] -> unpack(transpose(reshape(y, [b, s, n, h, d]))).

    Splitting copies every part and each transpose copies it again; one transpose copies once, and unpacking its first
    axis copies nothing.
    """

    guarantee = Exact()
    ops = frozenset({"Split"})

    def rewrite(self, b, node):
        moved = self._moved(b.graph, node)
        if moved is None:
            return None
        batch, length, heads, size = moved[0].inputs[0].shape
        y = node.inputs[1]
        whole = b.reshape(y, (batch, length, len(moved), heads, size), like=[y])
        parts = b.op("Unpack", [b.Transpose(whole, b.ints(2, 0, 3, 1, 4))], num=len(moved), axis=0)
        return {old.output: new for old, new in zip(moved, parts)}

    @staticmethod
    def _moved(graph, node: Node) -> list[Node] | None:
        """The transposes at the ends of the parts, if each part goes into just one such."""
        axis, y = node.inputs[0].known_value, node.inputs[1]
        if y.shape is None or len(y.shape) != 2 or axis not in (1, -1):
            return None
        transposes = []
        for part in node.outputs:
            reshape = graph.single_use(part)
            if reshape is None or reshape.op != "Reshape" or reshape.output.rank != 4:
                return None
            transpose = graph.single_use(reshape.output)
            if transpose is None or transpose.op != "Transpose" or transpose.inputs[1].known_value != _HEADS_FIRST:
                return None
            transposes.append(transpose)
        shape = transposes[0].inputs[0].shape
        heads, size = shape[2:]
        if any(t.inputs[0].shape != shape for t in transposes) or dims.multiply(heads, size) != node.output.shape[1]:
            return None
        return transposes

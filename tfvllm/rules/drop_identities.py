"""Nodes that give back what they are given."""

import numpy as np

from tfvllm.graph import op_traits
from tfvllm.graph.guarantee import Exact
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.rewriter import NodePass

_MAYBE = op_traits.RESHAPES | op_traits.SLICES | {"BroadcastTo", "EnsureShape", "Tile"}
_BY_ONE = frozenset({"Mul", "RealDiv", "Div", "Pow"})


class DropIdentities(NodePass):
    """Identity(x), Cast to its own type, Reshape to its own shape, Transpose in order, x·1, x/1, … -> x."""

    guarantee = Exact()
    ops = (op_traits.IDENTITIES | _MAYBE | _BY_ONE) | {"IdentityN", "Cast", "Transpose", "ConcatV2", "SelectV2"}

    def rewrite(self, b, node):
        graph = b.graph
        if node.op == "IdentityN":  # which custom gradients leave behind: each output is its input
            read = any(v.uses or graph.is_output(v) for v in node.outputs)
            return dict(zip(node.outputs, node.inputs)) if read else None
        if not node.outputs or not (node.output.uses or graph.is_output(node.output)):
            return None
        same = self._same(graph, node)
        return None if same is None else {node.output: same}

    @staticmethod
    def _same(graph: Graph, node: Node) -> Value | None:
        if not node.inputs or len(node.outputs) != 1:
            return None
        x, y = node.inputs[0], node.output
        if node.op in op_traits.IDENTITIES:
            return x
        if node.op == "Cast":
            return x if x.dtype == y.dtype else None
        if node.op in _MAYBE:  # where the shape stays
            if x.shape is None or x.shape != y.shape:
                return None
            if node.op == "StridedSlice" and node.inputs[3].known_value is not None:
                # Equal shapes with strides of 1 leave no room for another start.
                return x if all(s == 1 for s in node.inputs[3].known_value) else None
            return x if node.op != "StridedSlice" else None
        if node.op == "Transpose":
            perm = node.inputs[1].known_value
            return x if perm is not None and tuple(perm) == tuple(range(len(perm))) else None
        if node.op == "ConcatV2" and len(node.inputs) == 2:
            return x
        if node.op in _BY_ONE:
            pairs = [(node.inputs[0], node.inputs[1])]
            if node.op == "Mul":
                pairs.append((node.inputs[1], node.inputs[0]))
            for kept, other in pairs:
                array = graph.constant(other)
                if array is not None and array.size and np.all(array == 1) and kept.shape == y.shape is not None:
                    return kept
        if node.op == "SelectV2":
            array = graph.constant(node.inputs[0])
            if array is not None and array.size:
                for choice, branch in ((True, node.inputs[1]), (False, node.inputs[2])):
                    if np.all(array == choice) and branch.shape is not None and branch.shape == y.shape:
                        return branch
        return None

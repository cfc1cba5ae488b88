"""Products of one tensor with several weights become one wide product."""

from collections import defaultdict

from tfvllm.graph.builder import Builder
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.ir import Node, Value
from tfvllm.graph.rewriter import Pass, short


class MergeParallelMatMuls(Pass):
    """[x@A + a, x@B + b, …] -> split(x@[A|B|…] + [a|b|…]).   One wide product reads x once (Q/K/V; gate and up)."""

    guarantee = Reordered()  # the same terms; a wider product may sum them in another order

    def run(self, rewriter):
        graph = rewriter.graph
        groups: dict[tuple, list[Node]] = defaultdict(list)
        for node in graph.order():
            if node.op == "MatMul" and not node.attr("transpose_a") and node.output.uses:
                groups[(id(node.inputs[0].node), node.inputs[0].index, node.attr("transpose_b"))].append(node)
        changed = False
        for nodes in groups.values():
            # Products of weights are folded soon; one of them may even be made from another.
            if len(nodes) > 1 and not graph.is_static(nodes[0].inputs[0]):
                changed |= self._merge(rewriter, nodes)
        return changed

    def _merge(self, rewriter, nodes: list[Node]) -> bool:
        graph = rewriter.graph
        mergeable = []
        for node in nodes:
            width = node.output.shape[-1] if node.output.shape else None
            if not graph.is_static(node.inputs[1]):
                rewriter.decline(self, node, f"the second operand of {short(node.name)} is not a weight")
            elif not graph.is_private(node.inputs[1]):
                rewriter.decline(self, node, "others read its weight too, which would have to be stored twice")
            elif not isinstance(width, int):
                rewriter.decline(self, node, "the width of the product is unknown")
            else:
                mergeable.append(node)
        biases = [_bias(graph, n) for n in mergeable]
        with_bias = [n for n, bias in zip(mergeable, biases) if bias is not None]
        without = [n for n, bias in zip(mergeable, biases) if bias is None]
        changed = False
        for group in (with_bias, without):
            if len(group) < 2:
                continue
            if group is without and with_bias:
                for node in group:
                    rewriter.decline(self, node, "its neighbours have a bias and it has none")
            if not rewriter.allowed(self, group[0]):
                continue
            self._replace(rewriter, group)
            changed = True
        return changed

    def _replace(self, rewriter, nodes: list[Node]) -> None:
        graph = rewriter.graph
        transpose_b = bool(nodes[0].attr("transpose_b"))
        b = Builder(graph, nodes[0].name + "/merged")
        weights = [n.inputs[1] for n in nodes]
        merged = b.ConcatV2(*weights, b.const(0 if transpose_b else 1))
        y = b.MatMul(nodes[0].inputs[0], merged, transpose_b=transpose_b)
        biases = [bias for bias in (_bias(graph, n) for n in nodes) if bias is not None]
        outputs: list[Value] = [n.output for n in nodes]
        if len(biases) == len(nodes):
            y = b.BiasAdd(y, b.ConcatV2(*(bias.inputs[1] for bias in biases), b.const(0)))
            outputs = [bias.output for bias in biases]
        widths = [n.output.shape[-1] for n in nodes]
        if len(set(widths)) == 1:
            parts = b.op("Split", [b.const(1), y], num_split=len(nodes))
        else:
            parts = b.op("SplitV", [y, b.ints(*widths), b.const(1)], num_split=len(nodes))
        rewriter.fire(self, nodes[0])
        for old, new in zip(outputs, parts):
            graph.replace(old, new)
            self.removed(rewriter, old.node)


def _bias(graph, node: Node) -> Node | None:
    reader = graph.single_use(node.output)
    if reader is not None and reader.op == "BiasAdd" and graph.is_static(reader.inputs[1]):
        return reader
    return None

"""Where attention is in a graph: two batched products with a softmax between them."""

from tfvllm.graph import op_traits
from tfvllm.graph.ir import Graph, Node

_BETWEEN = op_traits.ARITHMETIC | {"SelectV2"}  # what masks and scales


def core(graph: Graph, softmax: Node, *, blanked: bool = False) -> list[Node] | None:
    """Product, what masks and scales its scores, softmax, product: in order, each read by the next alone.

    The products are BatchMatMulV2 of rank 4, and the softmax or what follows it is the left operand of the second.

    Args:
        blanked: whether masks may also stand between the softmax and the second product.

    Returns:
        The nodes, or None if `softmax` is not in the middle of such.
    """
    chain = _from_matmul(graph, softmax)
    if chain is None:
        return None
    value, last = softmax.output, graph.single_use(softmax.output)
    while blanked and last is not None and last.op == "SelectV2" and last.output.rank == 4:
        chain.append(last)
        value, last = last.output, graph.single_use(last.output)
    if last is None or last.op != "BatchMatMulV2" or last.inputs[0] is not value:
        return None
    chain.append(last)
    ranks = {v.rank for product in (chain[0], last) for v in product.inputs}
    if ranks != {4} or chain[0].attr("adj_x") or last.attr("adj_x") or any(n.controls for n in chain):
        return None
    return chain


def _from_matmul(graph: Graph, node: Node) -> list[Node] | None:
    """The way from a batched product to `node`, through at most a few masks and scales."""
    if node.op == "BatchMatMulV2":
        return [node]
    for value in node.inputs:
        if value.node.op in (*_BETWEEN, "BatchMatMulV2") and value.rank == 4 and graph.single_use(value) is node:
            way = _from_matmul(graph, value.node)
            if way is not None:
                return [*way, node]
    return None

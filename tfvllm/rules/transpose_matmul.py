"""Transposes around batched products become flags of the product."""

from tfvllm.graph.builder import Declined
from tfvllm.graph.guarantee import Exact, Reordered
from tfvllm.graph.pattern import op
from tfvllm.graph.rewriter import Rule


def _swap_last(perm: tuple[int, ...]) -> tuple[int, ...]:
    return (*perm[:-2], perm[-1], perm[-2])


class FoldTransposeLeft(Rule):
    """bmm(transpose(x, p), y) -> bmm(transpose(x, p'), y, adj_x),   p' = p with its last two axes swapped.

    Only where p' is nearer to the order in memory: moving whole rows is cheaper than moving single elements.
    """

    guarantee = Exact()

    def pattern(self, x, y, p):
        return op.BatchMatMulV2(op.Transpose(x, p), y, name="product")

    side = 0

    def replacement(self, b, m):
        perm = m.p.known_value
        if perm is None:
            raise Declined("the permutation is computed at run time")
        if m.x.dtype.is_complex:
            raise Declined("the flags of a complex product conjugate too")
        if perm[-2] < perm[-1]:
            raise Declined("the transpose keeps the order of its last two axes")
        node = m.node("product")
        flags = {"adj_x": bool(node.attr("adj_x")), "adj_y": bool(node.attr("adj_y"))}
        key = "adj_x" if self.side == 0 else "adj_y"
        flags[key] = not flags[key]
        moved = b.Transpose(m.x, b.ints(*_swap_last(perm)))
        return b.BatchMatMulV2(*((moved, m.y) if self.side == 0 else (m.y, moved)), **flags)


class FoldTransposeRight(FoldTransposeLeft):
    """bmm(x, transpose(y, p)) -> bmm(x, transpose(y, p'), adj_y)."""

    side = 1

    def pattern(self, x, y, p):
        return op.BatchMatMulV2(y, op.Transpose(x, p), name="product")


class TransposedProduct(Rule):
    """transpose(bmm(x, y)) -> bmm(yᵀ, xᵀ): (X·Y)ᵀ = Yᵀ·Xᵀ, the transposes being flags."""

    guarantee = Reordered()

    def pattern(self, x, y, p):
        return op.Transpose(op.BatchMatMulV2(x, y, name="product"), p)

    def replacement(self, b, m):
        perm, node = m.p.known_value, m.node("product")
        if m.x.dtype.is_complex:
            raise Declined("the flags of a complex product conjugate too")
        if perm is None or tuple(perm) != _swap_last(tuple(range(len(perm)))):
            raise Declined("it does more than swap the last two axes")
        if b.graph.single_use(m.product) is None:
            raise Declined("the product is read elsewhere in its own order")
        return b.BatchMatMulV2(m.y, m.x, adj_x=not node.attr("adj_y"), adj_y=not node.attr("adj_x"))

"""Einsum that is a plain product of matrices becomes one."""

from tfvllm.graph import dims
from tfvllm.graph.builder import Declined
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.pattern import op
from tfvllm.graph.rewriter import Rule


class EinsumToMatMul(Rule):
    """einsum("…k,kn->…n", x, w) -> reshape(reshape(x, [·, k]) @ reshape(w, [k, n])).

    Every einsum whose contracted axes are last in x and first (or last) in w, none of them shared with the result.
    """

    guarantee = Reordered()

    def pattern(self, x, w):
        return op.Einsum(x, w, name="product")

    def replacement(self, b, m):
        equation = m.node("product").attr("equation").replace(" ", "")
        left, _, right = equation.partition("->")
        first, second = left.split(",")
        if "." in equation or len(set(first)) != len(first) or len(set(second)) != len(second):
            raise Declined(f"{equation}: ellipsis or repeated axes")
        contracted = [a for a in first if a in second and a not in right]
        if any(a in right for a in first if a in second):
            raise Declined(f"{equation}: a batch axis; it is a batched product")
        free_x, free_w = [a for a in first if a not in contracted], [a for a in second if a not in contracted]
        if not contracted or list(right) != free_x + free_w or list(first) != free_x + contracted:
            raise Declined(f"{equation}: its axes would have to be transposed")
        if list(second) == contracted + free_w:
            transpose_b = False
        elif list(second) == free_w + contracted:
            transpose_b = True
        elif b.graph.is_static(m.w):
            transpose_b = False
        else:
            raise Declined(f"{equation}: the contracted axes of the second operand are not together")
        if m.x.shape is None or m.w.shape is None:
            raise Declined("a rank is unknown")
        size = dict(zip(second, m.w.shape))
        k, n = dims.product([size[a] for a in contracted]), dims.product([size[a] for a in free_w])
        if not isinstance(k, int) or not isinstance(n, int):
            raise Declined("the size of the second operand is unknown")
        rows = dims.product([d for a, d in zip(first, m.x.shape) if a in free_x])
        x = b.reshape(m.x, (rows, k))
        kernel = m.w
        if list(second) not in (contracted + free_w, free_w + contracted):  # [heads, k, head_dim]: transposed once, now
            kernel = b.Transpose(kernel, b.ints(*(second.index(a) for a in contracted + free_w)))
        w = b.reshape(kernel, (n, k) if transpose_b else (k, n))
        y = b.MatMul(x, w, transpose_b=transpose_b)
        return b.reshape(y, (*(m.x.shape[: len(free_x)]), *(size[a] for a in free_w)), like=[m.x])

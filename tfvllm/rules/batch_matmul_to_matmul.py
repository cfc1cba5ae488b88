"""A batched product with one matrix for the whole batch becomes one product."""

from tfvllm.graph import dims, op_traits
from tfvllm.graph.builder import Declined, Skip
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.pattern import op
from tfvllm.graph.rewriter import Rule


class BatchMatMulToMatMul(Rule):
    """x[…, m, k] @ w[k, n] -> reshape(reshape(x, [·, k]) @ w), w the same for the whole batch.

    The form that kernels fuse bias and activation with; `EinsumDense("abc,cd->abd")` and `tf.matmul(x, w)` come as a
    batched product.
    """

    guarantee = Reordered()

    def pattern(self, x, w):
        return op.any_of(*op_traits.BATCH_MATMULS, "BatchMatMulV3")(x, w, name="product")

    def condition(self, graph, m):
        node = m.node("product")
        if m.w.rank != 2:
            raise Skip("each of the batch has a matrix of its own")
        if m.x.shape is None or not all(isinstance(d, int) for d in m.w.shape):
            raise Declined("a size is unknown")
        if not m.x.dtype == m.w.dtype == m.product.dtype:
            raise Declined(f"{m.x.dtype.name} by {m.w.dtype.name} to {m.product.dtype.name}")
        if not m.x.dtype.is_floating or len(m.x.shape) < 2:
            raise Skip("no batched product of floats")
        if node.attr("adj_x") and len(m.x.shape) > 2:
            raise Declined("the first operand is transposed")

    def replacement(self, b, m):
        node = m.node("product")
        flags = {"transpose_a": bool(node.attr("adj_x")), "transpose_b": bool(node.attr("adj_y"))}
        if len(m.x.shape) == 2:
            return b.MatMul(m.x, m.w, **flags)
        *rows, inner = m.x.shape
        y = b.MatMul(b.reshape(m.x, (dims.product(rows), inner)), m.w, **flags)
        return b.reshape(y, m.product.shape, like=[m.x])

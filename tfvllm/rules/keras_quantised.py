"""Products that Keras quantised (`model.quantize`, int8 and int4) become products of floats, to be lowered anew."""

from __future__ import annotations

import tensorflow as tf

from tfvllm.graph import dims, op_traits
from tfvllm.graph.builder import Builder, Declined, Skip
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.ir import Value
from tfvllm.graph.pattern import Match, add, either, maybe, op
from tfvllm.graph.rewriter import Rule

_MATMULS = ("BatchMatMulV3", "BatchMatMulV2", "MatMul", "Einsum")  # what Keras 3 computes them with


class DequantiseProducts(Rule):
    """(int8(x·t) @ q) / (t·c) -> x @ (q/c),   t = 127/max|x| of each row, c one number for each column of the int8 q.

    Keras measures every row anew, and TensorFlow's product of int8 by int8 is slower than one of floats. In a graph
    that is lowered the weight is q/c from here on, and is quantised like any other: to the same q, unless large
    channels are spread into it. A float32 graph keeps what Keras made, whose weights take a quarter of the bytes.
    """

    guarantee = Approximate(
        2 / 127, domain="finite x", source="x is no longer rounded to 1/127 of the largest of its row; measured"
    )

    def __init__(self, unpack: bool = False):
        self.unpack = unpack  # whether weights become floats

    def pattern(self, x, q, axes, epsilon, rows, columns):
        largest = add(op.Max(op.Abs(x), axes, name="largest"), epsilon)
        scale = op.RealDiv(127.0, largest, name="scale")
        rounded = op.Cast(op.Maximum(op.Minimum(op.Round(op.Mul(x, scale)), 127.0), -127.0))
        product = op.any_of(*_MATMULS)(maybe("Cast", "Reshape")(rounded), q, name="product")
        return op.RealDiv(maybe("Cast", "Reshape")(product), either(op.Mul(rows, columns), rows), name="out")

    def condition(self, graph, m):
        if m.out.dtype != tf.float32 or m.x.dtype != tf.float32:
            raise Declined(f"the layer computes in {m.out.dtype.name}")
        if not graph.is_static(m.q) or (m.get("columns") is not None and not graph.is_static(m.columns)):
            raise Skip("the other order, or not a product with a weight")
        if not self.unpack:
            raise Declined("kept in int8 as Keras made it: precision int8 computes it with fixed ranges, and faster")
        if not graph.is_private(m.q):
            raise Declined("others read the weight too, which would have to be stored twice")

    def replacement(self, b, m):
        first = self._first_summed(m)
        kept, summed = m.x.shape[:first], m.x.shape[first:]
        kernel, inner = self._columns_last(b, m, len(summed))
        if m.out.shape is None or m.out.shape[:first] != kept or dims.product(summed) != inner:
            raise Declined("its sizes are unknown")
        free = m.out.shape[first:]
        n = dims.product(free)
        ones = (1,) * len(free)
        if not isinstance(inner, int) or not isinstance(n, int):
            raise Declined("the size of the weight is unknown")
        if m.rows.shape != (*kept, *ones) or _unshaped(m.rows) is not m.scale:
            raise Declined("the result is not divided by what each row was multiplied by")
        weight = b.reshape(kernel, (inner, n))
        weight = weight if weight.dtype == tf.float32 else b.Cast(weight, DstT=tf.float32)
        if m.get("columns") is not None:
            sizes = m.columns.shape or ()
            if sizes[-len(free) :] != free or dims.product(sizes) != n:
                raise Declined("the weight has not one scale for each column")
            weight = b.RealDiv(weight, b.reshape(m.columns, (n,)))
        product = b.MatMul(b.reshape(m.x, (dims.product(kept), inner)), weight)
        return b.reshape(product, m.out.shape, like=[m.x])

    @staticmethod
    def _first_summed(m: Match) -> int:
        """The first of the axes of x that are summed over, and that its largest magnitude is taken over."""
        node = m.node("largest")
        axes = node.inputs[1].known_value
        if m.x.shape is None or axes is None or not node.attr("keep_dims"):
            raise Declined("a rank is unknown")
        rank = len(m.x.shape)
        over = sorted(a % rank for a in (axes if isinstance(axes, tuple) else (axes,)))
        if not over or over != list(range(over[0], rank)):
            raise Declined("the largest magnitude is not taken over the last axes")
        return over[0]

    @staticmethod
    def _columns_last(b: Builder, m: Match, count: int) -> tuple[Value, object]:
        """The weight with the axes that are summed over first, and their size together."""
        node, shape = m.node("product"), m.q.shape
        if shape is None or node.attr("transpose_a") or node.attr("adj_x"):
            raise Declined("the shape of the weight is unknown" if shape is None else "the first operand is transposed")
        if node.op != "Einsum":
            if len(shape) != 2:
                raise Declined("the weight is no matrix")
            flipped = bool(node.attr("adj_y") or node.attr("transpose_b"))
            return (b.Transpose(m.q, b.ints(1, 0)) if flipped else m.q), shape[1 if flipped else 0]
        equation = node.attr("equation").replace(" ", "")
        left, _, right = equation.partition("->")
        first, second = left.split(",")
        summed = first[-count:]
        free = [a for a in second if a not in summed]
        if "." in equation or set(summed) - set(second) or list(right) != [*first[:-count], *free]:
            raise Declined(f"{equation}: not a product of rows with a weight")
        order = [second.index(a) for a in [*summed, *free]]
        kernel = m.q if order == sorted(order) else b.Transpose(m.q, b.ints(*order))
        return kernel, dims.product(tuple(shape[second.index(a)] for a in summed))


def _unshaped(value: Value) -> Value:
    """`value` before what moves no element: reshapes, and transposes of axes of size 1."""
    while value.node.op in op_traits.RESHAPES | {"Transpose"}:
        before = value.node.inputs[0]
        if value.node.op == "Transpose":
            order = value.node.inputs[1].known_value
            if order is None or before.shape is None:
                return value
            moved = [a for a in order if before.shape[a] != 1]
            if moved != sorted(moved):
                return value
        value = before
    return value

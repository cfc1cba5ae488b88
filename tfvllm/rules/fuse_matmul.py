"""A product, its bias, its activation and its residual in one kernel (oneDNN)."""

from tfvllm.graph import op_traits
from tfvllm.graph.builder import Declined, Skip
from tfvllm.graph.guarantee import Approximate, Reordered
from tfvllm.graph.pattern import add, either, op
from tfvllm.graph.rewriter import Rule

# Those that are ops of the same name, which say all of them: not LeakyRelu, which has a slope.
_ACTIVATIONS = (op_traits.FUSED_ACTIVATIONS & op_traits.UNARY) - {"LeakyRelu"}


class FuseMatMulBias(Rule):
    """x @ w + b -> _FusedMatMul[BiasAdd](x, w, b)."""

    guarantee = Reordered()  # the fused kernel may sum in another order than the plain one
    targets = ("onednn",)
    emits = ("_FusedMatMul",)

    def pattern(self, x, w, bias):
        return op.BiasAdd(op.MatMul(x, w, name="product"), bias, name="out")

    def condition(self, graph, m):
        if m.node("product").attr("transpose_a"):
            raise Declined("the first operand is transposed")
        if m.x.dtype.name not in ("float32", "bfloat16"):
            raise Declined(f"no fused kernel for {m.x.dtype.name}")
        if graph.single_use(m.product) is None:
            raise Declined("the product without its bias is read elsewhere")

    def replacement(self, b, m):
        return b.op(
            "_FusedMatMul",
            [m.x, m.w, m.bias],
            num_args=1,
            fused_ops=["BiasAdd"],
            transpose_b=m.node("product").attr("transpose_b"),
        )[0]


def _extend(b, fused, extra: str, arguments=()):
    node = fused.node
    return b.op(
        "_FusedMatMul",
        [*node.inputs, *arguments],
        num_args=node.attr("num_args") + len(arguments),
        fused_ops=[*node.attr("fused_ops"), extra],
        transpose_b=node.attr("transpose_b"),
    )[0]


def _check(graph, m):
    if m.y.node.op != "_FusedMatMul":
        raise Skip("not a product")
    if m.y.node.attr("fused_ops") != ["BiasAdd"]:
        raise Declined("the product has something fused already")
    inside = set(m.nodes)
    if graph.is_output(m.y) or any(reader not in inside for reader in graph.uses(m.y)):
        raise Declined("the product without its activation is read elsewhere")


class FuseActivation(Rule):
    """relu(x @ w + b) -> _FusedMatMul[BiasAdd, Relu](x, w, b), and Relu6, Elu, Tanh, Sigmoid."""

    guarantee = Approximate(
        max_error=2e-6, domain="all finite x", source="oneDNN eltwise polynomials, measured against float64"
    )
    targets = ("onednn",)
    emits = ("_FusedMatMul",)

    def pattern(self, y):
        return op.any_of(*_ACTIVATIONS)(y, name="out")

    def condition(self, graph, m):
        _check(graph, m)

    def replacement(self, b, m):
        return _extend(b, m.y, m.node("out").op)


class FuseGelu(Rule):
    """½·y·(1 + erf(y/√2)), y = x @ w + b -> _FusedMatMul[BiasAdd, GeluExact](x, w, b).

    The tanh form likewise, with GeluApproximate.
    """

    guarantee = Approximate(
        max_error=4e-6, domain="all finite x", source="oneDNN eltwise polynomials, measured against float64"
    )
    targets = ("onednn",)
    emits = ("_FusedMatMul",)

    def pattern(self, y):
        cube = either(op.Pow(y, 3.0), op.Mul(y, op.Mul(y, y)), op.Mul(y, op.Square(y)))
        inner = op.Mul(add(y, op.Mul(cube, 0.044715)), 0.7978845608)
        erf = op.Erf(either(op.Mul(y, 0.7071067812), op.RealDiv(y, 1.4142135624)), name="erf")
        gate = add(either(op.Tanh(inner, name="tanh"), erf), 1.0)
        # Keras 3 writes 1 + erf(y/√2) as erfc(-y/√2).
        negative = op.Neg(y)
        down = either(
            op.Mul(y, -0.7071067812),
            op.Mul(negative, 0.7071067812),
            op.Neg(op.Mul(y, 0.7071067812)),
            op.RealDiv(negative, 1.4142135624),
        )
        gates = either(gate, op.Erfc(down, name="erf"))
        half = op.Mul(y, 0.5)
        return either(op.Mul(half, gates), op.Mul(y, op.Mul(gates, 0.5)), op.Mul(op.Mul(y, gates), 0.5))

    def condition(self, graph, m):
        _check(graph, m)

    def replacement(self, b, m):
        return _extend(b, m.y, "GeluExact" if m.get("erf") is not None else "GeluApproximate")


class FuseResidual(Rule):
    """(x @ w + b) + r -> _FusedMatMul[BiasAdd, Add](x, w, b, r)."""

    guarantee = Reordered()
    targets = ("onednn",)
    emits = ("_FusedMatMul",)

    def pattern(self, y, r):
        return add(y, r, name="out")

    def condition(self, graph, m):
        _check(graph, m)
        if m.r.shape is None or m.r.shape != m.y.shape:
            raise Declined("the residual has another shape, or one that cannot be proved equal")

    def replacement(self, b, m):
        return _extend(b, m.y, "Add", [m.r])

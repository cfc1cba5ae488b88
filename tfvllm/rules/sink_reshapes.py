"""Reshapes sink below elementwise work, so that a transformer's dense work runs on [batch*seq, width] throughout."""

from tfvllm.graph import dims, op_traits
from tfvllm.graph.builder import Declined, Skip
from tfvllm.graph.guarantee import Exact, Reordered
from tfvllm.graph.pattern import add, either, op
from tfvllm.graph.rewriter import Rule


class SinkReshapeUnary(Rule):
    """f(reshape(y, s)) -> reshape(f(y), s) for elementwise f."""

    guarantee = Exact()

    def pattern(self, y, s):
        return op.any_of(*op_traits.UNARY)(op.Reshape(y, s, name="reshaped"), name="out")

    def replacement(self, b, m):
        attrs = {k: a for k, a in m.node("out").attrs.items() if k not in ("T",)}
        return b.Reshape(b.op(m.node("out").op, [m.y], **attrs)[0], m.s)


class SinkReshapeBias(Rule):
    """reshape(y, […, h, d]) + b -> reshape(y + reshape(b, [h·d]), […, h, d]),   y: [m, h·d], b: [h, d] or [h·d]."""

    guarantee = Exact()

    def pattern(self, y, s, bias):
        reshaped = op.Reshape(y, s, name="reshaped")
        return either(
            op.any_of("BiasAdd", *op_traits.BINARY)(reshaped, bias, name="out"),
            op.any_of("Sub", "RealDiv", "Pow")(bias, reshaped, name="out"),
        )

    def replacement(self, b, m):
        out, y, bias = m.node("out"), m.y, m.bias
        if y.rank is None or y.rank < 1 or bias.shape is None or m.reshaped.rank is None:
            raise Declined("a rank is unknown")
        if m.get("out").shape != m.reshaped.shape:
            raise Declined("the operand broadcasts the reshaped tensor")
        if out.op == "BiasAdd" and out.attr("data_format", "NHWC") != "NHWC":
            raise Declined("the bias lies along another axis (NCHW)")
        size = dims.product(bias.shape)
        if size == 1:
            flat = b.reshape(bias, ()) if bias.rank else bias
            if not b.graph.is_static(bias):
                raise Declined("a computed scalar")
        else:
            trailing = m.reshaped.shape[-len(bias.shape) :] if out.op != "BiasAdd" else m.reshaped.shape[-1:]
            stripped = tuple(d for d in bias.shape)
            while stripped and stripped[0] == 1 and len(stripped) > 1:
                stripped = stripped[1:]
            trailing = trailing[len(trailing) - len(stripped) :]
            if stripped != tuple(trailing) or size != y.shape[-1]:
                raise Declined("the operand does not lie along the last axis of the unshaped tensor")
            if not b.graph.is_static(bias):
                raise Declined("the operand is computed, not a weight")
            flat = b.reshape(bias, (size,))
        swapped = out.inputs[0] is not m.reshaped
        name = out.op
        if name == "BiasAdd" and flat.rank == 0:
            flat = b.reshape(bias, (y.shape[-1],))
        elif name in op_traits.ADDITIONS and flat.rank == 1 and y.rank == 2 and y.shape[-1] == size:
            name, swapped = "BiasAdd", False
        operands = [flat, y] if swapped else [y, flat]
        return b.Reshape(b.op(name, operands)[0], m.s)


class SinkReshapeResidual(Rule):
    """reshape(x@w + b, s) + r -> reshape((x@w + b) + reshape(r, [rows, width]), s),   r of shape s.

    The sum then stands beside the product, where the product's kernel can add it.
    """

    guarantee = Reordered()  # TensorFlow may add it inside the product's kernel
    targets = ("onednn",)

    def pattern(self, y, s, r):
        return add(op.Reshape(y, s, name="reshaped"), r, name="out")

    def replacement(self, b, m):
        if m.y.node.op != "BiasAdd" or m.y.node.inputs[0].node.op != "MatMul":
            raise Skip("not a product with its bias")
        if m.r.node.op == "Reshape" or b.graph.is_static(m.r):
            raise Skip("other rules' work")
        if m.r.shape is None or m.r.shape != m.reshaped.shape:
            raise Declined("the residual has another shape, or one that cannot be proved equal")
        if b.graph.single_use(m.reshaped) is None or b.graph.single_use(m.y) is None:
            raise Declined("the product is read elsewhere too")
        return b.Reshape(b.AddV2(m.y, b.reshape(m.r, m.y.shape)), m.s)


class SinkReshapePair(Rule):
    """f(reshape(y, s), reshape(z, s)) -> reshape(f(y, z), s) where y and z have one shape."""

    guarantee = Exact()

    def pattern(self, y, z, s, t):
        return op.any_of(*op_traits.BINARY)(op.Reshape(y, s, name="left"), op.Reshape(z, t, name="right"), name="out")

    def replacement(self, b, m):
        out = m.node("out")
        if m.y.shape is None or m.y.shape != m.z.shape or m.left.shape != m.right.shape or m.left.shape is None:
            raise Declined("the two sides have unlike shapes before they are reshaped")
        operands = [m.y, m.z] if out.inputs[0] is m.left else [m.z, m.y]
        return b.Reshape(b.op(out.op, operands)[0], m.s)

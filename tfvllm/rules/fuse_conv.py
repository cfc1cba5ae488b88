"""A convolution, its bias and its activation in one kernel (oneDNN)."""

from tfvllm.graph.builder import Declined, Skip
from tfvllm.graph.guarantee import Approximate, Reordered
from tfvllm.graph.pattern import add, op
from tfvllm.graph.rewriter import Rule

_KERNELS = {"Conv2D": "_FusedConv2D", "DepthwiseConv2dNative": "_FusedDepthwiseConv2dNative"}
_ACTIVATIONS = ("Relu", "Relu6", "Elu")


class FuseConvBias(Rule):
    """x ∗ w + b -> _FusedConv2D[BiasAdd](x, w, b)."""

    guarantee = Reordered()  # the same terms, summed in the order of another kernel
    targets = ("onednn",)
    emits = ("_FusedConv2D",)
    kinds = ("Conv2D",)

    def pattern(self, x, w, bias):
        return op.BiasAdd(op.any_of(*self.kinds)(x, w, name="product"), bias, name="out")

    def condition(self, graph, m):
        node = m.node("product")
        if m.x.dtype.name not in ("float32", "bfloat16"):
            raise Declined(f"no fused kernel for {m.x.dtype.name}")
        if node.attr("data_format", "NHWC") != "NHWC":
            raise Declined("the channels are not last (NCHW)")
        if node.attr("padding") == "EXPLICIT":
            raise Declined("its padding is explicit")
        if graph.single_use(m.product) is None:
            raise Declined("the product without its bias is read elsewhere")

    def replacement(self, b, m):
        node = m.node("product")
        kept = {k: node.attrs[k] for k in ("strides", "padding", "data_format", "dilations") if k in node.attrs}
        if node.op == "Conv2D":
            extra = {"TArgs": [m.bias.dtype], "num_host_args": 0}
        else:
            extra = {}
        return b.op(_KERNELS[node.op], [m.x, m.w, m.bias], num_args=1, fused_ops=["BiasAdd"], **extra, **kept)[0]


class FuseDepthwiseBias(FuseConvBias):
    """x ∗ w + b -> _FusedDepthwiseConv2dNative[BiasAdd](x, w, b), the convolution being depthwise."""

    emits = ("_FusedDepthwiseConv2dNative",)
    kinds = ("DepthwiseConv2dNative",)


class FuseConvActivation(Rule):
    """relu(x ∗ w + b) -> _FusedConv2D[BiasAdd, Relu](x, w, b), and Relu6, Elu; depthwise likewise."""

    guarantee = Approximate(
        max_error=2e-6, domain="all finite x", source="oneDNN eltwise polynomials, measured against float64"
    )
    targets = ("onednn",)
    emits = ("_FusedConv2D", "_FusedDepthwiseConv2dNative")

    def pattern(self, y):
        return op.any_of(*_ACTIVATIONS)(y, name="out")

    def condition(self, graph, m):
        if m.y.node.op not in _KERNELS.values():
            raise Skip("not a convolution")
        if m.y.node.attr("fused_ops") not in (["BiasAdd"], ["BiasAdd", "Add"]):
            raise Declined("the convolution has something fused already")
        if m.y.node.attr("fused_ops") == ["BiasAdd", "Add"] and m.node("out").op != "Relu":
            raise Declined("no kernel for a residual and another activation than relu")
        if graph.single_use(m.y) is None:
            raise Declined("the convolution without its activation is read elsewhere")

    def replacement(self, b, m):
        node = m.y.node
        attrs = dict(node.attrs)
        attrs["fused_ops"] = [*node.attr("fused_ops"), m.node("out").op]
        return b.op(node.op, node.inputs, **attrs)[0]


class FuseConvResidual(Rule):
    """(x ∗ w + b) + r -> _FusedConv2D[BiasAdd, Add](x, w, b, r), which a relu may follow."""

    guarantee = Reordered()
    targets = ("onednn",)
    emits = ("_FusedConv2D",)

    def pattern(self, y, r):
        return add(y, r, name="out")

    def condition(self, graph, m):
        if m.y.node.op != "_FusedConv2D":
            raise Skip("not a convolution")
        if m.y.node.attr("fused_ops") != ["BiasAdd"]:
            raise Declined("the convolution has something fused already")
        if graph.single_use(m.y) is None:
            raise Declined("the convolution without its residual is read elsewhere")
        if m.r.shape is None or m.r.shape != m.y.shape:
            raise Declined("the residual has another shape, or one that cannot be proved equal")

    def replacement(self, b, m):
        node = m.y.node
        attrs = node.own_attrs("TArgs")
        attrs.update(num_args=2, fused_ops=["BiasAdd", "Add"], TArgs=[m.r.dtype] * 2)
        return b.op("_FusedConv2D", [*node.inputs, m.r], **attrs)[0]

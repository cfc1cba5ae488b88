"""SiLU, which is also called swish, as one op."""

from tfvllm.graph.builder import Declined
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.pattern import op
from tfvllm.graph.rewriter import Rule


class FuseSwish(Rule):
    """x·sigmoid(x) -> _MklSwish(x)."""

    guarantee = Approximate(
        max_error=2e-6, domain="all finite x", source="oneDNN eltwise_swish, measured against float64"
    )
    targets = ("onednn",)
    emits = ("_MklSwish",)

    def pattern(self, x):
        return op.Mul(x, op.Sigmoid(x, name="gate"), name="out")

    def condition(self, graph, m):
        if m.x.dtype.name not in ("float32", "bfloat16"):
            raise Declined(f"no fused kernel for {m.x.dtype.name}")
        if graph.single_use(m.gate) is None:
            raise Declined("the sigmoid is read elsewhere too")

    def replacement(self, b, m):
        return b.op("_MklSwish", [m.x])[0]

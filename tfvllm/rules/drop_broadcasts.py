"""An operand that is broadcast by hand, though the op would do it."""

from tfvllm.graph import op_traits
from tfvllm.graph.builder import Declined
from tfvllm.graph.guarantee import Exact
from tfvllm.graph.pattern import either, op
from tfvllm.graph.rewriter import Rule

_BINARY = op_traits.BINARY - {"Add", "Pow"}  # the first is of old graphs; no layer widens an exponent by hand


class DropBroadcasts(Rule):
    """x + broadcast(p, shape(x)) -> x + p."""

    guarantee = Exact()

    def pattern(self, x, p, s):
        wide = op.BroadcastTo(p, s, name="wide")
        return either(op.any_of(*_BINARY)(x, wide, name="out"), op.any_of("Sub", "RealDiv")(wide, x, name="out"))

    def replacement(self, b, m):
        if m.x.shape is None or m.x.shape != m.wide.shape:
            raise Declined("the other operand is not known to have the broadcast shape")
        node = m.node("out")
        return b.op(node.op, [m.x, m.p] if node.inputs[1] is m.wide else [m.p, m.x])[0]

"""Chains of reshapes and transposes become one."""

from tfvllm.graph.builder import Declined
from tfvllm.graph.guarantee import Exact
from tfvllm.graph.pattern import op
from tfvllm.graph.rewriter import Rule


class CollapseReshapes(Rule):
    """reshape(reshape(x, s), t) -> reshape(x, t);   ExpandDims and Squeeze are reshapes."""

    guarantee = Exact()

    def pattern(self, x, s, t):
        return op.any_of("Reshape")(op.any_of("Reshape", "ExpandDims")(x, s), t)

    def replacement(self, b, m):
        if m.t.known_value is None and b.graph.constant(m.t) is None:
            raise Declined("the outer shape is computed from data")
        return b.Reshape(m.x, m.t)


class CollapseTransposes(Rule):
    """transpose(transpose(x, p), q) -> transpose(x, p∘q)."""

    guarantee = Exact()

    def pattern(self, x, p, q):
        return op.Transpose(op.Transpose(x, p), q)

    def condition(self, graph, m):
        if m.p.known_value is None or m.q.known_value is None:
            raise Declined("a permutation is computed at run time")

    def replacement(self, b, m):
        return b.Transpose(m.x, b.ints(*(m.p.known_value[i] for i in m.q.known_value)))


class TransposeToReshape(Rule):
    """transpose(x, p) -> reshape(x) where p moves only axes of size 1: no element moves in memory."""

    guarantee = Exact()

    def pattern(self, x, p):
        return op.Transpose(x, p, name="y")

    def replacement(self, b, m):
        perm, shape = m.p.known_value, m.x.shape
        if perm is None or shape is None:
            raise Declined("the permutation or the rank is unknown")
        moved = [i for i in perm if shape[i] != 1]
        if moved != sorted(moved):
            raise Declined("axes of more than one element change places")
        return b.reshape(m.x, m.y.shape)

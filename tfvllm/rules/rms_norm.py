"""RMSNorm and LayerNorm with public ops: fewer passes over the data."""

from tfvllm.graph import dims, op_traits
from tfvllm.graph.builder import Declined
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.ir import Graph, Value
from tfvllm.graph.pattern import add, constant, either, maybe, op
from tfvllm.graph.rewriter import Pass, Rule

_same = maybe(*op_traits.COPIES)


class GammaIntoWeights(Pass):
    """(z·γ) @ W -> z @ (diag(γ)·W), γ one number for each input.   The gain of an RMSNorm costs nothing then.

    Only where every reader of z·γ is a product with weights of its own.
    """

    guarantee = Reordered(within="γ·W")

    def run(self, rewriter):
        graph = rewriter.graph
        changed = False
        for node in graph.order():
            if node.op != "Mul" or graph.nodes.get(node.name) is not node or graph.is_output(node.output):
                continue
            for z, gamma in (node.inputs, list(reversed(node.inputs))):
                fits = gamma.shape and z.shape is not None and z.shape == node.output.shape
                if fits and graph.is_static(gamma) and not graph.is_static(z):
                    changed |= self._fold(rewriter, node, z, gamma)
                    break
        return changed

    def _fold(self, rewriter, node, z: Value, gamma: Value) -> bool:
        from tfvllm.graph.builder import Builder

        graph: Graph = rewriter.graph
        width = z.shape[-1]
        if not isinstance(width, int) or gamma.shape[-1] != width or dims.product(gamma.shape) != width:
            return False
        products, bridges, reason = [], [], None
        stack = [node.output]
        while stack:
            value = stack.pop()
            if graph.is_output(value):
                return False
            for reader in graph.uses(value):
                if reader.op == "Reshape" and reader.inputs[0] is value and reader.output.shape[-1:] == (width,):
                    bridges.append(reader)
                    stack.append(reader.output)
                elif reader.op == "MatMul" and reader.inputs[0] is value and not reader.attr("transpose_a"):
                    products.append(reader)
                elif reader.op == "Shape":
                    continue
                else:
                    reason = f"{reader.op} reads the scaled rows too"
        if not products:
            return False
        if reason is None and not all(graph.is_static(p.inputs[1]) for p in products):
            reason = "the second operand of a product is not a weight"
        if reason is None and not all(graph.is_private(p.inputs[1]) for p in products):
            reason = "others read a weight too, which would have to be stored twice"
        if reason is not None:
            rewriter.decline(self, node, reason)
            return False
        if not rewriter.allowed(self, node):
            return False
        b = Builder(graph, node.name)
        for product in products:
            b.scope = product.name
            kernel = product.inputs[1]
            column = (1, width) if product.attr("transpose_b") else (width, 1)
            graph.set_input(product, 1, b.Mul(kernel, b.reshape(gamma, column)))
        self.substitute(rewriter, node, z)
        return True


class CentreLayerNorm(Rule):
    """x·(r·γ) + (-μ·(r·γ) + β) -> (x - μ)·r·γ + β,   r = rsqrt(σ² + ε).   Two passes fewer over [rows, width]."""

    # And nearer to the exact result: no two large numbers are subtracted.
    guarantee = Reordered(within="x - μ")
    targets = ("portable",)

    def pattern(self, x, gamma, beta):
        mean = op.Mean(x, constant("axes"), name="mean")
        variance = op.Mean(op.SquaredDifference(x, _same(mean)), constant("axes_2"), name="variance")
        rsqrt = op.Rsqrt(add(variance, constant("epsilon")), name="r")
        inv = op.Mul(rsqrt, gamma, name="inv")
        shift = either(
            add(op.Mul(op.Neg(_same(mean)), inv), beta, name="shift"),
            op.Sub(beta, op.Mul(_same(mean), inv), name="shift"),
        )
        return add(op.Mul(x, inv), shift, name="out")

    def condition(self, graph, m):
        if not m.node("mean").attr("keep_dims") or not m.node("variance").attr("keep_dims"):
            raise Declined("the means drop their axis")
        if not graph.is_static(m.gamma) or not graph.is_static(m.beta):
            raise Declined("gamma or beta is computed at run time")
        if m.x.shape is None or m.out.shape != m.x.shape:
            raise Declined("a parameter widens the result")
        if graph.single_use(m.shift) is None:
            raise Declined("a part of it is read elsewhere")

    def replacement(self, b, m):
        return b.AddV2(b.Mul(b.Mul(b.Sub(m.x, m.mean), m.r), m.gamma), m.beta)

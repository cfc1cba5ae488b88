"""Matrix products in int8: a quarter of the weights to read, four times the products in an instruction.

`y = x @ w + b` becomes `y ≈ (s·m_j / 127)·(q(x) @ q(w)) + b_j - z·s·Σ_k ŵ_kj`. The input is `q(x) = round(x/s) + z`, an
unsigned byte: one range for all of `x`, found on calibration inputs; what lies outside saturates. The weight is
`q(w) = round(127·w/m_j)` with one scale `m_j = max |w_·j|` for each column, and `ŵ` is what it stands for. The kernel
knows no zero point; what `z` adds to each column is known beforehand and goes into the bias. The products are summed in
int32; everything between them stays float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.graph.builder import Builder, Declined, Skip
from tfvllm.graph.guarantee import Approximate, Reordered
from tfvllm.graph.int8_ops import LEVELS, STEPS, Range, quantise_weight, quantised_matmul
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.pattern import constant, op
from tfvllm.graph.rewriter import Pass, Rule
from tfvllm.rules.bfloat16 import narrow_next

SMALLEST = 4096  # elements of a weight: below, the product is too small for int8 to gain anything
NARROWEST = 32  # columns or rows of a weight, likewise
SMALLEST_TABLE = 1 << 16  # elements of a table of embeddings: below, it is no size to speak of
_ACTIVATIONS = ("Relu", "Relu6", "Elu", "Tanh", "Sigmoid", "GeluExact", "GeluApproximate", "LeakyRelu")


def why_not(graph: Graph, node: Node) -> str | None:
    """The reason for which a product cannot become int8; None if it can; an empty one if it is no candidate at all."""
    if node.op == "GatherV2":
        return _why_no_table(graph, node)
    if node.op not in ("MatMul", "_FusedMatMul") or node.output.dtype != tf.float32:
        return ""
    x, w = node.inputs[:2]
    fused = node.attr("fused_ops", []) or []
    if node.attr("transpose_a"):
        return "the first operand is transposed"
    if fused and fused[0] != "BiasAdd":
        return f"no int8 kernel with {', '.join(fused)} fused"
    if any(f not in ("BiasAdd", "Add", *_ACTIVATIONS) for f in fused):
        return f"no int8 kernel with {', '.join(fused)} fused"
    if not (graph.is_weight(w) or w.node.op == "Const"):
        return "its weight is computed at run time" if not graph.is_static(w) else "its weight is shared or computed"
    if w.shape is None or not all(isinstance(d, int) for d in w.shape) or x.rank != 2:
        return "its sizes are unknown"
    if int(np.prod(w.shape)) < SMALLEST or min(w.shape) < NARROWEST:
        return f"its weight has fewer than {SMALLEST} elements, or a side below {NARROWEST}: int8 would gain nothing"
    array = graph.array(w)
    if array is None or not np.all(np.isfinite(array)):
        return "its weight holds NaN or infinities"
    return None


def _why_no_table(graph: Graph, node: Node) -> str | None:
    table, _, axis = node.inputs
    if not graph.is_weight(table) or table.dtype != tf.float32 or table.rank != 2:
        return ""
    if graph.constant(axis) is None or int(graph.constant(axis)) != 0 or node.attr("batch_dims", 0):  # type: ignore[arg-type]
        return ""
    array = graph.array(table)
    assert array is not None
    if array.size < SMALLEST_TABLE:
        return ""
    return None if np.all(np.isfinite(array)) else "its table holds NaN or infinities"


@dataclass(frozen=True)
class Int8Form:
    """Writes the int8 form of nodes into a graph. Weights are made once for all signatures (`shared`)."""

    graph: Graph
    shared: dict[Any, Any]
    quantised: dict[Any, Value]  # (value, range) -> the value in int8: several products may read one input

    def table(self, node: Node) -> Value:
        """The rows that `node` gathers, from a table in int8 with one scale a row. `node` stays in the graph."""
        graph, b, (table, ids, axis) = self.graph, Builder(self.graph, node.name), node.inputs
        source = graph.captures[table.node.inputs[0].node.name].tensor
        key = ("int8 rows", id(source))
        if key not in self.shared:
            content, scale = quantise_weight(graph.array(table).T)  # type: ignore[union-attr]
            self.shared[key] = (
                tf.Variable(np.ascontiguousarray(content.T), trainable=False, name="table_int8"),
                tf.Variable((scale / np.float32(LEVELS))[:, None], trainable=False, name="table_scale"),
                source,  # held: its id is the key
            )
        content, scale, _ = self.shared[key]
        rows = b.GatherV2(graph.weight(graph.unique(f"{node.name}/int8"), content, tf.int8), ids, axis)
        steps = b.GatherV2(graph.weight(graph.unique(f"{node.name}/scale"), scale, tf.float32), ids, axis)
        return b.Mul(b.Cast(rows, DstT=tf.float32), steps)

    def build(self, node: Node, span: Range | None) -> Value:
        """The int8 form of `node`, which stays in the graph.

        Args:
            span: what the smallest and the largest byte of its input stand for; see `snap`. None for a table.
        """
        if span is None:
            return self.table(node)
        b = Builder(self.graph, node.name)
        x, (low, high) = node.inputs[0], span
        key = (x.node.name, x.index, span)
        if key not in self.quantised:
            ends = [b.const(low, tf.float32), b.const(high, tf.float32)]
            self.quantised[key] = b.op(
                "QuantizeV2", [x, *ends], T=tf.quint8, mode="MIN_FIRST", ensure_minimum_range=0.0
            )[0]
        weight, scale, sums = self._weight(node)
        fused = list(node.attr("fused_ops", []) or ["BiasAdd"])
        bias = b.const((low * sums).astype(np.float32), tf.float32)
        if len(node.inputs) > 2:
            bias = b.AddV2(b.reshape(node.inputs[2], sums.shape), bias)
        return quantised_matmul(
            b,
            [
                *(self.quantised[key], b.Bitcast(weight, type=tf.qint8), bias, *node.inputs[3:]),
                *(b.const(0.0, tf.float32), b.const(high - low, tf.float32), scale, scale),
            ],
            [*fused, "Dequantize"],
            tf.float32,
        )

    def _weight(self, node: Node) -> tuple[Value, Value, np.ndarray]:
        """Readers of the variables that hold a weight (int8[inputs, outputs], float32[outputs]); its column sums."""
        graph, w = self.graph, node.inputs[1]
        transposed = bool(node.attr("transpose_b"))
        source = graph.captures[w.node.inputs[0].node.name].tensor if graph.is_weight(w) else w.node
        key = ("int8", id(source), transposed)
        if key not in self.shared:
            array = graph.array(w)
            assert array is not None
            content, scale = quantise_weight(np.ascontiguousarray(array.T if transposed else array))
            name = node.name.rsplit("/", 1)[-1]
            self.shared[key] = (
                tf.Variable(content, trainable=False, name=f"{name}_int8"),
                tf.Variable(scale, trainable=False, name=f"{name}_scale"),
                content.sum(axis=0, dtype=np.int64) * (scale / LEVELS),
                source,  # held: its id is the key
            )
        content, scale, sums, _ = self.shared[key]
        return (
            graph.weight(graph.unique(f"{node.name}/int8"), content, tf.int8),
            graph.weight(graph.unique(f"{node.name}/scale"), scale, tf.float32),
            sums,
        )


class QuantizeProducts(Pass):
    """x @ w + b -> (s·m/127)·(uint8(x/s + z) @ int8(127·w/m)) + b', with s, z calibrated and m for each column.

    What is fused with the product (activation, residual) stays fused.
    """

    targets = ("onednn",)
    emits = ("_QuantizedMatMul",)

    def __init__(self, ranges: Mapping[str, Range], guarantee: Approximate):
        self.ranges = ranges  # node name -> what the smallest and the largest byte of its input stand for
        self.guarantee = guarantee

    def run(self, rewriter):
        graph = rewriter.graph
        nodes = [graph.nodes[n] for n in self.ranges if n in graph.nodes and rewriter.allowed(self, graph.nodes[n])]
        maker = Int8Form(graph, rewriter.shared_weights, {})
        for node in nodes:
            new = maker.build(node, self.ranges[node.name])
            rewriter.fire(self, node)
            graph.replace(node.output, new)
        for node in nodes:
            self.removed(rewriter, node)
        return bool(nodes)


class QuantizeTables(Pass):
    """gather(table, ids) -> float32(gather(int8(127·table/m), ids))·gather(m/127, ids), with m for each row."""

    def __init__(self, names: Collection[str], guarantee: Approximate):
        self.names = names
        self.guarantee = guarantee

    def run(self, rewriter):
        graph = rewriter.graph
        nodes = [graph.nodes[n] for n in self.names if n in graph.nodes and rewriter.allowed(self, graph.nodes[n])]
        for node in nodes:
            new = Int8Form(graph, rewriter.shared_weights, {}).table(node)
            self.substitute(rewriter, node, new)
        return bool(nodes)


class FuseRequantize(Rule):
    """uint8(f(x @ w + b)) -> the product's own kernel writes bytes: what lies between two products is never float32."""

    guarantee = Approximate(
        max_error=1.0 / STEPS, domain="the range of the next product", source="ties may round the other way"
    )
    targets = ("onednn",)
    emits = ("_QuantizedMatMul",)

    def pattern(self, y):
        return op.QuantizeV2(y, constant("low"), constant("high"), T=tf.quint8, mode="MIN_FIRST")

    def condition(self, graph, m):
        if m.y.node.op != "_QuantizedMatMul" or m.y.node.attr("fused_ops")[-1] != "Dequantize":
            raise Skip("not a product in int8")
        if "Add" in m.y.node.attr("fused_ops"):
            raise Declined("a residual is fused with the product")
        if graph.sole_reader(m.y) is None:
            raise Declined("the product is read in float32 too")

    def replacement(self, b, m):
        node = m.y.node
        fused = [*node.attr("fused_ops")[:-1], "Requantize"]
        return quantised_matmul(b, [*node.inputs, m.low, m.high], fused, tf.quint8)


class HandOverNarrow(Pass):
    """f(x @ w + b), which is rounded to bfloat16 next -> the product's own kernel writes bfloat16."""

    guarantee = Approximate(max_error=2.0**-8, domain="its result", source="bfloat16 keeps 8 significant bits")
    targets = ("onednn",)
    emits = ("_QuantizedMatMul",)

    def run(self, rewriter):
        graph = rewriter.graph
        changed = False
        for node in graph.order():
            if node.op != "_QuantizedMatMul" or node.output.dtype != tf.float32 or not rewriter.allowed(self, node):
                continue
            if "Add" in node.attr("fused_ops") or not narrow_next(graph, node.output, moved=True):
                continue
            b = Builder(graph, node.name)
            narrow = quantised_matmul(b, list(node.inputs), node.attr("fused_ops"), tf.bfloat16)
            self.substitute(rewriter, node, b.Cast(narrow, DstT=tf.float32))
            changed = True
        return changed


# ----------------------------------------------------------------------------------------------------------- smoothing


@dataclass(frozen=True)
class Source:
    """What the inputs of several products come from, and could take the inverse of their factors."""

    node: Node  # a layer norm, or a product with a bias and at most a relu
    value: Value
    products: tuple[Node, ...]  # which read `value`, reshaped or as it is
    private: bool  # nothing but them reads it

    @property
    def free(self) -> bool:
        """Whether the factors cost nothing at run time."""
        return self.private


def sources(graph: Graph, products: list[Node]) -> list[Source]:
    """Where a factor for each channel can be folded in front of products, with the products that share it."""
    groups: dict[Value, list[Node]] = {}
    for node in products:
        value = _through_reshapes(node.inputs[0])
        if not graph.is_private(node.inputs[1]) or value.shape is None or value.shape[-1] != node.inputs[0].shape[-1]:
            continue
        if value.node.op == "_MklLayerNorm" or _scales_through(graph, value):
            groups.setdefault(value, []).append(node)
    found = []
    for value, nodes in groups.items():
        private = _ends(graph, value) <= {(n, 0) for n in nodes}
        if private or value.node.op == "_MklLayerNorm":
            found.append(Source(value.node, value, tuple(nodes), private))
    return found


def _scales_through(graph: Graph, value: Value) -> bool:
    """Whether factors of the columns of a product's weight and bias come out as factors of its result."""
    node = value.node
    return (
        node.op == "_FusedMatMul"
        and node.attr("fused_ops") in (["BiasAdd"], ["BiasAdd", "Relu"])
        and all(graph.is_static(v) for v in node.inputs[1:])
        and graph.is_private(node.inputs[1])
    )


def _through_reshapes(value: Value) -> Value:
    """`value` before reshapes that leave its last axis alone."""
    while value.node.op == "Reshape":
        inner = value.node.inputs[0]
        if inner.shape is None or value.shape is None or inner.shape[-1:] != value.shape[-1:]:
            return value
        value = inner
    return value


def _ends(graph: Graph, value: Value) -> set[tuple[Node | None, int]]:
    """Who reads a value, reshapes looked through; None for a result of the graph."""
    ends: set[tuple[Node | None, int]] = set()
    stack = [value]
    while stack:
        v = stack.pop()
        if graph.is_result(v):
            ends.add((None, 0))
        for node, position in v.readers:
            if node.op == "Reshape" and position == 0 and node.output.shape and node.output.shape[-1] == v.shape[-1]:
                stack.append(node.output)
            elif node.op == "Shape":
                continue
            else:
                ends.add((node, position))
    return ends


class SmoothInputs(Pass):
    """norm(x; γ, β) @ w -> norm(x; γ/s, β/s) @ (s·w): rare large channels spread into the weight before int8 rounds.

    The factors go into the norm's γ and β, or into the columns of the product before. Where others read the norm too,
    it is computed twice.
    """

    guarantee = Reordered()
    targets = ("onednn",)

    def __init__(self, factors: Mapping[str, np.ndarray]):
        self.factors = factors  # name of the source node -> float32[channels]
        self.done: set[str] = set()

    def run(self, rewriter):
        graph = rewriter.graph
        products = [n for n in graph.order() if n.op != "GatherV2" and why_not(graph, n) is None]
        changed = False
        for source in sources(graph, products):
            name = source.node.name
            if name not in self.factors or name in self.done or not rewriter.allowed(self, source.node):
                continue
            self.done.add(name)
            self._smooth(graph, source, self.factors[name])
            rewriter.fire(self, source.node)
            self.removed(rewriter, source.node)
            changed = True
        return changed

    @staticmethod
    def _smooth(graph: Graph, source: Source, factors: np.ndarray) -> None:
        b = Builder(graph, source.node.name + "/smooth")
        inverse = b.const(1.0 / factors, tf.float32)
        node = source.node
        attrs = node.own_attrs("T")
        if node.op == "_MklLayerNorm":
            inputs = [node.inputs[0], b.Mul(node.inputs[1], inverse), b.Mul(node.inputs[2], inverse)]
        else:
            across = b.const((1.0 / factors)[:, None], tf.float32) if node.attr("transpose_b") else inverse
            inputs = [node.inputs[0], b.Mul(node.inputs[1], across), b.Mul(node.inputs[2], inverse)]
        smooth = b.op(node.op, inputs, **attrs)[0]
        for product in source.products:
            x = product.inputs[0]
            graph.set_input(product, 0, b.reshape(smooth, x.shape, like=[x]) if x is not source.value else smooth)
            inner = Builder(graph, product.name + "/smooth")
            rows = factors[None, :] if product.attr("transpose_b") else factors[:, None]
            graph.set_input(product, 1, inner.Mul(product.inputs[1], inner.const(rows, tf.float32)))


# ------------------------------------------------------------------------------------------------------------ outliers

_ZERO_AT_ZERO = ("Relu", "Relu6", "Elu", "Tanh", "GeluExact", "GeluApproximate", "LeakyRelu")


def can_split(graph: Graph, product: Node) -> bool:
    """Whether channels of a product's input can be computed apart: `SplitOutliers` on it."""
    value = product.inputs[0]
    before = value.node
    return (
        product.op == "_FusedMatMul"
        and product.attr("fused_ops") in (["BiasAdd"], ["BiasAdd", "Add"])
        and before.op == "_FusedMatMul"
        and before.attr("fused_ops")[0] == "BiasAdd"
        and all(f in _ZERO_AT_ZERO for f in before.attr("fused_ops")[1:])
        and graph.sole_reader(value) is product
        and all(graph.is_static(v) for v in (*before.inputs[1:3], *product.inputs[1:3]))
        and graph.is_private(before.inputs[1])
        and graph.is_private(product.inputs[1])
    )


class SplitOutliers(Pass):
    """f(x @ v + a) @ w + b -> f(x @ v' + a') @ w' + (f(x @ v_S + a_S) @ w_S + b), the channels S apart, in float32.

    The few hidden channels whose values dwarf all others would take the steps of int8 from them. v', a' and w' are v, a
    and w with the columns and rows of S zeroed: sizes stay what they are.
    """

    guarantee = Reordered()
    targets = ("onednn",)
    emits = ("_FusedMatMul",)

    def __init__(self, channels: Mapping[str, np.ndarray]):
        self.channels = channels  # name of the second product -> indices of the channels
        self.done: set[str] = set()

    def run(self, rewriter):
        graph = rewriter.graph
        changed = False
        for name, channels in self.channels.items():
            node = graph.nodes.get(name)
            if name in self.done or node is None or not can_split(graph, node) or not rewriter.allowed(self, node):
                continue
            self.done.add(name)
            self._split(graph, node, np.asarray(channels, np.int32))
            rewriter.fire(self, node)
            changed = True
        return changed

    @staticmethod
    def _split(graph: Graph, product: Node, channels: np.ndarray) -> None:
        before = product.inputs[0].node
        b = Builder(graph, product.name + "/outliers")
        places = b.const(channels, tf.int32)
        kept = np.ones(product.inputs[0].shape[-1], np.float32)
        kept[channels] = 0.0

        def apart(weight: Value, axis: int) -> Value:
            return b.GatherV2(weight, places, b.const(axis, tf.int32))

        def rest(weight: Value, axis: int) -> Value:
            return b.Mul(weight, b.const(kept[:, None] if weight.rank == 2 and axis == 0 else kept, tf.float32))

        columns, rows = int(not before.attr("transpose_b")), int(bool(product.attr("transpose_b")))
        v, a, w = before.inputs[1], before.inputs[2], product.inputs[1]
        few = b.op(
            "_FusedMatMul",
            [before.inputs[0], apart(v, columns), apart(a, 0)],
            num_args=1,
            fused_ops=before.attr("fused_ops"),
            transpose_b=before.attr("transpose_b"),
        )[0]
        terms = [few, apart(w, rows), product.inputs[2], *product.inputs[3:]]
        extra = b.op(
            "_FusedMatMul",
            terms,
            num_args=len(terms) - 2,
            fused_ops=product.attr("fused_ops"),
            transpose_b=product.attr("transpose_b"),
        )[0]
        graph.set_input(before, 1, rest(v, columns))
        graph.set_input(before, 2, rest(a, 0))
        zeros = b.const(np.zeros(extra.shape[-1], np.float32), tf.float32)
        joined = b.op(
            "_FusedMatMul",
            [product.inputs[0], rest(w, rows), zeros, extra],
            hint="joined",
            num_args=2,
            fused_ops=["BiasAdd", "Add"],
            transpose_b=product.attr("transpose_b"),
        )[0]
        graph.replace(product.output, joined)
        graph.prune(product)

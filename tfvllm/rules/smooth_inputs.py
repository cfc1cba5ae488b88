"""int8: large channels of an input are spread into the weights before it (SmoothQuant)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from tfvllm.graph.builder import Builder
from tfvllm.graph.guarantee import Reordered
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.rewriter import Pass
from tfvllm.rules.int8 import why_not


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
        if graph.is_output(v):
            ends.add((None, 0))
        for node, position in v.uses:
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

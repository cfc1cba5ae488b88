"""A variant of a graph: the kernels it is made of, and the weights that it alone brings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.graph import targets
from tfvllm.graph.ir import Graph
from tfvllm.simplifier import cost


@dataclass
class Variant:
    """One way to compute the whole: its name, its graph, and how far its results may lie from the original's."""

    name: str
    graph: Graph
    extra_tolerance: float = 0.0
    weights: dict[Any, int] = field(default_factory=dict)  # id of a variable, or of its packed copy -> bytes

    def __post_init__(self):
        for value in cost.packed_weights(self.graph):
            capture = self.graph.captures[value.node.inputs[0].node.name]
            self.weights["packed", id(capture.tensor)] = _bytes(capture.owner)
        for node in self.graph.live():
            read = self.graph.captures.get(node.name)
            if read is not None and isinstance(read.owner, tf.Variable):
                self.weights[id(read.tensor)] = _bytes(read.owner)


def _bytes(variable: tf.Variable) -> int:
    return int(np.prod(variable.shape.as_list(), dtype=np.int64)) * variable.dtype.size


def kernel_sets(target: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """Ways to write a graph for a target: (name, target, rules left out). The first is the target's own."""
    if target == targets.PORTABLE:
        return [("public ops", target, ())]
    return [
        ("fused", target, ()),
        ("fused, plain norms", target, ("FuseLayerNorm",)),
        ("public ops", targets.PORTABLE, ()),
    ]


def name_of(*parts: str | bool) -> str:
    """A variant's name: "float32, packed, fused"."""
    return ", ".join(str(p) for p in parts if p) or "rewritten"


def bytes_of(variants: Sequence[Variant]) -> int:
    """Of the weights of all variants together, and of the packed copies that kernels keep, each counted once."""
    together: dict[Any, int] = {}
    for variant in variants:
        together.update(variant.weights)
    return sum(together.values())

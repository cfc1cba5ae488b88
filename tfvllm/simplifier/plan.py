"""What is done to a graph: which rules, for which target, and which of their applications are left out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import tensorflow as tf

from tfvllm.graph.ir import Graph
from tfvllm.graph.rewriter import Rewriter, Step, select
from tfvllm.simplifier import memory


@dataclass(frozen=True)
class Plan:
    """Steps of rules for a target. Whoever wants another makes one of it.

    Attributes:
        skip: (rule, node) pairs that must not fire.
        weights: what rules made of weights, by expression. Every rewrite adds to it, so that all graphs share them.
    """

    steps: tuple[Step, ...]
    target: str
    skip: frozenset[tuple[str, str]] = frozenset()
    weights: dict[Any, tf.Variable] = field(default_factory=dict)

    @property
    def rules(self) -> frozenset[str]:
        """The names of its rules."""
        return frozenset(rule.name for step in self.steps for rule in step.rules)

    def without(self, *rules: str) -> Plan:
        """Without these rules, or those of them that it has."""
        leave = [f"-{rule}" for rule in rules if rule in self.rules]
        return replace(self, steps=tuple(select(self.steps, leave or None)))

    def skipping(self, rule: str, node: str) -> Plan:
        """Without one application of a rule."""
        return replace(self, skip=self.skip | {(rule, node)})

    def on_trial(self) -> Plan:
        """With weights of its own from here on, that go when it goes."""
        return replace(self, weights=dict(self.weights))

    def rewrite(self, graph: Graph, limit: int | None = None) -> Rewriter:
        """The graph rewritten, the original untouched; `limit` stops after so many applications."""
        rewriter = Rewriter(graph.copy(), self.target, self.skip, limit, shared_weights=self.weights)
        rewriter.run(self.steps)
        memory.trim()
        return rewriter

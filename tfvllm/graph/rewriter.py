"""Rules, the pipeline that runs them to a fixed point, and the record of what fired, what declined and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from tfvllm.errors import InputError, TfvllmError
from tfvllm.graph import pattern as patterns
from tfvllm.graph import probes
from tfvllm.graph.builder import Builder, Declined, Skip
from tfvllm.graph.guarantee import Exact, Guarantee
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.pattern import Match


class Rule:
    """One rewrite: a pattern in forward maths, a condition that may refuse with a reason, a replacement.

    A subclass sets `guarantee`, defines `pattern`, and gives `replacement`; `condition` and `targets` are optional.
    The first line of its docstring is its equation.

    Example:
        >>> from tfvllm.graph.guarantee import Exact
        >>> from tfvllm.graph.pattern import op
        >>> class NoMaximum(tfvllm.graph.rewriter.Rule):
        ...     '''max(x, x) -> x.'''
        ...     guarantee = Exact()
        ...     def pattern(self, x):
        ...         return op.Maximum(x, x)
        ...     def replacement(self, b, m):
        ...         return m.x
        >>> twice = tf.function(lambda v: tf.maximum(v, v), input_signature=[tf.TensorSpec([None])])
        >>> tfvllm.simplify(twice, rules=NoMaximum()).report.rules["NoMaximum"]
        1
    """

    guarantee: Guarantee = Exact()
    targets: tuple[str, ...] = ("portable", "onednn")
    emits: tuple[str, ...] = ()  # internal ops it needs kernels for

    @property
    def name(self) -> str:
        return type(self).__name__

    def pattern(self, *variables) -> patterns.Pattern:
        raise TypeError(f"{self.name} has no pattern")

    def condition(self, graph: Graph, m: Match) -> None:
        """Raises `Declined` with the reason where the rule must not fire."""

    def replacement(self, b: Builder, m: Match) -> Value:
        raise TypeError(f"{self.name} has no replacement")

    # ------------------------------------------------------------- how the rewriter calls a rule

    def compiled(self) -> patterns.Pattern:
        found = self.__dict__.get("_compiled")
        if found is None:
            found = self.pattern(**patterns.variables_of(type(self).pattern))
            self.__dict__["_compiled"] = found
        return found

    def run(self, rewriter: Rewriter) -> bool:
        """Tries every node once; whether anything changed."""
        graph, pattern = rewriter.graph, self.compiled()
        names = patterns.roots(pattern)
        changed = False
        for node in graph.order():
            if graph.nodes.get(node.name) is not node or (names is not None and node.op not in names):
                continue
            if not node.outputs or not (node.output.uses or graph.is_output(node.output)):
                continue
            changed |= self._try(rewriter, node, pattern)
        return changed

    def _try(self, rewriter: Rewriter, node: Node, pattern: patterns.Pattern) -> bool:
        graph = rewriter.graph
        reason = None
        for m in pattern.match(graph, node.output, Match()):
            if not rewriter.allowed(self, node):
                return False
            builder, mark = Builder(graph, node.name), graph.mark()
            try:
                self.condition(graph, m)
                new = self.replacement(builder, m)
            except Declined as declined:
                if not isinstance(declined, Skip):
                    reason = reason or str(declined)
                graph.forget(builder.made, mark)
                continue
            if new is node.output:
                return False
            if new.dtype != node.output.dtype:
                raise TfvllmError(f"{self.name} gave {new.dtype.name} for {node.output.dtype.name} at {node.name}")
            self.substitute(rewriter, node, new)
            return True
        if reason is not None:
            rewriter.decline(self, node, reason)
        return False

    def substitute(self, rewriter: Rewriter, node: Node, *values: Value) -> None:
        """A firing: `values` take the place of the results of `node`, which goes with what only it needed."""
        rewriter.fire(self, node)
        for old, new in zip(list(node.outputs), values):
            rewriter.graph.replace(old, new)
        self.removed(rewriter, node)

    @staticmethod
    def removed(rewriter: Rewriter, node: Node) -> None:
        """Deletes a replaced node and what only it needed, so that later conditions count live readers only."""
        rewriter.removed_dead += rewriter.graph.prune(node)


class Pass(Rule):
    """A rewrite that is not the shape of one pattern (merging duplicates, deleting what nobody reads)."""

    def run(self, rewriter: Rewriter) -> bool:
        raise TypeError(f"{self.name} has no run")


Replaced = Mapping[Value, Value]  # what was there -> what takes its place
Rewrite = Callable[[Builder, Node], Replaced | None]


class NodePass(Pass):
    """A rewrite of one node at a time that no pattern says: a subclass sets `ops` and defines `rewrite`.

    Every node of the graph whose op is among `ops` is tried once in a run, in order.
    """

    ops: frozenset[str] = frozenset()

    def begin(self, rewriter: Rewriter) -> Rewrite:
        """What a run calls for each node: `rewrite`, where a run has nothing to remember from node to node."""
        return self.rewrite

    def rewrite(self, b: Builder, node: Node) -> Replaced | None:
        """Which values take the place of which, of this node or others; None where all stays as it is.

        `b` names what it makes after the node. Raises `Declined` with the reason where it must not fire; what was made
        until then is forgotten.
        """
        raise TypeError(f"{self.name} has no rewrite")

    def run(self, rewriter: Rewriter) -> bool:
        graph, rewrite = rewriter.graph, self.begin(rewriter)
        changed = False
        for node in graph.order():
            if node.op in self.ops and graph.nodes.get(node.name) is node and rewriter.allowed(self, node):
                changed |= self._apply(rewriter, rewrite, node)
        return changed

    def _apply(self, rewriter: Rewriter, rewrite: Rewrite, node: Node) -> bool:
        graph = rewriter.graph
        b, mark = Builder(graph, node.name), graph.mark()
        try:
            replaced = rewrite(b, node)
        except Declined as declined:
            graph.forget(b.made, mark)
            if not isinstance(declined, Skip):
                rewriter.decline(self, node, str(declined))
            return False
        if replaced is None:
            return False
        rewriter.fire(self, node)
        for old, new in replaced.items():
            graph.replace(old, new)
        for gone in dict.fromkeys(old.node for old in replaced):
            self.removed(rewriter, gone)
        return True


@dataclass(frozen=True)
class Application:
    """One firing: its number in this run, the rule, the node it replaced."""

    number: int
    rule: str
    node: str
    guarantee: Guarantee


@dataclass
class Rewriter:
    """Runs a pipeline on one graph. `skip` holds (rule, node) pairs that must not fire; `limit` stops after so many."""

    graph: Graph
    target: str = "portable"
    skip: frozenset[tuple[str, str]] = frozenset()
    limit: int | None = None
    fired: list[Application] = field(default_factory=list)
    declined: dict[tuple[str, str], str] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)
    shared_weights: dict = field(default_factory=dict)  # weight expression -> variable, over all signatures
    removed_dead: int = 0
    pipeline: Sequence[Step] = ()
    _rested: dict[Rule, int] = field(default_factory=dict)  # rule -> the graph's version at which it found nothing
    settled: set[tuple[str, str]] = field(default_factory=set)  # functions (name, shapes) that are simplified already

    def allowed(self, rule: Rule, node: Node) -> bool:
        if self.limit is not None and len(self.fired) >= self.limit:
            return False
        within = getattr(rule.guarantee, "within", "")
        if within and any(v.dtype == tf.float16 for v in node.outputs):
            self.decline(rule, node, f"float16 ends at 65504, and {within} may go beyond where the original does not")
            return False
        return (rule.name, node.name) not in self.skip

    def fire(self, rule: Rule, node: Node) -> None:
        """Records that `rule` replaced `node`."""
        self.fired.append(Application(len(self.fired), rule.name, node.name, rule.guarantee))
        self.counts[rule.name] += 1
        self.declined.pop((rule.name, node.name), None)

    def decline(self, rule: Rule, node: Node, reason: str) -> None:
        self.declined[(rule.name, node.name)] = reason

    def run(self, pipeline: Sequence[Step], max_rounds: int = 50) -> None:
        """Each step to its fixed point, in order; the whole until nothing changes."""
        self.pipeline = pipeline
        for _ in range(max_rounds):
            before = len(self.fired)
            for step in pipeline:
                self._run_step(step, max_rounds)
            if len(self.fired) == before:
                return
        raise TfvllmError(f"the rules do not come to rest after {max_rounds} rounds; the last: {self.fired[-1].rule}")

    def _run_step(self, step: Step, max_rounds: int) -> None:
        rules = [r for r in step.rules if self.target in r.targets and probes.available(r.emits) is None]
        for _ in range(max_rounds):
            changed = False
            for rule in rules:
                if self._rested.get(rule) == self.graph.version:
                    continue  # it has seen this very graph and left it alone
                if rule.run(self):
                    changed = True
                else:
                    self._rested[rule] = self.graph.version
            if not changed or not step.repeat:
                return


@dataclass(frozen=True)
class Step:
    """A named part of the pipeline."""

    name: str
    rules: tuple[Rule, ...]
    repeat: bool = True


def select(pipeline: Sequence[Step], wanted: Any) -> list[Step]:
    """The pipeline with the user's choice applied.

    Args:
        wanted: None for all; names to keep (of steps or rules); names with a leading "-" to leave out; `Rule` objects
            to add at the end.
    """
    if wanted is None:
        return list(pipeline)
    wanted = [wanted] if isinstance(wanted, (str, Rule)) else list(wanted)
    extra = tuple(r for r in wanted if isinstance(r, Rule))
    names = [n for n in wanted if isinstance(n, str)]
    known = {s.name for s in pipeline} | {r.name for s in pipeline for r in s.rules}
    for name in names:
        if name.lstrip("-") not in known:
            from difflib import get_close_matches

            near = get_close_matches(name.lstrip("-"), known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(sorted(known))}."
            raise InputError(f"rules: expected the name of a step or a rule, found {name!r}.{hint}")
    without = {n[1:] for n in names if n.startswith("-")}
    only = {n for n in names if not n.startswith("-")}
    steps = []
    for step in pipeline:
        kept = tuple(
            r
            for r in step.rules
            if (not only or step.name in only or r.name in only) and step.name not in without and r.name not in without
        )
        if kept:
            steps.append(Step(step.name, kept, step.repeat))
    if extra:
        steps.append(Step("user", extra))
    return steps


def short(name: str, parts: int = 3) -> str:
    """The telling end of a node's name."""
    pieces = name.split("/")
    return name if len(pieces) <= parts else "…/" + "/".join(pieces[-parts:])

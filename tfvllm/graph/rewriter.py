"""Rules, the pipeline that runs them to a fixed point, and the record of what fired, what declined and why."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError, TfvllmError
from tfvllm.graph import dims, infer, targets
from tfvllm.graph import pattern as patterns
from tfvllm.graph.guarantee import Exact, Guarantee
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.pattern import Match


class Declined(Exception):
    """Raised by a rule that could match but must not rewrite; the message is the reason a user reads.

    Example:
        >>> from tfvllm.graph.rewriter import Declined
        >>> str(Declined("the sum is read elsewhere"))  # raised in a rule's `condition` or `replacement`
        'the sum is read elsewhere'
    """


class Skip(Declined):
    """Raised where the match is by chance, not a near miss: nothing is recorded.

    Example:
        >>> from tfvllm.graph.rewriter import Declined, Skip
        >>> issubclass(Skip, Declined)
        True
    """


class Builder:
    """Makes the nodes of a replacement: `b.MatMul(x, w, transpose_b=True)`, named after the root it replaces."""

    def __init__(self, graph: Graph, scope: str):
        self.graph = graph
        self.scope = scope
        self.made: list[Node] = []

    def __getattr__(self, op_name: str) -> Callable[..., Value]:
        return lambda *inputs, **attrs: self.op(op_name, inputs, **attrs)[0]

    def op(self, op_name: str, inputs: Sequence[Any], hint: str | None = None, **attrs) -> list[Value]:
        """Adds a node and infers its shapes; Python numbers and arrays among `inputs` become constants."""
        like = next((v.dtype for v in inputs if isinstance(v, Value)), None)
        values = [v if isinstance(v, Value) else self.const(v, like) for v in inputs]
        node = self.graph.add(f"{self.scope}/{hint or op_name.lstrip('_')}", op_name, values, attrs)
        infer.infer_node(self.graph, node)
        self.made.append(node)
        return node.outputs

    def const(self, content: Any, dtype: tf.DType | None = None) -> Value:
        if dtype is None:
            dtype = tf.as_dtype(np.asarray(content).dtype)
            dtype = tf.float32 if dtype == tf.float64 else tf.int32 if dtype == tf.int64 else dtype
        array = np.asarray(content, dtype.as_numpy_dtype)
        node = self.graph.add(f"{self.scope}/Const", "Const", [], {"dtype": dtype, "value": array})
        infer.infer_node(self.graph, node)
        self.made.append(node)
        return node.output

    def ints(self, *content: int) -> Value:
        """An int32 vector constant."""
        return self.const(np.asarray(content, np.int32), tf.int32)

    def weight(self, array: np.ndarray, dtype: tf.DType, hint: str = "weight") -> Value:
        value = self.graph.weight(self.graph.unique(f"{self.scope}/{hint}"), array, dtype)
        self.made.append(value.node)
        return value

    def reshape(self, value: Value, sizes: Sequence[Any], like: Sequence[Value] = ()) -> Value:
        """`value` with the shape `sizes` (ints and `Dim`s).

        Unknown sizes are read off `value` and the values `like` it; declines where one can be read off none of them.
        """
        sizes = tuple(sizes)
        if value.shape == sizes:
            return value
        return self.Reshape(value, self.sizes(sizes, [value, *like], whole=value.shape))

    def sizes(self, sizes: Sequence[Any], like: Sequence[Value], whole: tuple | None = None) -> Value:
        """An int32 vector that holds `sizes`. `whole`: the shape being reshaped, which lets one unknown be -1."""
        unknown = [i for i, s in enumerate(sizes) if not isinstance(s, int)]
        if len(unknown) <= 1 and (whole is not None or not unknown) and 0 not in sizes:
            return self.ints(*(s if isinstance(s, int) else -1 for s in sizes))
        return self.Pack(
            *(self.const(s, tf.int32) if isinstance(s, int) else self._size(s, like) for s in sizes), axis=0
        )

    def _size(self, size: Any, like: Sequence[Value]) -> Value:
        for value in _upstream(like):
            for axis, known in enumerate(value.shape or ()):
                if known == size:
                    shape = self.Shape(value, out_type=tf.int32)
                    ends = (self.ints(axis), self.ints(axis + 1), self.ints(1))
                    return self.StridedSlice(shape, *ends, shrink_axis_mask=1)
        if len(size.terms) == 1 and len(size.terms[0][0]) > 1:  # a product of sizes
            names, factor = size.terms[0]
            result = self._size(dims.symbol(names[0]), like)
            for name in names[1:]:
                result = self.Mul(result, self._size(dims.symbol(name), like))
            return result if factor == 1 else self.Mul(result, self.const(factor, tf.int32))
        raise Declined(f"no tensor at hand has an axis of size {size}")


def _upstream(values: Sequence[Value]) -> Iterator[Value]:
    """The values and everything they are computed from, nearest first: a size may be read off any of it."""
    queue = deque(values)
    seen = set(values)
    while queue:
        value = queue.popleft()
        yield value
        for needed in value.node.inputs:
            if needed not in seen:
                seen.add(needed)
                queue.append(needed)


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
            if not node.outputs or not (node.output.readers or graph.is_result(node.output)):
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
        rules = [r for r in step.rules if self.target in r.targets and targets.available(r.emits) is None]
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

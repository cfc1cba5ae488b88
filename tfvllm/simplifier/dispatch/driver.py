"""One graph that computes the same in several variants, and chooses at run time by batch and length.

Packing tokens pays for a large batch and costs nodes for a single short request; a fused norm is faster over many rows
and slower over few. So the variants are measured on this CPU at the shapes of the user's requests, and where no single
one is best, the graph gets a branch: what all variants compute alike stands before it, the rest of each is a branch of
one `StatelessCase`, over the same variables, and a few comparisons of batch, length and their product choose.

The choice is a small decision tree. A branch has to earn its place: a variant is chosen over the default only at shapes
where it is faster beyond the noise, and the finished graph is measured once more against the best single variant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.graph import functions
from tfvllm.graph.ir import Graph
from tfvllm.simplifier import cost, verify
from tfvllm.simplifier.dispatch import requests
from tfvllm.simplifier.dispatch.branch import VariantMerger, branch_body, case_node
from tfvllm.simplifier.dispatch.decision_tree import Leaf, Split, best_single, chosen, decide, leaves, lines, splits
from tfvllm.simplifier.dispatch.measure import FEATURES, Point, measure
from tfvllm.simplifier.dispatch.requests import RequestShape
from tfvllm.simplifier.dispatch.variants import Variant, bytes_of

MEMORY_LIMIT = 2.0  # all variants together, as a multiple of the original's bytes of weights


@dataclass(frozen=True)
class Options:
    """What a user may choose: the requests, and how much memory all variants together may take."""

    kinds: tuple[RequestShape, ...]
    memory_limit: float = MEMORY_LIMIT  # a multiple of the original's bytes of weights
    seconds: float = 40.0  # for measuring one signature, about

    @classmethod
    def check(cls, profile: Any, memory_limit: float | None) -> Options | None:
        """The options, None without a profile, or an InputError."""
        if profile is None:
            if memory_limit is not None:
                raise InputError("memory_limit is for dispatch by shape; give a profile of requests with it.")
            return None
        if memory_limit is not None and not 0 < memory_limit < math.inf:
            raise InputError(f"memory_limit: expected a number above 0, found {memory_limit}.")
        return cls(tuple(requests.read(profile)), MEMORY_LIMIT if memory_limit is None else memory_limit)

    def limit(self, original: Variant) -> float:
        return self.memory_limit * bytes_of([original])

    def for_inputs(self, names: Sequence[str]) -> list[RequestShape]:
        """The kinds that a signature with these inputs can be asked."""
        return [k for k in self.kinds if k.inputs is None or set(k.inputs) == set(names)]


@dataclass
class Outcome:
    """The graph to export, how it compares with the original, and what was measured and decided."""

    graph: Graph
    comparison: verify.Comparison
    details: dict[str, Any]
    example: Graph | None = None  # the variant that is chosen at batch 1, length 128; None where there is no choice


def count(outcome: Outcome) -> dict[str, Any]:
    """Costs as `cost.count` has them: nodes and weights of all branches together, FLOPs of the one that runs."""
    found = cost.count(outcome.graph)
    if outcome.example is not None:
        bodies = [branch_body(outcome.graph, name) for name in functions.names_in(case_node(outcome.graph), "branches")]
        counted = [cost.count(body) for body in bodies]
        found["nodes"] += sum(c["nodes"] for c in counted)
        for c in counted:
            for op, times in c["ops"].items():
                found["ops"][op] = found["ops"].get(op, 0) + times
        found["flops"] = cost.count(outcome.example)["flops"]
    return found


def run(variants: Sequence[Variant], specs: tuple[tuple, dict], verifier: verify.Verifier, options: Options) -> Outcome:
    """Measures the variants on the requests of the profile, and makes the graph that chooses between them.

    Args:
        variants: verified; the original is the last.
        specs: (args, kwargs) of the signature, as for `executable.to_concrete`.
        verifier: holds the original and the samples that every result is compared on.

    The result is one of the variants, unchanged, where choosing does not pay.
    """
    original = variants[-1]
    kinds = options.for_inputs(list(original.graph.inputs))
    merged = VariantMerger(variants)
    if not kinds or merged.shape_value is None:
        why = "no size of its inputs is unknown: every request has one shape"
        if not kinds:
            why = "the profile holds no requests with these inputs"
        return _single(variants[0], verifier, [], {"reason": why, "declined": merged.declined})
    measured = merged.measurer(specs)
    kinds = requests.cluster([_seen(k, original.graph, measured) for k in kinds])
    points = []
    for kind in kinds:
        sample = requests.sample(original.graph, kind, measured)
        batch, length = measured(sample)
        points.append(Point(kind, batch, length, sum(kind.lengths) if kind.lengths else batch * (length or 1), sample))
    measure(points, variants, specs, options.seconds)
    limit = options.limit(original)
    tree = decide(merged.variants, points, limit)
    default = best_single(merged.variants, points, limit)
    details: dict[str, Any] = {"declined": merged.declined, "limit": int(limit)}
    by_name = {v.name: v for v in merged.variants}
    if isinstance(tree, Leaf):
        details["reason"] = "no other way is faster anywhere beyond the noise, by enough to pay"
        return _single(by_name[default], verifier, points, details)
    graph = merged.build(tree)
    used = [by_name[name] for name in dict.fromkeys(leaf.variant for leaf in leaves(tree))]
    extra_tolerance = max(v.extra_tolerance for v in used)
    comparison = verifier.compare(graph, extra_tolerance)
    shapes, empty = _check_shapes(original.graph, tree, points, verifier, measured)
    if shapes:
        around = verify.Verifier(original.graph, specs, [s for _, s in shapes], verifier.rtol, verifier.atol)
        comparison = joined(comparison, around.compare(graph, extra_tolerance))
    if not comparison.agrees:
        details["reason"] = f"the graph that chooses is wrong ({comparison.failures[0]}); please report this"
        return _single(by_name[default], verifier, points, details)
    details["checked"] = [list(shape) for shape, _ in shapes]
    details["empty_batch"] = empty
    duels = [Point(p.kind, p.batch, p.length, p.tokens, p.sample) for p in points]
    measure(duels, [by_name[default], Variant(CHOOSING, graph)], specs, options.seconds / 2)
    total = sum(p.kind.count for p in duels)
    saved = 1 - sum(p.kind.count * p.relative(CHOOSING, default) for p in duels) / total
    details["saved"] = saved
    if saved < 0.01:
        details["reason"] = (
            f"the branch costs what it saves: the mean request takes {1 - saved:.2f} times as long with it"
        )
        return _single(by_name[default], verifier, points, details)
    details |= {
        "pays": True,
        "bytes": bytes_of(used),
        "ways": _listed(used),
        "decision": lines(tree),
        "points": _rows(points, tree, duels),
        "default": default,
    }
    return Outcome(graph, comparison, details, by_name[_at_example(tree)].graph)


CHOOSING = "chosen at run time"


def joined(first: verify.Comparison, second: verify.Comparison) -> verify.Comparison:
    """Two comparisons as one: all samples, the largest differences."""
    worst = max(first, second, key=lambda c: c.max_abs_error / (c.tolerance or 1.0))
    checked = {k: first.checked.get(k, 0) + second.checked.get(k, 0) for k in {**first.checked, **second.checked}}
    return verify.Comparison(
        first.samples + second.samples,
        max(first.max_abs_error, second.max_abs_error),
        max(first.max_rel_error, second.max_rel_error),
        worst.tolerance,
        first.reference,
        [*first.failures, *second.failures],
        {k: why for k, why in {**second.unverified, **first.unverified}.items() if k not in checked},
        checked,
        first.random,
    )


def _seen(kind: RequestShape, graph: Graph, measured: Callable[[list[Any]], tuple[int, int | None]]) -> RequestShape:
    """A real request with its batch and length as the graph sees them."""
    if kind.inputs is None:
        return kind
    batch, length = measured(requests.sample(graph, kind, measured))
    return RequestShape(batch, length, kind.lengths, kind.count, kind.inputs)


def _check_shapes(graph: Graph, tree: Leaf | Split, points: Sequence[Point], verifier: verify.Verifier, measured):
    """Requests on both sides of every threshold, of one row, and of none where the original takes that.

    Their rows are of different lengths, so that there is padding.

    Returns:
        [((batch, length), sample)], and what became of the empty batch.
    """
    wanted: dict[tuple[int, int | None], None] = {}
    for split in splits(tree):
        near = min(points, key=lambda p: abs(math.log(p.feature(split.feature) / split.threshold)))
        rows, size, at = near.batch, near.length or 1, split.threshold
        if split.feature == FEATURES[2]:
            pairs = [(at - 1, size), (at, size)]
        elif split.feature == FEATURES[1]:
            pairs = [(rows, at - 1), (rows, at)]
        else:
            above = -(-at // size)
            pairs = [(above - 1, size), (above, size)] if above > 1 else [(1, at - 1), (1, at)]
        wanted.update({(b, n if near.length else None): None for b, n in pairs if b > 0 and n > 0})
    for point in (min(points, key=lambda p: p.tokens), max(points, key=lambda p: p.length or 1)):
        wanted[1, point.length] = None
    found = []
    for batch, length in wanted:
        each = None if length is None else tuple(max(1, length - (i * 7) % length) for i in range(batch))
        sample = requests.sample(graph, RequestShape(batch, length, each), measured)
        found.append((measured(sample), sample))
    nothing = requests.sample(graph, RequestShape(0, points[0].length, ()), measured)
    try:
        verifier.run(verifier.original, nothing)
    except (tf.errors.OpError, ValueError):
        return found, "the original fails on it"
    return [*found, ((0, points[0].length), nothing)], "checked"


def _single(variant: Variant, verifier: verify.Verifier, points: Sequence[Point], details, duels=()) -> Outcome:
    """One variant for all requests."""
    tree = Leaf(variant.name)
    details = {
        **details,
        "pays": False,
        "bytes": bytes_of([variant]),
        "ways": [],
        "decision": lines(tree),
        "points": _rows(points, tree, duels),
        "default": variant.name,
    }
    return Outcome(variant.graph, verifier.compare(variant.graph, variant.extra_tolerance), details)


def _listed(used: Sequence[Variant]) -> list[dict[str, Any]]:
    return [{"name": v.name, "nodes": cost.count(v.graph)["nodes"], "bytes": bytes_of([v])} for v in used]


def _rows(points: Sequence[Point], tree: Leaf | Split, duels: Sequence[Point] = ()) -> list[dict[str, Any]]:
    """The decision table: one row a kind of request. `again`: the default beside the graph that chooses."""
    rows = []
    for i, point in enumerate(points):
        name = chosen(tree, point)
        row = {
            "batch": point.batch,
            "length": point.length,
            "tokens": point.tokens,
            "count": point.kind.count,
            "ms": {n: round(point.median(n), 4) for n in point.rounds},
            "noise": {n: round(point.ratio(n, name)[1], 4) for n in point.rounds if n != name},
            "choice": name,
        }
        if duels:
            row["again"] = {n: round(duels[i].median(n), 4) for n in duels[i].rounds}
        rows.append(row)
    return rows


def _at_example(tree: Leaf | Split) -> str:
    """The variant at the shape that FLOPs are counted at: batch 1, length 128."""
    return chosen(tree, Point(RequestShape(1, 128), 1, 128, 128, []))

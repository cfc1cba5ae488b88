"""Lower precision for a verified float32 graph: calibrate, smooth, lower; keep in float32 what costs too much."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tfvllm.errors import InputError, VerificationError
from tfvllm.graph import int8_ops, probes, targets
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.ir import Graph, Node
from tfvllm.graph.rewriter import Rewriter, short
from tfvllm.rules import smooth_inputs, split_outliers
from tfvllm.simplifier import calibrate
from tfvllm.simplifier.arguments import REAL_INPUTS
from tfvllm.simplifier.verify import Comparison, Verifier

Ranges = dict[str, tuple[float, float] | None]  # name of a product -> the range of its input; None for a table
MAX_ERROR = 0.1  # relative to the largest magnitude of an output, where the user gives none
_HOLD_OUT = 4  # of eight samples or more every fourth is kept from the ranges, so that verification sees new ones
_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_WORTH = 0.7  # factors that cost nothing are taken where they bring the expected squared error below this share
_WORTH_A_NODE = 0.5  # what costs another node, below this
ACTIVATIONS = ("float32", "bfloat16")  # what there may be between products in int8
_MARGIN = 0.7  # what is left out because the bound holds without it must leave this share of it: inputs to come differ
_OUTLIERS = (1, 2, 4, 8)  # how many channels may be computed apart
MADE_UP = (
    "int8 ranges come from made-up inputs: random ids and normal numbers, not this model's real ones. Pass real inputs "
    f"({REAL_INPUTS}) before relying on its accuracy."
)


@dataclass(frozen=True)
class Options:
    """What a user may choose of int8: the bound on the error, the percentile that sets ranges, the type in between."""

    max_error: float = MAX_ERROR
    percentile: float = 100.0
    activations: str = "float32"

    @classmethod
    def check(
        cls,
        precision: str,
        target: str,
        max_error: float | None,
        percentile: float | None,
        activations: str | None = None,
    ) -> Options:
        """The options, or an InputError that names the next step."""
        if precision != "int8":
            given_all = (("max_error", max_error), ("percentile", percentile), ("activations", activations))
            for name, given in given_all:
                if given is not None:
                    raise InputError(f"{name} is for precision int8, found precision {precision!r}; leave it out.")
            return cls()
        if target != targets.ONEDNN:
            raise InputError(
                "precision 'int8' needs target 'onednn', found 'portable': TensorFlow's public ops have no fast int8 "
                "product on CPUs. Add --target onednn (target='onednn'), or use float32."
            )
        if max_error is not None and not 0 < max_error < 1:
            raise InputError(f"max_error: expected a number between 0 and 1, found {max_error}.")
        if percentile is not None and not 50 <= percentile <= 100:
            raise InputError(f"percentile: expected a number from 50 to 100, found {percentile}.")
        if activations not in (None, *ACTIVATIONS):
            raise InputError(f"activations: expected {' or '.join(ACTIVATIONS)}, found {activations!r}.")
        if activations == "bfloat16":
            probes.check_runs(target, "bfloat16")
        return cls(
            MAX_ERROR if max_error is None else max_error,
            100.0 if percentile is None else percentile,
            activations or ACTIVATIONS[0],
        )


@dataclass
class Outcome:
    """The lowered graph, how far it is from the original, and what was done to each product."""

    rewriter: Rewriter
    comparison: Comparison
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Plan:
    """A graph with what is done before int8 (`base`), and the same in int8."""

    base: Rewriter
    ranges: Ranges
    errors: dict[str, float]  # of each product on the inputs it has where all others are float32
    lowered: Rewriter
    comparison: Comparison
    smoothed: int  # nodes whose channels were scaled or computed apart


class Quantizer:
    """Lowers one verified graph to int8.

    Args:
        verifier: holds the original, the samples and what it gives on them.
        made_up: whether the samples were generated.
        shared: weights made so far, by what they were made of; common to all signatures.
    """

    def __init__(self, verifier: Verifier, options: Options, target: str, shared: dict[Any, Any], made_up: bool):
        self.verifier, self.options, self.target, self.shared = verifier, options, target, shared
        self.made_up = made_up
        samples = verifier.samples
        held_out = len(samples) >= 2 * _HOLD_OUT
        self.samples = [s for i, s in enumerate(samples) if not held_out or i % _HOLD_OUT != _HOLD_OUT - 1]

    def run(self, verified: Graph, name: str) -> Outcome:
        """Raises VerificationError where no choice of products keeps the error within the bound."""
        base = Rewriter(verified.copy(), self.target, shared_weights=self.shared)
        spreads, tables = self._observe(base)
        if not spreads and not tables:
            return Outcome(base, self.verifier.compare(base.graph))
        free, costly = self._factors(base.graph, spreads)
        outliers = self._outliers(base.graph, spreads, {**free, **costly})
        if free:
            base = self._smoothed(verified, free, {})
            spreads, tables = self._observe(base)
        plan = self._plan(base, spreads, tables, len(free))
        if not self._safe(plan) and (costly or outliers):
            plan = self._cheapest(verified, free, costly, outliers, plan)
        if plan.comparison.agrees:
            return self._outcome(plan, {})
        ranges, errors = plan.ranges, plan.errors
        board = calibrate.PrecisionSearch(
            plan.base.graph,
            self.verifier.specs,
            self.verifier.samples,
            self.verifier.wanted(),
            list(ranges),
            lambda graph, node: self._form(graph).build(node, ranges[node.name]),
        )
        kept, sensitivity = board.keep(self.options.max_error)
        while len(kept) < len(ranges):
            chosen = {n: span for n, span in ranges.items() if n not in kept}
            plan.lowered, plan.comparison = self._lower(plan.base, chosen, errors)
            if plan.comparison.agrees:
                for node in kept:
                    moved = f"in int8 it alone moves the result by {sensitivity[node]:.2g}"
                    rule = "QuantizeTables" if ranges[node] is None else "QuantizeProducts"
                    plan.lowered.declined[rule, node] = f"kept in float32: {moved}"
                return self._outcome(plan, sensitivity)
            kept.append(max(chosen, key=sensitivity.__getitem__))
        raise VerificationError(
            f"signature {name!r}: even with one product alone in int8 the results are off by more than "
            f"{self.options.max_error:.3g} of their largest magnitude ({plan.comparison.failures[0]}). Nothing was "
            f"written. Allow more with max_error=, pass real inputs with {REAL_INPUTS}, or use bfloat16."
        )

    # ------------------------------------------------------------------------------------------------------- its steps

    def _plan(
        self, base: Rewriter, spreads: dict[str, calibrate.ActivationStats], tables: list[str], smoothed: int
    ) -> _Plan:
        """`base` in int8. spreads, tables: what `_observe` found in it; smoothed: how many nodes it has changed."""
        from tfvllm.graph.int8_ops import align_zero_point

        ranges: Ranges = dict.fromkeys(tables)
        ranges |= {n: align_zero_point(*s.span(self.options.percentile)) for n, s in spreads.items()}
        errors = self._local_errors(base.graph, ranges)
        lowered, comparison = self._lower(base, ranges, errors)
        return _Plan(base, ranges, errors, lowered, comparison, smoothed)

    def _cheapest(self, verified: Graph, free: dict, costly: dict, outliers: dict, first: _Plan) -> _Plan:
        """The plan with the fewest nodes more that keeps well within the bound, or the one with all of them.

        The products with the largest errors of their own are helped first.
        """

        graph = first.base.graph
        products = [graph.nodes[n] for n, span in first.ranges.items() if span is not None]
        helped = {source.node.name: source.products for source in smooth_inputs.sources(graph, products)}

        def worst(name: str) -> float:
            nodes = [graph.nodes[name]] if name in outliers else helped[name]
            return max(first.errors[n.name] for n in nodes)

        order = sorted([*costly, *outliers], key=worst, reverse=True)

        def first_of(count: int) -> _Plan:
            chosen = order[:count]
            factors = {**free, **{n: costly[n] for n in chosen if n in costly}}
            base = self._smoothed(verified, factors, {n: outliers[n] for n in chosen if n in outliers})
            return self._plan(base, *self._observe(base), len(free) + count)

        known = set(self.shared)
        low, high, best = 1, len(order), first_of(len(order))
        while self._safe(best) and low < high:
            middle = (low + high) // 2
            plan = first_of(middle)
            if self._safe(plan):
                high, best = middle, plan
            else:
                low = middle + 1
            self._let_go(known, best)
        if (
            first.comparison.agrees and not best.comparison.agrees
        ):  # helping did harm: a bound without a margin is better
            best = first
            self._let_go(known, best)
        return best

    def _safe(self, plan: _Plan) -> bool:
        return plan.comparison.agrees and plan.comparison.max_rel_error <= _MARGIN * self.options.max_error

    def _let_go(self, known: set, best: _Plan) -> None:
        """Forgets weights that were made, beside the `known` ones, for other plans than the best."""
        graphs = (best.base.graph, best.lowered.graph)
        used = {id(capture.owner) for graph in graphs for capture in graph.captures.values()}
        for key in set(self.shared) - known:
            made = self.shared[key]
            if not any(id(v) in used for v in (made if isinstance(made, tuple) else (made,))):
                del self.shared[key]

    def _observe(self, rewriter: Rewriter) -> tuple[dict[str, calibrate.ActivationStats], list[str]]:
        """The spread of the input of every product that can become int8, by its name; the names of tables that can."""
        from tfvllm.rules.int8 import why_not

        products: list[Node] = []
        tables: list[Node] = []
        for node in rewriter.graph.live():
            reason = why_not(rewriter.graph, node)
            if reason is None:
                (tables if node.op == "GatherV2" else products).append(node)
            elif reason:
                rewriter.declined["QuantizeProducts", node.name] = reason
        values = list(dict.fromkeys(n.inputs[0] for n in products))
        found = calibrate.observe(rewriter.graph, self.verifier.specs, self.samples, values) if values else {}
        return {n.name: found[n.inputs[0]] for n in products}, [n.name for n in tables]

    def _factors(self, graph: Graph, spreads: dict[str, calibrate.ActivationStats]):
        """Smoothing factors by source node: those that cost nothing at run time, and those that cost a layer norm."""

        free: dict[str, np.ndarray] = {}
        costly: dict[str, np.ndarray] = {}
        for source in smooth_inputs.sources(graph, [graph.nodes[n] for n in spreads]):
            spread = spreads[source.products[0].name]
            weights = []
            for node in source.products:
                array = graph.array(node.inputs[1])
                assert array is not None
                weights.append(array.T if node.attr("transpose_b") else array)
            rows = np.max([np.abs(w).max(axis=1) for w in weights], axis=0)
            plain = _expected_error(spread, weights, np.ones(rows.shape))
            options = [int8_ops.smoothing(spread.largest, rows, alpha) for alpha in _ALPHAS]
            errors = [_expected_error(spread, weights, factors) for factors in options]
            best = int(np.argmin(errors))
            if errors[best] < plain * (_WORTH if source.private else _WORTH_A_NODE):
                (free if source.private else costly)[source.node.name] = options[best]
        return free, costly

    def _outliers(self, graph: Graph, spreads: dict[str, calibrate.ActivationStats], factors) -> dict[str, np.ndarray]:
        """Channels to be computed apart, by product: as few as bring the expected error down enough."""

        found = {}
        for name, spread in spreads.items():
            node = graph.nodes[name]
            if not split_outliers.can_split(graph, node) or node.inputs[0].node.name in factors:
                continue
            array = graph.array(node.inputs[1])
            assert array is not None
            weight = array.T if node.attr("transpose_b") else array
            ones = np.ones(len(weight))
            plain = _expected_error(spread, [weight], ones)
            order = np.argsort(-spread.largest)
            for count in _OUTLIERS:
                rest = np.ones(len(weight))
                rest[order[:count]] = 0.0
                inner = calibrate.ActivationStats(
                    spread.largest * rest, spread.squares * rest, spread.counts, spread.ends
                )
                if _expected_error(inner, [weight * rest[:, None]], ones) < plain * _WORTH_A_NODE:
                    found[name] = np.sort(order[:count])
                    break
        return found

    def _smoothed(self, verified: Graph, factors: dict[str, np.ndarray], outliers: dict[str, np.ndarray]) -> Rewriter:
        from tfvllm import rules

        rewriter = Rewriter(verified.copy(), self.target, shared_weights=self.shared)
        rewriter.run(rules.smoothing(factors, outliers))
        return rewriter

    def _form(self, graph: Graph):
        from tfvllm.rules.int8 import Int8Form

        return Int8Form(graph, self.shared, {})

    def _local_errors(self, graph: Graph, ranges: Ranges) -> dict[str, float]:
        """The relative error of each product in int8 on the inputs it has where all others are float32."""
        both = graph.copy()
        form = self._form(both)
        pairs = {n: (both.nodes[n].output, form.build(both.nodes[n], span)) for n, span in ranges.items()}
        return calibrate.local_errors(both, self.verifier.specs, self.samples, pairs)

    def _lower(self, base: Rewriter, ranges: Ranges, errors: dict[str, float]) -> tuple[Rewriter, Comparison]:
        from tfvllm.rules import between_int8, lowering

        lowered = Rewriter(base.graph.copy(), self.target, shared_weights=self.shared)
        lowered.declined.update(base.declined)
        lowered.fired.extend(base.fired)
        lowered.counts.update(base.counts)
        inputs = f"{len(self.samples)} {'made-up' if self.made_up else 'given'} inputs"
        guarantee = Approximate(
            max(errors[n] for n in ranges), domain=inputs, source="root mean square error of one product, measured"
        )
        lowered.run(lowering("int8", ranges, guarantee))
        if self.options.activations == "bfloat16":
            lowered.run(between_int8())
        targets.check_graph(lowered.graph, self.target)
        return lowered, self.verifier.compare(lowered.graph, self.options.max_error)

    def _outcome(self, plan: _Plan, sensitivity: dict[str, float]) -> Outcome:
        lowered, comparison, ranges, errors = plan.lowered, plan.comparison, plan.ranges, plan.errors

        def entry(node: str) -> dict[str, Any]:
            kept = node in lowered.graph.nodes
            span = ranges[node]
            found = {
                "where": short(node),
                "what": "table" if span is None else "product",
                "precision": "float32" if kept else "int8",
                "range": None if span is None else list(span),
                "error": errors[node],
            }
            return {**found, "sensitivity": sensitivity[node]} if sensitivity else found

        details = {
            "activations": self.options.activations,
            "max_error": self.options.max_error,
            "error": comparison.max_rel_error,
            "ranges": {
                "inputs": "made-up" if self.made_up else "given",
                "samples": len(self.samples),
                "percentile": self.options.percentile,
            },
            "smoothed": plan.smoothed,
            "products": [entry(node) for node in ranges],
        }
        return Outcome(lowered, comparison, details)


def keep_from_bfloat16(graph: Graph, verifier: Verifier, bound: float) -> dict[str, float]:
    """The products that bfloat16 must leave alone for the error to stay within `bound`, each with its sensitivity.

    Sensitivity is measured: the largest error of the results, relative to their largest magnitude, with that product
    alone in bfloat16.
    """
    from tfvllm.rules.bfloat16 import is_matmul, lowered_matmul

    products = [n.name for n in graph.live() if is_matmul(n)]
    if not products:
        return {}
    board = calibrate.PrecisionSearch(
        graph, verifier.specs, verifier.samples, verifier.wanted(), products, lowered_matmul
    )
    kept, sensitivity = board.keep(bound)
    return {n: sensitivity[n] for n in kept}


def _expected_error(spread: calibrate.ActivationStats, weights: list[np.ndarray], factors: np.ndarray) -> float:
    """The expected squared rounding error of x/s @ s·w in int8, summed over all columns of all weights.

    Rounding to steps of d adds d²/12; the input has one step for all, a weight one for each column.
    """
    step = 2 * np.max(spread.largest / factors) / 255.0
    squares = float(np.sum(spread.squares / factors**2))
    error = 0.0
    for weight in weights:
        scaled = weight.astype(np.float64) * factors[:, None]
        error += step**2 / 12 * float(np.sum(scaled**2))
        error += float(np.sum((np.abs(scaled).max(axis=0) / 127.0) ** 2)) / 12 * squares
    return error

"""Runs the pipeline of rules over one graph: applies, verifies, rolls back, measures, lowers, dispatches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tfvllm import timing
from tfvllm.errors import InputError, VerificationError
from tfvllm.graph import executable, targets
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.ir import Graph
from tfvllm.graph.rewriter import Application, Rewriter, Rule, Step, select, short
from tfvllm.simplifier import cost, quantize, verify
from tfvllm.simplifier.diagram import diagram
from tfvllm.simplifier.dispatch import driver
from tfvllm.simplifier.dispatch.variants import Variant, kernel_sets, name_of
from tfvllm.simplifier.plan import Plan
from tfvllm.simplifier.report_data import SignatureReport

PRECISIONS = ("float32", "bfloat16", "int8")


_MAX_ROLLBACKS = 20


_STRUCTURAL = ("clean", "layout", "weights")  # steps that only tidy up: not worth a measurement


LOWERED_TOLERANCE = 0.05  # relative to the largest magnitude of an output; --rtol and --atol add to it


LIVE = "live: the weights are the model's own, and no rule made a new one of them"


SHARED = "{}: the graph writes it and it cannot be copied, so the model and the result share it"


@dataclass(frozen=True)
class Verified:
    """A rewritten graph that was held against the original, and the plan it is made by."""

    plan: Plan
    rewriter: Rewriter
    comparison: verify.Comparison


class Engine:
    """One call's options, and the plan of its signatures, which share the weights that rules make."""

    def __init__(
        self,
        target: str,
        precision: str,
        rules: Any,
        rtol: float | None,
        atol: float | None,
        int8: quantize.Options | None = None,
        measure: bool = False,
        requests: driver.Options | None = None,
        from_disk: bool = False,  # whether nobody else holds the original's variables
    ):
        from tfvllm.rules import LAST, between_int8, lowering, pipeline, smoothing

        if precision not in PRECISIONS:
            raise InputError(f"precision: expected one of {', '.join(PRECISIONS)}, found {precision!r}.")
        self.precision, self.lowering = precision, lowering(precision)
        steps = select(pipeline(precision), rules)
        self.last: list[Step] = []  # what has to wait for the lowering
        if precision != "float32":
            self.last = [s for s in steps if s.name == LAST]
            steps = [s for s in steps if s.name != LAST]
        self.plan = Plan(tuple(steps), targets.check(target))
        self.int8 = int8 or quantize.Options()
        self.made_up = False
        self.measure, self.requests, self.from_disk = measure, requests, from_disk
        self.judged: set[str] = set()  # rules that were measured, on whichever signature
        self.rtol, self.atol = rtol, atol
        every = [*steps, *self.last, *self.lowering, *smoothing({}, {}), *between_int8()]
        self.described = {r.name: r for s in every for r in s.rules}

    def run(self, graph: Graph, specs, name: str, samples) -> tuple[Graph, SignatureReport]:
        verifier = verify.Verifier(graph, specs, samples, self.rtol, self.atol)
        for wanted, what in (
            (self.lowering, f"precision {self.precision}"),
            (self.measure, "measure"),
            (self.requests, "profile"),
        ):
            if wanted:
                verifier.require_runs(what)
        section = SignatureReport(name, cost.count(graph), {}, diagrams={"before": diagram(graph)})
        plain = self._verified(graph, verifier, section, self.plan)
        if self.measure:
            plain = self._keep_what_pays(graph, verifier, section, plain)
            self.plan = replace(plain.plan, skip=frozenset())  # what does not pay is left out of all signatures
        section.fired = self._fired(plain.rewriter)
        final = plain
        if self.lowering:
            self.made_up |= samples is None
            final = self._lower(plain, verifier, section, samples is None)
            section.fired.update(self._fired(final.rewriter))
        result, comparison = final.rewriter.graph, final.comparison
        section.after = cost.count(result)
        section.diagrams["after"] = diagram(result)
        if self.requests is not None:
            variants = _distinct(self._variants(graph, verifier, section, plain, final, samples is None))
            outcome = driver.run([*variants, Variant("the original", graph)], specs, verifier, self.requests)
            result, comparison, section.dispatch = outcome.graph, outcome.comparison, outcome.details
            section.after = driver.count(outcome)
            if not outcome.details["pays"]:
                section.diagrams["after"] = diagram(result)
        section.declined = declined_rules(final.rewriter)
        section.removed_dead = final.rewriter.removed_dead
        section.verification = comparison.to_dict()
        return result, section

    def _variants(
        self, graph: Graph, verifier: verify.Verifier, section, plain: Verified, final: Verified, made_up: bool
    ) -> Iterator[Variant]:
        """The same computation as rewritten, without packing, without fused norms, in public ops.

        Where a lower precision was asked for, in float32 too: what is more exact is always allowed.
        """
        scratch = SignatureReport(section.name, section.before, {})
        lowered, exact = final is not plain, "float32" if self.lowering else ""
        packing: dict[str, tuple[str, ...]] = {"": ()}  # word for it -> rules left out
        if "PackTokens" in plain.rewriter.counts:
            packing = {"packed": (), "padded": ("TrimPadding", "PackTokens")}
        usual = next(iter(packing))
        if lowered:
            yield Variant(name_of(self.precision, usual), final.rewriter.graph, self._lowered_slack)
        for style, target, without in kernel_sets(plain.plan.target):
            own = not without and target == plain.plan.target
            for pack, unpacked in packing.items():
                plan = replace(plain.plan.without(*without, *unpacked), target=target)
                try:
                    found = plain if own and pack == usual else self._verified(graph, verifier, scratch, plan)
                    yield Variant(name_of(exact, pack, style), found.rewriter.graph, _extra_tolerance(found.rewriter))
                    if own and self.from_disk:
                        yield from self._prepacked(found, verifier, name_of(exact, pack, "fused, weights kept packed"))
                    if own and lowered and pack == "padded":
                        other = self._lower(found, verifier, scratch, made_up)
                        yield Variant(name_of(self.precision, pack), other.rewriter.graph, self._lowered_slack)
                except VerificationError:
                    continue  # one variant fewer

    def _prepacked(self, found: Verified, verifier: verify.Verifier, name: str) -> Iterator[Variant]:
        """With packed copies of float32 weights kept for few rows, where the target has such kernels."""
        from tfvllm.rules.prepack_weights import PrepackWeightsSmallBatch

        rewriter = Rewriter(found.rewriter.graph.copy(), found.plan.target)
        rewriter.run([Step("few", (PrepackWeightsSmallBatch(),))])
        extra_tolerance = _extra_tolerance(found.rewriter)
        if rewriter.fired and verifier.compare(rewriter.graph, extra_tolerance).agrees:
            yield Variant(name, rewriter.graph, extra_tolerance)

    def _verified(self, graph: Graph, verifier: verify.Verifier, section: SignatureReport, plan: Plan) -> Verified:
        """The graph rewritten by a plan; what is wrong is rolled back, and skipped in the plan that is returned."""
        for _ in range(_MAX_ROLLBACKS + 1):
            rewriter = plan.rewrite(graph)
            targets.check_graph(rewriter.graph, plan.target)
            comparison = verifier.compare(rewriter.graph, _extra_tolerance(rewriter))
            if comparison.agrees:
                break
            guilty = _bisect(graph, verifier, rewriter, plan)
            if guilty is None or len(section.rolled_back) == _MAX_ROLLBACKS:
                raise VerificationError(
                    f"signature {section.name!r}: the simplified graph does not compute what the original does "
                    f'({comparison.failures[0]}). Nothing was written. Leave rules out with rules="-NAME", or '
                    "allow more with rtol=."
                )
            plan = plan.skipping(guilty.rule, guilty.node)
            section.rolled_back.append(
                {"rule": guilty.rule, "where": short(guilty.node), "reason": comparison.failures[0]}
            )
        return Verified(plan, rewriter, comparison)

    def _keep_what_pays(
        self, graph: Graph, verifier: verify.Verifier, section: SignatureReport, best: Verified
    ) -> Verified:
        """Leaves out each rule that fired, one after the other; those without which the graph is faster stay out.

        Where the difference does not stand out from the noise, a rule that adds nodes must save FLOPs to stay. Each is
        judged once, on the first signature it fires on, and for all.
        """
        structural = {r.name for s in best.plan.steps if s.name in _STRUCTURAL for r in s.rules}
        for rule in [r for r in best.rewriter.counts if r not in structural and r not in self.judged]:
            self.judged.add(rule)
            plan = best.plan.without(rule).on_trial()
            trial = plan.rewrite(graph)
            with verifier.state.kept():
                duel = timing.duel(verifier.calls(best.rewriter.graph), verifier.calls(trial.graph))
            pays = duel.winner == "first" or (duel.winner is None and not _burdens(best.rewriter.graph, trial.graph))
            comparison = best.comparison if pays else verifier.compare(trial.graph, _extra_tolerance(trial))
            drop = not pays and comparison.agrees
            why = {"first": "faster with it", "second": "faster without it", None: "no difference beyond the noise"}
            section.measured.append(
                {
                    "rule": rule,
                    "with_ms": round(duel.first_ms, 4),
                    "without_ms": round(duel.second_ms, 4),
                    "noise": round(duel.noise, 4),
                    "finding": why[duel.winner],
                    "kept": not drop,
                }
            )
            if drop:
                best = Verified(plan, trial, comparison)
        return best

    def _lower(
        self, verified: Verified, verifier: verify.Verifier, section: SignatureReport, made_up: bool
    ) -> Verified:
        """The verified float32 graph in the wanted precision."""
        plan, exact = verified.plan, verified.rewriter
        if self.precision == "int8":
            quantizer = quantize.Quantizer(verifier, self.int8, plan.target, plan.weights, made_up)
            outcome = quantizer.run(exact.graph, section.name)
            lowered, comparison, section.lowering = outcome.rewriter, outcome.comparison, outcome.details
        else:
            lowered, comparison = self._bfloat16(verified, verifier, {})
            if not comparison.agrees:
                kept = quantize.keep_from_bfloat16(exact.graph, verifier, LOWERED_TOLERANCE)
                lowered, comparison = self._bfloat16(verified, verifier, kept)
        lowered.declined = {**exact.declined, **lowered.declined}
        if comparison.agrees and self.last:
            before = len(lowered.fired)
            lowered.run(self.last)
            if len(lowered.fired) > before:
                comparison = verifier.compare(lowered.graph, self._lowered_slack)
        if comparison.status == "not verified":
            reason = next(iter(comparison.unverified.values()))
            raise InputError(
                f"signature {section.name!r}: precision {self.precision} needs results to be held against, and none "
                f"can be: {reason}. Use float32, or pass inputs on which the model gives the same twice."
            )
        if not comparison.agrees:
            bound, more = self._lowered_slack, "max_error=" if self.precision == "int8" else "rtol="
            raise VerificationError(
                f"signature {section.name!r}: {self.precision} is off by more than {bound:.3g} of the result's largest "
                f"magnitude ({comparison.failures[0]}). Nothing was written. Allow more with {more}, or stay with "
                "float32."
            )
        return Verified(plan, lowered, comparison)

    @property
    def _lowered_slack(self) -> float:
        """How far results may lie from the original's in the lower precision."""
        return self.int8.max_error if self.precision == "int8" else LOWERED_TOLERANCE

    def _bfloat16(self, verified: Verified, verifier: verify.Verifier, kept: dict[str, float]):
        lowered = Rewriter(
            verified.rewriter.graph.copy(),
            verified.plan.target,
            skip=frozenset(("LowerProducts", node) for node in kept),
            shared_weights=verified.plan.weights,
        )
        lowered.run(self.lowering)
        for node, sensitivity in kept.items():
            moved = f"in bfloat16 it alone moves the result by {sensitivity:.2g}"
            lowered.declined["LowerProducts", node] = f"kept in float32: {moved}"
        targets.check_graph(lowered.graph, verified.plan.target)
        return lowered, verifier.compare(lowered.graph, LOWERED_TOLERANCE)

    def check_lowered(self, sections: Iterable[SignatureReport]) -> None:
        """Raises InputError where int8 was asked for and found nothing to do."""
        if self.precision == "int8" and not any(s.lowering for s in sections):
            raise InputError(
                "int8: expected a float32 product with a weight of 4096 elements or more, found none (tfvllm inspect "
                "tells what there is). Use precision float32."
            )

    def notes(self) -> list[str]:
        """What a user must know of the whole run."""
        return [quantize.MADE_UP] if self.precision == "int8" and self.made_up else []

    def _fired(self, rewriter: Rewriter) -> dict[str, dict[str, Any]]:
        guarantees = {a.rule: str(a.guarantee) for a in rewriter.fired}
        return {
            rule: {"count": n, "guarantee": guarantees[rule], "equation": _equation(self.described[rule])}
            for rule, n in rewriter.counts.most_common()
        }


def _distinct(variants: Iterable[Variant]) -> list[Variant]:
    """Of variants that are the same node by node, the first."""
    found: dict[tuple, Variant] = {}
    for variant in variants:
        found.setdefault(executable.fingerprint(variant.graph), variant)
    return list(found.values())


def _extra_tolerance(rewriter: Rewriter) -> float:
    """What the approximate rules that fired may add, relative: each once, for errors do not all point one way."""
    kinds = {a.rule: a.guarantee for a in rewriter.fired if isinstance(a.guarantee, Approximate)}
    return sum(4 * g.max_error for g in kinds.values())


def _bisect(graph: Graph, verifier: verify.Verifier, rewriter: Rewriter, plan: Plan) -> Application | None:
    """The first application without which the graph is still right; None if even none of them is wrong."""

    def wrong(count: int) -> bool:
        return not verifier.compare(plan.rewrite(graph, limit=count).graph, _extra_tolerance(rewriter)).agrees

    low, high = 0, len(rewriter.fired)
    if high == 0 or wrong(0):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if wrong(middle) else (middle, high)
    return plan.rewrite(graph, limit=high).fired[high - 1]


def _burdens(graph: Graph, other: Graph) -> bool:
    """Whether a graph has more nodes than another and saves no operations by it."""
    mine, others = cost.count(graph), cost.count(other)
    return mine["nodes"] > others["nodes"] and mine["flops"] >= others["flops"]


def _equation(rule: Rule) -> str:
    return (type(rule).__doc__ or "").strip().split("\n")[0]


def declined_rules(rewriter: Rewriter) -> list[dict[str, str]]:
    """Near misses in the final graph, one line for each rule and reason, with how often."""
    grouped: Counter = Counter()
    first: dict[tuple[str, str], str] = {}
    for (rule, node), reason in rewriter.declined.items():
        if node in rewriter.graph.nodes:
            grouped[(rule, reason)] += 1
            first.setdefault((rule, reason), short(node))
    return [
        {"rule": rule, "where": first[(rule, reason)] + (f" and {n - 1} more" if n > 1 else ""), "reason": reason}
        for (rule, reason), n in grouped.most_common()
    ]

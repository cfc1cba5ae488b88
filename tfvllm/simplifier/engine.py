"""Runs the pipeline of rules over one graph: applies, verifies, rolls back, measures, lowers, dispatches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from tfvllm import timing
from tfvllm.errors import InputError, VerificationError
from tfvllm.graph import executable, targets
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.ir import Graph
from tfvllm.graph.rewriter import Rewriter, Rule, Step, select, short
from tfvllm.simplifier import cost, memory, quantize, verify
from tfvllm.simplifier.diagram import diagram
from tfvllm.simplifier.dispatch import driver, variants
from tfvllm.simplifier.report_data import SignatureReport

PRECISIONS = ("float32", "bfloat16", "int8")


_MAX_ROLLBACKS = 20


_STRUCTURAL = ("clean", "layout", "weights")  # steps that only tidy up: not worth a measurement


LOWERED_TOLERANCE = 0.05  # relative to the largest magnitude of an output; --rtol and --atol add to it


LIVE = "live: the weights are the model's own, and no rule made a new one of them"


SHARED = "{}: the graph writes it and it cannot be copied, so the model and the result share it"


class Engine:
    """One call's options, and the weights that several signatures share."""

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
        self.target, self.precision = targets.check(target), precision
        self.steps: list[Step] = select(pipeline(precision), rules)
        self.lowering = lowering(precision)
        self.last: list[Step] = []  # what has to wait for the lowering
        if precision != "float32":
            self.last = [s for s in self.steps if s.name == LAST]
            self.steps = [s for s in self.steps if s.name != LAST]
        self.int8 = int8 or quantize.Options()
        self.made_up = False
        self.measure, self.requests, self.from_disk = measure, requests, from_disk
        self.judged: set[str] = set()  # rules that were measured, on whichever signature
        self.rtol, self.atol = rtol, atol
        self.shared_weights: dict[Any, tf.Variable] = {}
        every = [*self.steps, *self.last, *self.lowering, *smoothing({}, {}), *between_int8()]
        self.described = {r.name: r for s in every for r in s.rules}

    def rewrite(self, graph: Graph, skip: frozenset = frozenset(), limit: int | None = None) -> Rewriter:
        rewriter = Rewriter(graph.copy(), self.target, skip, limit, shared_weights=self.shared_weights)
        rewriter.run(self.steps)
        memory.trim()
        return rewriter

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
        skip: set[tuple[str, str]] = set()
        rewriter, comparison = self._verified(graph, verifier, section, skip)
        if self.measure:
            rewriter, comparison = self._keep_what_pays(graph, verifier, section, skip, rewriter, comparison)
        section.fired = self._fired(rewriter)
        plain = rewriter
        if self.lowering:
            self.made_up |= samples is None
            rewriter, comparison = self._lower(rewriter, verifier, section, samples is None)
            section.fired.update(self._fired(rewriter))
        result = rewriter.graph
        section.after = cost.count(result)
        section.diagrams["after"] = diagram(result)
        if self.requests is not None:
            ways = self._ways(graph, verifier, section, skip, plain, rewriter, samples is None)
            outcome = driver.run(ways, specs, verifier, self.requests)
            result, comparison, section.dispatch = outcome.graph, outcome.comparison, outcome.details
            section.after = driver.count(outcome)
            if not outcome.details["pays"]:
                section.diagrams["after"] = diagram(result)
        section.declined = declined_rules(rewriter)
        section.removed_dead = rewriter.removed_dead
        section.verification = comparison.to_dict()
        return result, section

    def _ways(self, graph: Graph, verifier, section, skip: set, plain: Rewriter, lowered: Rewriter, made_up: bool):
        """The same computation as rewritten, without packing, without fused norms, in public ops; as it was, last.

        Where a lower precision was asked for, in float32 too: what is more exact is always allowed.
        """
        scratch = SignatureReport(section.name, section.before, {})
        found: dict[tuple, variants.Variant] = {}
        float32 = "float32" if self.lowering else ""
        slack = self.int8.max_error if self.precision == "int8" else LOWERED_TOLERANCE
        packing = ("packed", "padded") if "PackTokens" in plain.counts else ("",)
        kept = self.steps, self.target
        known = {r.name for s in self.steps for r in s.rules}

        def add(name: str, graph: Graph, slack: float) -> None:
            found.setdefault(executable.fingerprint(graph), variants.Variant(name, graph, slack))

        if lowered is not plain:
            add(variants.name_of(self.precision, packing[0]), lowered.graph, slack)
        for number, (style, target, without) in enumerate(variants.kernel_sets(self.target)):
            for pack in packing:
                padded = ("TrimPadding", "PackTokens") if pack == "padded" else ()
                leave = [f"-{r}" for r in (*without, *padded) if r in known]
                self.steps, self.target = select(kept[0], leave or None), target
                try:
                    first = number == 0 and pack == packing[0]
                    rewriter = plain if first else self._verified(graph, verifier, scratch, set(skip))[0]
                    add(variants.name_of(float32, pack, style), rewriter.graph, self._slack(rewriter))
                    if number == 0 and self.from_disk:
                        self._add_packed(
                            rewriter, verifier, variants.name_of(float32, pack, "fused, weights kept packed"), add
                        )
                    if lowered is not plain and number == 0 and pack == "padded":
                        other, _ = self._lower(rewriter, verifier, scratch, made_up)
                        add(variants.name_of(self.precision, pack), other.graph, slack)
                except VerificationError:
                    continue  # one way fewer
                finally:
                    self.steps, self.target = kept
        return [*found.values(), variants.Variant("the original", graph)]

    def _add_packed(self, verified: Rewriter, verifier: verify.Verifier, name: str, add: Callable) -> None:
        """A way that keeps packed copies of float32 weights for few rows, where the target has such kernels."""
        from tfvllm.rules.prepack_weights import PrepackWeightsSmallBatch

        rewriter = Rewriter(verified.graph.copy(), self.target)
        rewriter.run([Step("few", (PrepackWeightsSmallBatch(),))])
        slack = self._slack(verified)
        if rewriter.fired and verifier.compare(rewriter.graph, slack).agrees:
            add(name, rewriter.graph, slack)

    def _verified(self, graph: Graph, verifier: verify.Verifier, section: SignatureReport, skip: set):
        """The rewritten graph and its comparison; what is wrong is rolled back, and added to `skip`."""
        for _ in range(_MAX_ROLLBACKS + 1):
            rewriter = self.rewrite(graph, frozenset(skip))
            targets.check_graph(rewriter.graph, self.target)
            comparison = verifier.compare(rewriter.graph, self._slack(rewriter))
            if comparison.agrees:
                break
            guilty = self._bisect(graph, verifier, rewriter, frozenset(skip))
            if guilty is None or len(section.rolled_back) == _MAX_ROLLBACKS:
                raise VerificationError(
                    f"signature {section.name!r}: the simplified graph does not compute what the original does "
                    f'({comparison.failures[0]}). Nothing was written. Leave rules out with rules="-NAME", or '
                    "allow more with rtol=."
                )
            skip.add((guilty.rule, guilty.node))
            section.rolled_back.append(
                {"rule": guilty.rule, "where": short(guilty.node), "reason": comparison.failures[0]}
            )
        return rewriter, comparison

    def _keep_what_pays(
        self, graph: Graph, verifier: verify.Verifier, section: SignatureReport, skip: set, best, found
    ):
        """Leaves out each rule that fired, one after the other; those without which the graph is faster stay out.

        Where the difference does not stand out from the noise, a rule that adds nodes must save FLOPs to stay. Each is
        judged once, on the first signature it fires on, and for all.
        """
        structural = {r.name for s in self.steps if s.name in _STRUCTURAL for r in s.rules}
        for rule in [r for r in best.counts if r not in structural and r not in self.judged]:
            self.judged.add(rule)
            kept = self.steps, self.shared_weights
            # Weights made for a trial go with it.
            self.steps, self.shared_weights = select(self.steps, f"-{rule}"), dict(self.shared_weights)
            trial = self.rewrite(graph, frozenset(skip))
            with verifier.state.kept():
                duel = timing.duel(verifier.calls(best.graph), verifier.calls(trial.graph))
            pays = duel.winner == "first" or (duel.winner is None and not _burdens(best.graph, trial.graph))
            comparison = found if pays else verifier.compare(trial.graph, self._slack(trial))
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
                best, found = trial, comparison
            else:
                self.steps, self.shared_weights = kept
        return best, found

    def _lower(self, verified: Rewriter, verifier: verify.Verifier, section: SignatureReport, made_up: bool):
        """The verified float32 graph in the wanted precision, and how far that is from the original."""
        if self.precision == "int8":
            quantizer = quantize.Quantizer(verifier, self.int8, self.target, self.shared_weights, made_up)
            outcome = quantizer.run(verified.graph, section.name)
            lowered, comparison, section.lowering = outcome.rewriter, outcome.comparison, outcome.details
        else:
            lowered, comparison = self._bfloat16(verified.graph, verifier, {})
            if not comparison.agrees:
                kept = quantize.keep_from_bfloat16(verified.graph, verifier, LOWERED_TOLERANCE)
                lowered, comparison = self._bfloat16(verified.graph, verifier, kept)
        lowered.declined = {**verified.declined, **lowered.declined}
        if comparison.agrees and self.last:
            before = len(lowered.fired)
            lowered.run(self.last)
            if len(lowered.fired) > before:
                slack = self.int8.max_error if self.precision == "int8" else LOWERED_TOLERANCE
                comparison = verifier.compare(lowered.graph, slack)
        if comparison.status == "not verified":
            reason = next(iter(comparison.unverified.values()))
            raise InputError(
                f"signature {section.name!r}: precision {self.precision} needs results to be held against, and none "
                f"can be: {reason}. Use float32, or pass inputs on which the model gives the same twice."
            )
        if not comparison.agrees:
            bound, more = (
                (self.int8.max_error, "max_error=") if self.precision == "int8" else (LOWERED_TOLERANCE, "rtol=")
            )
            raise VerificationError(
                f"signature {section.name!r}: {self.precision} is off by more than {bound:.3g} of the result's largest "
                f"magnitude ({comparison.failures[0]}). Nothing was written. Allow more with {more}, or stay with "
                "float32."
            )
        return lowered, comparison

    def _bfloat16(self, graph: Graph, verifier: verify.Verifier, kept: dict[str, float]):
        lowered = Rewriter(
            graph.copy(),
            self.target,
            skip=frozenset(("LowerProducts", node) for node in kept),
            shared_weights=self.shared_weights,
        )
        lowered.run(self.lowering)
        for node, sensitivity in kept.items():
            moved = f"in bfloat16 it alone moves the result by {sensitivity:.2g}"
            lowered.declined["LowerProducts", node] = f"kept in float32: {moved}"
        targets.check_graph(lowered.graph, self.target)
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

    def _slack(self, rewriter: Rewriter) -> float:
        """What the approximate rules that fired may add, relative: each once, for errors do not all point one way."""
        kinds = {a.rule: a.guarantee for a in rewriter.fired if isinstance(a.guarantee, Approximate)}
        return sum(4 * g.max_error for g in kinds.values())

    def _bisect(self, graph: Graph, verifier: verify.Verifier, rewriter: Rewriter, skip: frozenset):
        """The first application without which the graph is still right; None if even none of them is wrong."""

        def wrong(count: int) -> bool:
            trial = self.rewrite(graph, skip, limit=count)
            return not verifier.compare(trial.graph, self._slack(rewriter)).agrees

        low, high = 0, len(rewriter.fired)
        if high == 0 or wrong(0):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if wrong(middle) else (middle, high)
        trial = self.rewrite(graph, skip, limit=high)
        return trial.fired[high - 1]

    def _fired(self, rewriter: Rewriter) -> dict[str, dict[str, Any]]:
        guarantees = {a.rule: str(a.guarantee) for a in rewriter.fired}
        return {
            rule: {"count": n, "guarantee": guarantees[rule], "equation": _equation(self.described[rule])}
            for rule, n in rewriter.counts.most_common()
        }


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

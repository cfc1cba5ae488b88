"""The public doors of the simplifier: a callable in, a callable out; a SavedModel in, a SavedModel out."""

from __future__ import annotations

import contextlib
import inspect
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError, VerificationError
from tfvllm.files import check_new, digest, new_directory
from tfvllm.graph import executable, importer, loading, probes, targets
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.ir import Graph
from tfvllm.graph.rewriter import Rewriter, Rule, Step, select, short
from tfvllm.savedmodel import warm_requests
from tfvllm.simplifier import cost, dispatch, memory, quantize, state, verify
from tfvllm.simplifier.arguments import Arguments, flat, spec_of, spec_of_input
from tfvllm.simplifier.report import Report, SignatureReport, diagram

PRECISIONS = ("float32", "bfloat16", "int8")
_MAX_ROLLBACKS = 20
_STRUCTURAL = ("clean", "layout", "weights")  # steps that only tidy up: not worth a measurement
LOWERED_TOLERANCE = 0.05  # relative to the largest magnitude of an output; --rtol and --atol add to it


LIVE = "live: the weights are the model's own, and no rule made a new one of them"
SHARED = "{}: the graph writes it and it cannot be copied, so the model and the result share it"


class Simplified:
    """A simplified function. Called like the original; `report` tells what was done, `save` writes a SavedModel.

    Example:
        >>> fast = tfvllm.simplify(tf.function(lambda v: v * 1.0 + 0.0, input_signature=[tf.TensorSpec([None])]))
        >>> fast(np.float32([1, 2])).numpy()
        array([1., 2.], dtype=float32)
    """

    def __init__(self, graph: Graph, arguments: Arguments, pack: Callable[[list], Any], report: Report):
        self.graph, self.specs, self.report = graph, arguments.specs, report
        self.concrete_function = executable.to_concrete(graph, arguments.specs, pack)
        self._arguments = arguments

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The original's result. Arrays and lists are converted to the original's dtypes.

        Raises InputError where the arguments are not nested as the original's are, or where one has a shape or a dtype
        that the graph was not made for.
        """
        args, kwargs = self._arguments.fit(args, kwargs)
        return self.concrete_function(*args, **kwargs)


def simplify(
    model: Any,
    *,
    target: str = "portable",
    precision: str = "float32",
    rules: Any = None,
    inputs: Any = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_error: float | None = None,
    percentile: float | None = None,
    activations: str | None = None,
    measure: bool = False,
    profile: Any = None,
    memory_limit: float | None = None,
    live: bool = False,
) -> Simplified:
    """Rewrites the graph of a Keras model, a `tf.function` or a `ConcreteFunction`; the result is called like it.

    The result has weights of its own, which hold what the model's hold now: training the model further, or
    `set_weights`, does not reach it. What the graph itself writes (counters, the state of a stateful layer, tables,
    generators) is the result's own from then on, too. The model is left as it was, whatever its graph writes.

    Args:
        model: a built Keras model (its inference graph, `training=False`), a `tf.function` with an input signature, or
            a `ConcreteFunction`.
        target: "portable" (public ops) or "onednn" (TensorFlow's internal fused CPU ops too).
        precision: "float32", "bfloat16" (matrix products in bfloat16; sums, norms and softmax in float32) or "int8"
            (products with weights in int8 with ranges from `inputs`; target "onednn" only).
        rules: None for all; names of steps or rules to keep; with a leading "-" to leave out; `Rule` objects to add.
        inputs: example arguments to verify on (and to trace a model without known inputs with; sizes that a model with
            known inputs leaves open stay open); or `tf.TensorSpec`s to trace with, None where a size may differ. Made
            up if None.
        rtol, atol: fixed tolerances in place of the comparison with float64; rtol is relative to the largest magnitude.
        max_error: for int8: how far results may be off, relative to their largest magnitude (default 0.1). Products
            that cost too much stay in float32.
        percentile: for int8: of the magnitudes on `inputs`, beyond which they saturate; None for all of them within.
        activations: for int8: "float32" (None) or "bfloat16", what attention computes in between products in int8.
            bfloat16 is faster where the CPU has instructions for it, and very slow where it has not.
        measure: keep a rule only if the graph is faster with it on this CPU, on `inputs`, in float32; see the report.
        profile: requests to be fast on: a JSON-lines file or dicts, `{"batch": 8, "length": 37, "count": 120}` each;
            see `tfvllm.simplifier.requests`. Ways to compute the graph are measured on them on this CPU, and where no
            single one is best, the result chooses by batch and length.
        memory_limit: for `profile`: what the weights of all ways together may take, as a multiple of the original's
            bytes (default 2). A way with weights of its own has to save a tenth of the time.
        live: share all variables with the model: the result follows whatever is assigned to them. No rule may then make
            a new weight of old ones, so less is merged; float32 only.

    Raises:
        InputError: the model cannot be traced, or an option is not one of those listed.
        VerificationError: the rewritten graph differs and no single rewrite is to blame.

    Example:
        >>> fast = tfvllm.simplify(tiny_bert(), target="portable")
        >>> fast(x).shape, fast.report.verification["ok"], fast.report.rules["HoistSlices"] > 0
        (TensorShape([16, 2]), True, True)
    """
    started = time.perf_counter()
    function = _concrete(model, inputs)
    specs = function.structured_input_signature
    graph = importer.from_concrete(function, _owners(model))
    given = tf.nest.flatten(inputs)
    samples = None if inputs is None or any(isinstance(t, tf.TypeSpec) for t in given) else [flat(inputs)]
    int8 = quantize.Options.check(precision, target, max_error, percentile, activations)
    probes.check_runs(target, precision)
    engine = _Engine(
        *(target, precision, rules, rtol, atol, int8, measure), dispatch.Options.check(profile, memory_limit)
    )
    if live:
        _share(graph, precision)
    rewritten, section = engine.run(graph, specs, "call", samples)
    engine.check_lowered([section])
    notes = engine.notes()
    if live:
        notes.append(LIVE)
    else:
        notes.extend(SHARED.format(short(name)) for name in state.detach(rewritten))
    outputs = function.structured_outputs
    report = Report(target, precision, {"call": section}, time.perf_counter() - started, _name(model), notes)
    arguments = Arguments.of(function, keras=_symbolic_inputs(model) is not None)
    return Simplified(rewritten, arguments, lambda results: _pack(outputs, results), report)


def simplify_saved_model(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    target: str = "portable",
    precision: str = "float32",
    signature: str | None = None,
    rules: Any = None,
    calibration: Sequence[dict[str, Any]] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_error: float | None = None,
    percentile: float | None = None,
    activations: str | None = None,
    measure: bool = False,
    profile: Any = None,
    memory_limit: float | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> Report:
    """Reads a SavedModel, rewrites every signature, verifies it, and writes a SavedModel with the same signatures.

    Args:
        source: a folder with saved_model.pb.
        destination: the folder to write; it appears whole or not at all.
        signature: only this one; all if None.
        calibration: inputs to verify on, as dicts of input name -> array; made up if None. int8 takes its ranges from
            them: of eight or more, every fourth is for verification alone.
        max_error, percentile, activations: for int8, as for `simplify`.
        measure: keep a rule only if the graph is faster with it on this CPU, as for `simplify`.
        profile, memory_limit: dispatch by shape, as for `simplify`; in the file also requests of the form
            `{"inputs": {name: values}}`. Every signature is measured on the requests it can be asked.
        progress: called with a line for each thing that begins.

    Raises:
        InputError: no SavedModel, an unknown signature, an existing destination without `overwrite`.
        VerificationError: the rewritten graph differs and no single rewrite is to blame. Nothing is written.

    Example:
        >>> tiny_net().export(folder / "plain", verbose=False)
        >>> report = tfvllm.simplify_saved_model(folder / "plain", folder / "fast")
        >>> report.verification["ok"], sorted(report.signatures)
        (True, ['serve', 'serving_default'])
    """
    started = time.perf_counter()
    check_new(destination, overwrite=overwrite)
    int8 = quantize.Options.check(precision, target, max_error, percentile, activations)
    probes.check_runs(target, precision)
    engine = _Engine(
        *(target, precision, rules, rtol, atol, int8, measure),
        dispatch.Options.check(profile, memory_limit),
        from_disk=True,
    )
    progress("reading")
    saved = loading.load(source, signature)
    memory.trim()
    sections: dict[str, SignatureReport] = {}
    done: dict[tuple, str] = {}
    for name, entry in saved.signatures.items():
        twin = done.setdefault(executable.fingerprint(entry.graph), name)
        if twin != name:  # Keras exports one function as "serve" and as "serving_default"
            entry.graph, sections[name] = saved.signatures[twin].graph, replace(sections[twin], name=name)
            continue
        progress(f"rewriting and verifying {name}")
        samples = _calibration(calibration, entry)
        entry.graph, sections[name] = engine.run(entry.graph, ((), dict(sorted(entry.specs.items()))), name, samples)
    engine.check_lowered(sections.values())
    progress("writing")
    memory.trim()
    report = Report(target, precision, sections, 0.0, Path(source).name, engine.notes())
    with new_directory(destination, overwrite=overwrite) as partial:
        loading.save(saved.signatures, partial, Path(source) / "assets.extra", saved.loaded)
        if signature is not None:
            warm_requests.keep(partial, saved.signatures)
        report.seconds = time.perf_counter() - started
        given = {
            "signature": signature,
            "rules": rules,
            "calibration": calibration,
            "max_error": max_error,
            "percentile": percentile,
            "activations": activations,
            "measure": measure,
            "profile": profile,
            "memory_limit": memory_limit,
            "rtol": rtol,
            "atol": atol,
        }
        _write_manifest(partial, report, source, given)
    return report


def inspect_saved_model(
    source: str | os.PathLike, *, target: str = "onednn", signature: str | None = None
) -> dict[str, Any]:
    """Signatures, ops, parameters, FLOPs and bytes of a SavedModel; what would be merged, and what not and why.

    Nothing is written and nothing is verified.

    Example:
        >>> found = tfvllm.inspect_saved_model("saved_models/sentiment/1", signature="serving_default")
        >>> found["signatures"]["serving_default"]["inputs"]
        {'text': {'dtype': 'string', 'shape': [None]}}
    """
    saved = loading.load(source, signature)
    result: dict[str, Any] = {"path": str(source), "signatures": {}}
    for name, entry in saved.signatures.items():
        before = cost.count(entry.graph)
        inputs = {k: _spec(s) for k, s in entry.specs.items()}
        outputs = {k: {"dtype": v.dtype.name, "shape": _shape(v.shape)} for k, v in entry.graph.outputs.items()}
        diagrams = {"before": diagram(entry.graph)}
        engine = _Engine(target, "float32", None, None, None)
        rewriter = engine.rewrite(entry.graph)
        diagrams["after"] = diagram(rewriter.graph)
        result["signatures"][name] = {
            "method_name": entry.method_name,
            "inputs": inputs,
            "outputs": outputs,
            **before,
            "internal_ops": targets.internal_ops(entry.graph),
            "would_merge": dict(rewriter.counts.most_common()),
            "after": cost.count(rewriter.graph),
            "declined": _declined(rewriter),
            "diagrams": diagrams,
        }
    return result


class _Engine:
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
        requests: dispatch.Options | None = None,
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
            outcome = dispatch.run(ways, specs, verifier, self.requests)
            result, comparison, section.dispatch = outcome.graph, outcome.comparison, outcome.details
            section.after = dispatch.count(outcome)
            if not outcome.details["pays"]:
                section.diagrams["after"] = diagram(result)
        section.declined = _declined(rewriter)
        section.removed_dead = rewriter.removed_dead
        section.verification = comparison.to_dict()
        return result, section

    def _ways(self, graph: Graph, verifier, section, skip: set, plain: Rewriter, lowered: Rewriter, made_up: bool):
        """The same computation as rewritten, without packing, without fused norms, in public ops; as it was, last.

        Where a lower precision was asked for, in float32 too: what is more exact is always allowed.
        """
        scratch = SignatureReport(section.name, section.before, {})
        found: dict[tuple, dispatch.Way] = {}
        float32 = "float32" if self.lowering else ""
        slack = self.int8.max_error if self.precision == "int8" else LOWERED_TOLERANCE
        packing = ("packed", "padded") if "PackTokens" in plain.counts else ("",)
        kept = self.steps, self.target
        known = {r.name for s in self.steps for r in s.rules}

        def add(name: str, graph: Graph, slack: float) -> None:
            found.setdefault(executable.fingerprint(graph), dispatch.Way(name, graph, slack))

        if lowered is not plain:
            add(dispatch.name_of(self.precision, packing[0]), lowered.graph, slack)
        for number, (style, target, without) in enumerate(dispatch.styles(self.target)):
            for pack in packing:
                padded = ("TrimPadding", "PackTokens") if pack == "padded" else ()
                leave = [f"-{r}" for r in (*without, *padded) if r in known]
                self.steps, self.target = select(kept[0], leave or None), target
                try:
                    first = number == 0 and pack == packing[0]
                    rewriter = plain if first else self._verified(graph, verifier, scratch, set(skip))[0]
                    add(dispatch.name_of(float32, pack, style), rewriter.graph, self._slack(rewriter))
                    if number == 0 and self.from_disk:
                        self._add_packed(
                            rewriter, verifier, dispatch.name_of(float32, pack, "fused, weights kept packed"), add
                        )
                    if lowered is not plain and number == 0 and pack == "padded":
                        other, _ = self._lower(rewriter, verifier, scratch, made_up)
                        add(dispatch.name_of(self.precision, pack), other.graph, slack)
                except VerificationError:
                    continue  # one way fewer
                finally:
                    self.steps, self.target = kept
        return [*found.values(), dispatch.Way("the original", graph)]

    def _add_packed(self, verified: Rewriter, verifier: verify.Verifier, name: str, add: Callable) -> None:
        """A way that keeps packed copies of float32 weights for few rows, where the target has such kernels."""
        from tfvllm.rules.keep_packed import KeepPackedForFew

        rewriter = Rewriter(verified.graph.copy(), self.target)
        rewriter.run([Step("few", (KeepPackedForFew(),))])
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
                duel = cost.duel(verifier.calls(best.graph), verifier.calls(trial.graph))
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


def _declined(rewriter: Rewriter) -> list[dict[str, str]]:
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


# ------------------------------------------------------------------------------------------------------------- tracing


def _concrete(model: Any, inputs: Any) -> Any:
    """The ConcreteFunction of whatever was given."""
    if hasattr(model, "structured_input_signature") and hasattr(model, "graph"):
        return model
    if hasattr(model, "get_concrete_function"):
        if getattr(model, "input_signature", None) is None and inputs is None:
            raise InputError(
                "the tf.function has no input signature; give it one (input_signature=[tf.TensorSpec(…)]), pass a "
                "ConcreteFunction, or pass inputs=(…)."
            )
        return model.get_concrete_function(*(() if inputs is None else _arguments(inputs)))
    structure = _symbolic_inputs(model)
    if callable(model) and (structure is not None or inputs is not None):
        specs = None if structure is None else tf.nest.map_structure(spec_of_input, structure)
        if inputs is not None:
            specs = _with_open_sizes(specs, inputs)
        call = tf.function(lambda batch: model(batch, training=False), autograph=False)
        return call.get_concrete_function(specs)
    if callable(model) and getattr(model, "built", False):
        raise InputError(
            f"{type(model).__name__} is built, but a subclassed model does not say what it reads. Pass inputs=…: "
            "arrays, or tf.TensorSpec with None where a size may differ."
        )
    raise InputError(
        f"expected a built Keras model, a tf.function or a ConcreteFunction, found {type(model).__name__}"
        + ("; build the model, or pass inputs=…" if callable(model) else ".")
    )


def _with_open_sizes(known: Any, inputs: Any) -> Any:
    """The specs of `inputs`, with the sizes open that the model (where its specs are `known`) leaves open."""
    if (
        isinstance(inputs, (list, tuple))
        and len(inputs) == 1
        and not (isinstance(known, (list, tuple)) and len(known) == 1)
    ):
        inputs = inputs[0]  # one positional argument
    specs = tf.nest.map_structure(spec_of, inputs)
    if known is None:
        return specs
    if isinstance(specs, dict):  # by name, whether or not the model was made with a dict
        names = known if isinstance(known, dict) else {spec.name: spec for spec in tf.nest.flatten(known)}
        if set(names) != set(specs):
            raise InputError(f"inputs=…: the model reads {sorted(names)}, found {sorted(specs)}.")
        return {name: _opened(names[name], spec) for name, spec in specs.items()}
    if len(tf.nest.flatten(known)) != len(tf.nest.flatten(specs)):
        raise InputError(
            f"inputs=…: the model reads {len(tf.nest.flatten(known))} tensors, found {len(tf.nest.flatten(specs))}."
        )
    if isinstance(known, dict):
        return specs  # in an order that only Keras knows
    return tf.nest.pack_sequence_as(known, list(map(_opened, tf.nest.flatten(known), tf.nest.flatten(specs))))


def _opened(known: Any, given: Any) -> Any:
    """`given` with the open sizes of `known`."""
    if not (isinstance(known, tf.TensorSpec) and isinstance(given, tf.TensorSpec)):
        return given
    if known.shape.rank is None or known.shape.rank != given.shape.rank:
        return given
    sizes = [None if open_ is None else size for open_, size in zip(known.shape, given.shape)]
    return tf.TensorSpec(sizes, given.dtype, name=known.name)


def _symbolic_inputs(model: Any) -> Any:
    """The inputs of a built Keras model, nested as it takes them; None of anything else."""
    structure = getattr(model, "_inputs_struct", None)
    if structure is None and not hasattr(model, "graph"):
        structure = getattr(model, "inputs", None)
        if isinstance(structure, (list, tuple)) and len(structure) == 1:
            structure = structure[0]
    return structure


def _share(graph: Graph, precision: str) -> None:
    """Lets no rule rely on what a variable holds."""
    if precision != "float32":
        raise InputError(
            f"live: expected precision float32, found {precision}, which makes new weights of the model's."
        )
    for capture in graph.captures.values():
        capture.frozen = capture.frozen and capture.made


def _arguments(inputs: Any) -> tuple:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _owners(model: Any) -> dict[int, Any]:
    """Tables and tokenizers that a model holds, or a function refers to, so that they can be copied and saved."""
    roots = [model]
    python_function = getattr(model, "python_function", None)
    for function in () if python_function is None else (python_function, inspect.unwrap(python_function)):
        with contextlib.suppress(TypeError, ValueError):
            names = inspect.getclosurevars(function)
            found = [*names.nonlocals.values(), *names.globals.values()]
            roots.extend(item() if isinstance(item, weakref.ref) else item for item in found)  # a method's own object
    owners: dict[int, Any] = {}
    for root in roots:
        with contextlib.suppress(ValueError, TypeError, AttributeError):  # it tracks nothing
            owners |= importer.owners_of(tf.train.TrackableView(root).descendants())
    return owners


def _pack(structure: Any, flat: list) -> Any:
    leaves = tf.nest.flatten(structure, expand_composites=True)
    tensors = iter(flat)
    return tf.nest.pack_sequence_as(
        structure, [next(tensors) if leaf is not None else None for leaf in leaves], expand_composites=True
    )


def _calibration(calibration: Sequence[dict[str, Any]] | None, entry: loading.Signature) -> list[list[Any]] | None:
    if calibration is None:
        return None
    wanted = set(entry.specs)
    samples = []
    for row in calibration:
        if set(row) != wanted:
            continue  # meant for another signature
        samples.append([np.asarray(row[k]) for k in sorted(wanted)])
    if not samples:
        found = ", ".join(sorted(calibration[0])) if calibration else "nothing"
        raise InputError(f"calibration: expected the inputs {', '.join(sorted(wanted))}, found {found}.")
    return samples


def _write_manifest(directory: Path, report: Report, source: str | os.PathLike, given: dict[str, Any]) -> None:
    from tfvllm.savedmodel import manifest

    options, again = _as_given(report, given)
    manifest.add_step(
        directory,
        {
            "step": "simplify",
            "source": Path(source).name,
            "target": report.target,
            "precision": report.precision,
            "options": options,
            "rules": report.rules,
            "guarantees": {n: e["guarantee"] for n, e in report.main.fired.items()},
            "verification": report.verification,
            **({"lowering": report.main.lowering} if report.main.lowering else {}),
            **({"dispatch": report.main.dispatch} if report.main.dispatch else {}),
            **({"notes": report.notes} if report.notes else {}),
            "again": again,
        },
        target=report.target,
    )


def _as_given(report: Report, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The options that were used, JSON-able, and the command that asks for the same model again.

    Files travel under stand-ins (CALIBRATION, REQUESTS.jsonl), as the model does (SRC, DST); of the calibration the
    digest is kept. Rules that a measurement left out are named, so that nothing need be measured again.
    """
    from tfvllm.savedmodel import manifest

    rules = [] if given["rules"] is None else given["rules"]
    rules = [rules] if isinstance(rules, str | Rule) else list(rules)
    added = [rule.name for rule in rules if isinstance(rule, Rule)]
    names = [name for name in rules if isinstance(name, str)]
    calibration = given["calibration"]
    told = {**given, "rules": [*names, *added], "profile": None if given["profile"] is None else "given"}
    if calibration is not None:
        flat = [(name, np.asarray(row[name])) for row in calibration for name in sorted(row)]
        content = [
            digest(name, value.dtype.name, value.shape, value.tolist() if value.dtype.hasobject else value.tobytes())
            for name, value in flat
        ]
        told["calibration"] = {"samples": len(calibration), "digest": digest(*content)}
    flags = {
        "--target": report.target,
        "--precision": report.precision,
        "--signature": given["signature"],
        "--rules": [*names, *(f"-{rule}" for rule in report.dropped)],
        "--calibration": None if calibration is None else "CALIBRATION",
        "--max-error": given["max_error"],
        "--percentile": given["percentile"],
        "--activations": given["activations"],
        "--profile": None if given["profile"] is None else "REQUESTS.jsonl",
        "--memory-limit": given["memory_limit"],
        "--rtol": given["rtol"],
        "--atol": given["atol"],
    }
    remark = f"with rules added in Python: {', '.join(added)}" if added else ""
    options = {name: value for name, value in told.items() if value not in (None, False, [])}
    return options, manifest.command_line("tfvllm simplify SRC DST", flags, remark=remark)


def _name(model: Any) -> str:
    name = getattr(model, "name", None)
    if isinstance(name, bytes):
        name = name.decode()
    return name if isinstance(name, str) else getattr(model, "__name__", type(model).__name__)


def _spec(spec: tf.TensorSpec) -> dict[str, Any]:
    return {"dtype": spec.dtype.name, "shape": _shape(None if spec.shape.rank is None else spec.shape.as_list())}


def _shape(shape: Any) -> list | None:
    return None if shape is None else [d if isinstance(d, int) else None for d in shape]

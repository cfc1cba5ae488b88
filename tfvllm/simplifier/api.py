"""The public doors of the simplifier: a callable in, a callable out; a SavedModel in, a SavedModel out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.files import check_new, digest, new_directory
from tfvllm.graph import executable, importer, loading, probes, targets
from tfvllm.graph.ir import Graph
from tfvllm.graph.rewriter import Rule, short
from tfvllm.savedmodel import warm_requests
from tfvllm.simplifier import cost, memory, quantize, state
from tfvllm.simplifier.arguments import Arguments, flat
from tfvllm.simplifier.diagram import diagram
from tfvllm.simplifier.dispatch import driver
from tfvllm.simplifier.engine import LIVE, SHARED, Engine, declined_rules
from tfvllm.simplifier.report import Report
from tfvllm.simplifier.report_data import SignatureReport
from tfvllm.simplifier.tracing import (
    calibration_rows,
    described,
    name_of,
    owners_in,
    pack,
    shape_of,
    share_weights,
    symbolic_inputs,
    traced,
)


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
            see `tfvllm.simplifier.dispatch.requests`. Variants of the graph are measured on them on this CPU, and where
            no single one is best, the result chooses by batch and length.
        memory_limit: for `profile`: what the weights of all variants together may take, as a multiple of the original's
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
    function = traced(model, inputs)
    specs = function.structured_input_signature
    graph = importer.from_concrete(function, owners_in(model))
    given = tf.nest.flatten(inputs)
    samples = None if inputs is None or any(isinstance(t, tf.TypeSpec) for t in given) else [flat(inputs)]
    int8 = quantize.Options.check(precision, target, max_error, percentile, activations)
    probes.check_runs(target, precision)
    engine = Engine(*(target, precision, rules, rtol, atol, int8, measure), driver.Options.check(profile, memory_limit))
    if live:
        share_weights(graph, precision)
    rewritten, section = engine.run(graph, specs, "call", samples)
    engine.check_lowered([section])
    notes = engine.notes()
    if live:
        notes.append(LIVE)
    else:
        notes.extend(SHARED.format(short(name)) for name in state.detach(rewritten))
    outputs = function.structured_outputs
    report = Report(target, precision, {"call": section}, time.perf_counter() - started, name_of(model), notes)
    arguments = Arguments.of(function, keras=symbolic_inputs(model) is not None)
    return Simplified(rewritten, arguments, lambda results: pack(outputs, results), report)


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
    engine = Engine(
        *(target, precision, rules, rtol, atol, int8, measure),
        driver.Options.check(profile, memory_limit),
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
        samples = calibration_rows(calibration, entry)
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
        inputs = {k: described(s) for k, s in entry.specs.items()}
        outputs = {k: {"dtype": v.dtype.name, "shape": shape_of(v.shape)} for k, v in entry.graph.outputs.items()}
        diagrams = {"before": diagram(entry.graph)}
        engine = Engine(target, "float32", None, None, None)
        rewriter = engine.plan.rewrite(entry.graph)
        diagrams["after"] = diagram(rewriter.graph)
        result["signatures"][name] = {
            "method_name": entry.method_name,
            "inputs": inputs,
            "outputs": outputs,
            **before,
            "internal_ops": targets.internal_ops(entry.graph),
            "would_merge": dict(rewriter.counts.most_common()),
            "after": cost.count(rewriter.graph),
            "declined": declined_rules(rewriter),
            "diagrams": diagrams,
        }
    return result


# ------------------------------------------------------------------------------------------------------------- tracing


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

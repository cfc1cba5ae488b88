"""The original against the rewritten graph, on the user's inputs or on generated ones.

The reference is the original itself, evaluated in float64: how far the original's own float32 rounding lies from it
says how far a graph that adds the same terms in another order may lie. Where the float64 evaluation is not possible
(an op without a float64 kernel), a fixed relative tolerance takes its place, and the report says so.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.graph.ir import Graph
from tfvllm.graph.rewriter import short
from tfvllm.simplifier import example_inputs, float64, memory, trial
from tfvllm.simplifier.arguments import REAL_INPUTS
from tfvllm.simplifier.state import State

_PLACE = re.compile(r"Detected at node|<stack traces|File \"|\(\d+\) ")
ROUNDING = 16.0  # how many times the original's own rounding error a reordered result may be off
FIXED = 1e-4  # relative to the largest magnitude, where float64 is no reference
_MOST = 0.5  # of the largest magnitude: a tolerance above it would prove nothing
FLOOR = 32.0  # and never less than so many units in the last place of the largest result


@dataclass
class Comparison:
    """What the comparison found over all samples and outputs."""

    samples: int = 0
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0  # relative to the largest magnitude of the output
    tolerance: float = 0.0  # the absolute tolerance at the worst place
    reference: str = "float64"
    failures: list[str] = field(default_factory=list)
    unverified: dict[str, str] = field(default_factory=dict)  # output, or variable after the run -> why
    checked: dict[str, int] = field(default_factory=dict)  # output, or variable after the run -> samples it was held on
    random: list[str] = field(default_factory=list)  # "op (layer)" of what draws random numbers for a result

    @property
    def agrees(self) -> bool:
        """Whether nothing that could be compared is wrong."""
        return not self.failures

    @property
    def ok(self) -> bool:
        """Whether everything could be compared, and nothing is wrong."""
        return self.agrees and not self.unverified

    @property
    def status(self) -> str:
        """ "verified", "partly verified", "not verified" or "wrong"."""
        if self.failures:
            return "wrong"
        if not self.unverified:
            return "verified"
        return "partly verified" if self.checked else "not verified"

    def to_dict(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "max_abs_error": self.max_abs_error,
            "max_rel_error": self.max_rel_error,
            "tolerance": self.tolerance,
            "reference": self.reference,
            "ok": self.ok,
            "status": self.status,
            "not_verified": self.unverified,
            "random": self.random,
            "failures": self.failures[:10],
        }


class Verifier:
    """Holds one function's original, its samples and reference results; compares candidates with them.

    Every run starts from the same state of variables, tables and generators and leaves it as it was; what a run writes
    is compared like its results. The original runs twice on every sample: what does not repeat itself proves nothing.

    Args:
        graph: the original.
        specs: (args, kwargs) of TensorSpecs, as for `executable.to_concrete`.
        samples: lists of arrays, in the order of the graph's inputs; generated if None.
        rtol, atol: fixed tolerances in place of the float64 reference. rtol is relative to an output's largest
            magnitude.

    Attributes:
        names: what is compared: the outputs, then variables and tables after the run.
        references: for each sample, arrays in the order of `names`.
        unverified: of `names`, why no sample tells anything.
    """

    def __init__(
        self,
        graph: Graph,
        specs: tuple[tuple, dict],
        samples: Sequence[Sequence[Any]] | None = None,
        rtol: float | None = None,
        atol: float | None = None,
    ):
        self.graph, self.specs = graph, specs
        self.rtol, self.atol = rtol, atol
        self.state = State.of(graph)
        self.random = _draws(graph, self.state)
        self.names = list(graph.outputs)
        self.samples: list[list[Any]] = []
        self.references: list[list[np.ndarray]] = []
        self.usable: list[list[bool]] = []  # sample, name -> whether the original repeats itself there
        self.unverified: dict[str, str] = {}
        self.exact: list[list[np.ndarray]] | None = None
        if self.state.outside:
            reason = f"{self.state.outside[0]} may write what cannot be put back, so the graph was not run"
            self.unverified = dict.fromkeys(self.names, reason)
            return
        self.original = trial.Trial(graph, specs, self.state)
        self._run_original(samples)
        self.exact = self._float64()
        memory.trim()

    def _run_original(self, samples: Sequence[Sequence[Any]] | None) -> None:
        given = samples is not None
        made = functools.partial(example_inputs.generate, self.graph, specs=self.specs)
        error = self._twice(made() if samples is None else samples, given)
        if not given and not (self.samples and all(self._whole(j) for j in range(len(self.names)))):
            error = self._twice(made(sizes=example_inputs.LONG), given) or error
        if not self.samples:
            raise InputError(
                "the original model fails on every generated input "
                f"({_line(error) if error else 'none could be made'}); "
                f"pass real ones: {REAL_INPUTS}."
            )
        for j, name in enumerate(self.names):
            repeating = [i for i, row in enumerate(self.usable) if row[j]]
            telling = [i for i in repeating if self.references[i][j].size]
            if not repeating:
                cause = ", ".join(_draws(self.graph, self.state, name)) or "two runs on the same inputs differ"
                self.unverified[name] = f"the original is random here: {cause}"
            elif not telling and any(r[j].size for r in self.references):
                self.unverified[name] = "the original does not repeat itself on any input that gives a value"
            elif not given and telling and not any(_has_finite(self.references[i][j]) for i in telling):
                self.unverified[name] = "the original gives no finite value on any made-up input"
            if not given and self._whole(j):
                for i in telling:  # others are inputs that the model was not made for
                    self.usable[i][j] = _is_finite(self.references[i][j])

    def _whole(self, j: int) -> bool:
        """Whether some sample gives a result there that repeats itself and is finite all over."""
        rows = zip(self.usable, self.references)
        return any(usable[j] and found[j].size and _is_finite(found[j]) for usable, found in rows)

    def _twice(self, samples: Iterable[Sequence[Any]], given: bool) -> Exception | None:
        """Runs the original on each sample, and once more; its first error, if any."""
        first_error: Exception | None = None
        for sample in samples:
            try:
                results, again = self.run(self.original, sample), self.run(self.original, sample)
            except (tf.errors.OpError, ValueError) as error:
                if given:
                    raise InputError(f"the original model fails on the given input: {_line(error)}") from error
                first_error = first_error or error
                continue
            self.samples.append(list(sample))
            self.references.append(results)
            self.usable.append([_repeats(a, b) for a, b in zip(results, again)])
        return first_error

    def run(self, attempt: trial.Trial, sample: Sequence[Any]) -> list[np.ndarray]:
        """The results of the original, or of what was made of it, on a sample, and what it leaves in its state."""
        results, left = attempt.run_and_look(sample)
        self.names[len(results) :] = [f"{name} after the run" for name in left]
        return [*results, *left.values()]

    def wanted(self) -> list[list[np.ndarray | None]]:
        """The references; None where they prove nothing."""
        return [
            [a if good and name not in self.unverified else None for name, a, good in zip(self.names, row, usable)]
            for row, usable in zip(self.references, self.usable)
        ]

    def require_runs(self, what: str) -> None:
        """Raises InputError where nothing can be measured: the graph must not be run."""
        trial.refuse_outside(self.state, what)

    def _float64(self) -> list[list[np.ndarray]] | None:
        if self.rtol is not None or self.atol is not None:
            return None
        try:
            wide = float64.to_float64(self.graph)
            attempt = trial.Trial(wide, float64.widened(self.specs), self.state)
            return [
                self.run(
                    attempt,
                    [
                        np.asarray(a, np.float64) if v.dtype == tf.float32 else a
                        for a, v in zip(sample, self.graph.inputs.values())
                    ],
                )
                for sample in self.samples
            ]
        except (tf.errors.OpError, ValueError, TypeError, KeyError, InputError):
            return None

    def compare(self, graph: Graph, extra_tolerance: float = 0.0) -> Comparison:
        """Runs a rewritten graph on every sample. `extra_tolerance`: what approximate rules add, relative."""
        reference = "float64" if self.exact is not None else "fixed tolerance"
        result = Comparison(reference=reference, unverified=dict(self.unverified), random=list(self.random))
        if not self.samples:
            return result
        attempt = trial.Trial(graph, self.specs, self.state)
        useless: dict[str, str] = {}
        for i, sample in enumerate(self.samples):
            result.samples += 1
            try:
                found = self.run(attempt, sample)
            except tf.errors.OpError as error:
                result.failures.append(f"the rewritten graph fails on sample {i}: {_line(error)}")
                continue
            wide = self.exact[i] if self.exact is not None else [None] * len(found)
            for j, (name, new, old, exact) in enumerate(zip(self.names, found, self.references[i], wide)):
                if (new.shape != old.shape and self.usable[i][j]) or new.dtype != old.dtype:
                    kinds = f"{new.dtype}{new.shape} instead of {old.dtype}{old.shape}"
                    result.failures.append(f"{name}, sample {i}: {kinds}")
                elif self.usable[i][j] and name not in self.unverified:
                    reason = self._compare(result, f"{name}, sample {i}", new, old, exact, extra_tolerance)
                    if reason is None:
                        result.checked[name] = result.checked.get(name, 0) + 1
                    else:
                        useless.setdefault(name, reason)
        result.unverified |= {name: reason for name, reason in useless.items() if name not in result.checked}
        return result

    def calls(self, graph: Graph) -> list[Callable[[], Any]]:
        """For timing, inside `state.kept()`: one call for each sample, its arguments converted already."""
        attempt = trial.Trial(graph, self.specs, self.state)
        return [attempt.call(sample) for sample in self.samples]

    def _compare(self, result: Comparison, where: str, new, old, exact, extra_tolerance: float) -> str | None:
        """Compares two arrays of one shape and type; why that proves nothing, where it does not."""
        if old.dtype.kind not in "fV" and old.dtype != tf.bfloat16.as_numpy_dtype:
            if not np.array_equal(new, old):
                result.failures.append(f"{where}: {int(np.sum(new != old))} of {old.size} values differ")
            return None
        new, old = new.astype(np.float64), old.astype(np.float64)
        if not np.array_equal(np.isnan(new), np.isnan(old)):
            result.failures.append(f"{where}: NaN in other places")
            return None
        infinite = np.isinf(old) | np.isinf(new)
        if not np.array_equal(new[infinite], old[infinite], equal_nan=True):
            result.failures.append(f"{where}: infinities in other places")
            return None
        finite = np.isfinite(old) & np.isfinite(new)
        if not finite.any():
            return None
        new, old = new[finite], old[finite]
        scale = float(np.max(np.abs(old)))
        apart = float(np.max(np.abs(new - old)))
        tolerance = self._tolerance(old, exact[finite] if exact is not None else None, scale)
        reference = exact[finite] if exact is not None and np.all(np.isfinite(exact[finite])) else old
        if self.rtol is None and self.atol is None and tolerance > _MOST * scale:
            # The original's own rounding is as large as its values: only what comes near it bit by bit is right.
            if apart > FIXED * scale + extra_tolerance * scale:
                return f"the original's own rounding errors ({tolerance / ROUNDING:.2g}) are as large as its values"
            tolerance, reference = FIXED * scale, old
        tolerance += extra_tolerance * scale
        error = float(np.max(np.abs(new - reference)))
        result.max_abs_error = max(result.max_abs_error, apart)
        result.max_rel_error = max(result.max_rel_error, apart / scale if scale else 0.0)
        result.tolerance = max(result.tolerance, tolerance)
        if error > tolerance:
            result.failures.append(f"{where}: off by {error:.3g}, allowed {tolerance:.3g}")
        return None

    def _tolerance(self, old: np.ndarray, exact: np.ndarray | None, scale: float) -> float:
        if self.rtol is not None or self.atol is not None:
            return (self.atol or 0.0) + (self.rtol or 0.0) * scale
        eps = float(np.finfo(np.float32).eps)
        if exact is None or not np.all(np.isfinite(exact)):
            return FIXED * scale + 1e-7
        own = float(np.max(np.abs(old - exact)))
        return ROUNDING * own + FLOOR * eps * max(scale, float(np.finfo(np.float32).tiny))


def _repeats(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two runs gave the same, but for the order in which threads may add."""
    if first.shape != second.shape:
        return False
    if first.dtype.kind not in "fV":
        return bool(np.array_equal(first, second))
    a, b = first.astype(np.float64), second.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.array_equal(finite, np.isfinite(b)):
        return False
    eps = float(np.finfo(np.float32).eps) if first.dtype.itemsize > 2 else 2.0**-8
    scale = float(np.max(np.abs(a[finite]), initial=0.0))
    return bool(np.all(np.abs(a[finite] - b[finite]) <= FLOOR * eps * scale))


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind in "fV"


def _is_finite(array: np.ndarray) -> bool:
    return not _is_float(array) or bool(np.all(np.isfinite(array.astype(np.float64))))


def _has_finite(array: np.ndarray) -> bool:
    return not _is_float(array) or bool(np.any(np.isfinite(array.astype(np.float64))))


def _draws(graph: Graph, state: State, output: str | None = None) -> list[str]:
    """ "op (layer)" of the random ops that an output (or any) depends on."""
    if not (state.draws or state.generators):
        return []
    wanted = [v.node for k, v in graph.outputs.items() if output in (None, k)]
    needed = {n.name for n in (graph.order(wanted) if wanted else graph.live())}
    return list(
        dict.fromkeys(f"{d.op} ({short(d.node)})" for d in [*state.draws, *state.generators] if d.top in needed)
    )


def _line(error: Exception) -> str:
    """What is wrong, in one line: of a failed assertion, its own text, not where in which file the node was made."""
    lines = [line.strip() for line in str(error).split("\n\t [[")[0].splitlines() if line.strip()]
    if lines and lines[0].startswith("Graph execution error"):
        told = [i for i, line in enumerate(lines) if line.startswith("Node: ")]
        lines = lines[told[-1] + 1 :] if told else [i for i in lines[1:] if not _PLACE.match(i)] or lines[-1:]
    return " ".join(lines or [type(error).__name__])[:300]

"""What tensors hold on calibration inputs, and what rewriting one node does to the whole: measured, never guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.graph.builder import Builder
from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.graph.rewriter import short
from tfvllm.simplifier import trial
from tfvllm.simplifier.arguments import REAL_INPUTS

_PER_OCTAVE = 64  # bins of the histogram of log2|x|: a limit taken from it is right to 1.1 %
_LOWEST, _HIGHEST = -24, 24
_BINS = _PER_OCTAVE * (_HIGHEST - _LOWEST)
EDGES = 2.0 ** (_LOWEST + (np.arange(_BINS) + 1) / _PER_OCTAVE)  # upper edges


@dataclass
class ActivationStats:
    """The magnitudes of one tensor [rows, channels] over all samples.

    Attributes:
        largest: float64[channels], the largest magnitude in each channel.
        squares: float64[channels], the mean square of each channel.
        counts: how many magnitudes lie in each bin of `EDGES`.
        ends: the smallest and the largest element.
    """

    largest: np.ndarray
    squares: np.ndarray
    counts: np.ndarray
    ends: tuple[float, float]

    def span(self, percentile: float = 100.0) -> tuple[float, float]:
        """From the smallest to the largest element, cut at the given percentile of the magnitudes."""
        low, high = self.ends
        if percentile >= 100 or not self.counts.any():
            return low, high
        share = np.cumsum(self.counts) / self.counts.sum()
        limit = float(EDGES[min(_BINS - 1, int(np.searchsorted(share, percentile / 100)))])
        return max(low, -limit), min(high, limit)


def run(graph: Graph, specs: tuple[tuple, dict], samples: Sequence[Sequence[Any]]) -> Iterable[list[np.ndarray]]:
    """The results of `graph` on each sample (arrays in the order of its inputs)."""
    attempt = trial.Trial(graph, specs)
    for sample in samples:
        yield attempt.run(sample)


def observe(
    graph: Graph, specs: tuple[tuple, dict], samples: Sequence[Sequence[Any]], values: Sequence[Value]
) -> dict[Value, ActivationStats]:
    """The spread of each of `values` (float32[rows, channels]) over the samples. Summed up inside the graph.

    Raises InputError where one holds NaN or infinities: no range can be made of these.
    """
    twin = graph.copy()
    twin.outputs = {}
    for i, value in enumerate(values):
        inner = twin.nodes[value.node.name].outputs[value.index]
        b = Builder(twin, f"calibrate/{i}")
        size = b.Abs(inner)
        octave = b.Mul(b.Log(size), b.const(_PER_OCTAVE / np.log(2.0), tf.float32))
        place = b.Minimum(b.Sub(octave, b.const(_LOWEST * _PER_OCTAVE, tf.float32)), b.const(_BINS - 1.0, tf.float32))
        flat = b.Reshape(b.Maximum(b.Cast(place, DstT=tf.int32), b.const(0, tf.int32)), b.ints(-1))
        none = b.const(np.zeros(0, np.float32), tf.float32)
        twin.outputs[f"{i}/largest"] = b.Max(size, b.ints(0))
        twin.outputs[f"{i}/squares"] = b.Sum(b.Square(inner), b.ints(0))
        twin.outputs[f"{i}/counts"] = b.Bincount(flat, b.const(_BINS, tf.int32), none)
        twin.outputs[f"{i}/low"] = b.Min(inner, b.ints(0, 1))
        twin.outputs[f"{i}/high"] = b.Max(inner, b.ints(0, 1))
        twin.outputs[f"{i}/rows"] = b.Shape(inner, out_type=tf.int32)
    spreads = [ActivationStats(np.zeros(1), np.zeros(1), np.zeros(_BINS), (0.0, 0.0)) for _ in values]
    rows = [0] * len(values)
    for results in run(twin, specs, samples):
        for i, spread in enumerate(spreads):
            largest, squares, counts, low, high, shape = results[6 * i : 6 * i + 6]
            if not shape[0]:
                continue
            rows[i] += int(shape[0])
            spread.largest = np.maximum(spread.largest, largest)
            spread.squares = spread.squares + squares
            spread.counts = spread.counts + counts
            spread.ends = min(spread.ends[0], float(low)), max(spread.ends[1], float(high))
    for value, spread, count in zip(values, spreads, rows):
        if not np.all(np.isfinite(spread.squares)):
            raise InputError(
                f"calibration: {short(value.name)} holds NaN or infinities on the calibration inputs, and no range can "
                f"be made of these; expected inputs on which the model is finite. Pass others: {REAL_INPUTS}."
            )
        spread.squares = spread.squares / max(1, count)
    return dict(zip(values, spreads))


def local_errors(graph: Graph, specs, samples, pairs: dict[str, tuple[Value, Value]]) -> dict[str, float]:
    """How far two values of `graph` lie apart over the samples: root mean square, relative to the first's own."""
    twin = graph.copy()
    twin.outputs = {}
    for i, (exact, other) in enumerate(pairs.values()):
        a, c = (twin.nodes[v.node.name].outputs[v.index] for v in (exact, other))
        b = Builder(twin, f"errors/{i}")
        twin.outputs[f"{i}/apart"] = b.Sum(b.Square(b.Sub(c, a)), b.ints(*range(a.rank or 0)))
        twin.outputs[f"{i}/own"] = b.Sum(b.Square(a), b.ints(*range(a.rank or 0)))
    sums = np.zeros((len(pairs), 2))
    for results in run(twin, specs, samples):
        sums += np.array([float(r) for r in results]).reshape(-1, 2)
    return {name: float(np.sqrt(apart / own)) if own else 0.0 for name, (apart, own) in zip(pairs, sums)}


class PrecisionSearch:
    """One function in which each of several nodes has two forms; flags choose. So a choice is measured, not rebuilt.

    Args:
        graph: the original; not changed.
        nodes: names of the nodes.
        lower: adds the other form of a node to the graph it is in, and returns its value (of the same type and shape).
        references: what the model should give on each sample, in the order of its outputs; None where nobody can tell.
    """

    def __init__(
        self,
        graph: Graph,
        specs: tuple[tuple, dict],
        samples: Sequence[Sequence[Any]],
        references: Sequence[Sequence[np.ndarray | None]],
        nodes: Sequence[str],
        lower: Callable[[Graph, Node], Value],
    ):
        self.nodes, self.samples, self.references = list(nodes), samples, references
        board = graph.copy()
        flags = board.add("flags", "Placeholder", [], {"dtype": tf.bool}).output
        flags.shape = (len(nodes),)
        b = Builder(board, "switch")
        switches = b.op("Unpack", [flags], num=len(nodes))
        for name, switch in zip(nodes, switches):
            exact = board.nodes[name].output
            readers = list(exact.uses)
            results = [k for k, v in board.outputs.items() if v is exact]
            chosen = b.SelectV2(switch, lower(board, board.nodes[name]), exact)
            for reader, position in readers:
                board.set_input(reader, position, chosen)
            board.outputs.update(dict.fromkeys(results, chosen))
        board.inputs = {"flags": flags, **board.inputs}
        args, kwargs = specs
        self.trial = trial.Trial(board, ((tf.TensorSpec([len(nodes)], tf.bool, "flags"), *args), kwargs))

    def error(self, lowered: Iterable[str]) -> float:
        """The largest error of the results, relative to each one's largest magnitude, with these nodes lowered.

        Infinite where integers, strings, or the places of NaN differ.
        """
        chosen = set(lowered)
        flags = np.array([n in chosen for n in self.nodes])
        worst = 0.0
        for sample, wanted in zip(self.samples, self.references):
            for result, want in zip(self.trial.run([flags, *sample]), wanted):
                if want is not None:
                    worst = max(worst, relative_error(result, want))
        return worst

    def keep(self, bound: float) -> tuple[list[str], dict[str, float]]:
        """The fewest nodes, worst first, that must not be lowered for the error to stay within `bound`.

        The order is by each node's own sensitivity: the error of the results with that node alone lowered.

        Returns:
            the names to keep, and every node's sensitivity.
        """
        alone = {n: self.error([n]) for n in self.nodes}
        order = sorted(self.nodes, key=lambda n: -alone[n])
        low, high = 0, len(order)  # with `high` kept the bound holds; with `low - 1` it does not
        while low < high:
            middle = (low + high) // 2
            if self.error(order[middle:]) <= bound:
                high = middle
            else:
                low = middle + 1
        return order[:low], alone


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference over the largest magnitude; infinite where things differ that must be equal."""
    if wanted.dtype.kind not in "fV":
        return 0.0 if np.array_equal(found, wanted) else np.inf
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(wanted)
    if not np.array_equal(np.isfinite(found), finite) or not finite.any():
        return np.inf if not np.array_equal(np.isfinite(found), finite) else 0.0
    scale = np.max(np.abs(wanted[finite]))
    apart = np.max(np.abs(found[finite] - wanted[finite]))
    return float(apart / scale) if scale else (0.0 if apart == 0 else np.inf)

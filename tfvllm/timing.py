"""Timing that compares: the candidates take turns (A B A B …) in one run, so that a slow minute hits them all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tfvllm.errors import InputError

FEWEST_ROUNDS = 7  # of a measurement that ends by time


@dataclass(frozen=True)
class Timing:
    """Latencies of one candidate, in milliseconds, in the order they were measured.

    Example:
        >>> from tfvllm.timing import Timing
        >>> Timing((1.0, 2.0, 9.0)).median_ms
        2.0
    """

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return float(np.median(self.samples_ms))

    @property
    def p95_ms(self) -> float:
        return float(np.percentile(self.samples_ms, 95))

    @property
    def min_ms(self) -> float:
        return min(self.samples_ms)

    def ratio(self, other: Timing) -> float:
        """How many times as fast as `other` this is: median over median; above 1 is faster."""
        return other.median_ms / self.median_ms

    def to_dict(self) -> dict[str, Any]:
        return {
            "median_ms": round(self.median_ms, 4),
            "p95_ms": round(self.p95_ms, 4),
            "min_ms": round(self.min_ms, 4),
            "repeats": len(self.samples_ms),
        }


def compare(callables: Mapping[str, Callable[[], Any]], repeats: int = 30, warmup: int = 3) -> dict[str, Timing]:
    """Times every callable `repeats` times, taking turns, after `warmup` untimed rounds.

    Each callable must have finished its work when it returns (call `.numpy()` on its result). The order within a round
    turns by one from round to round, so that nobody always runs after the same neighbour.

    Returns:
        name -> Timing, in the order given.

    Raises:
        InputError: nothing to time, or fewer than one repeat.

    Example:
        >>> from tfvllm.timing import compare
        >>> timings = compare({"one": lambda: sum(range(10)), "two": lambda: sum(range(20))}, repeats=3, warmup=1)
        >>> {name: len(timing.samples_ms) for name, timing in timings.items()}
        {'one': 3, 'two': 3}
    """
    if not callables or repeats < 1 or warmup < 0:
        raise InputError(
            f"expected something to time, repeats >= 1 and warmup >= 0, found {len(callables)} callables, "
            f"repeats={repeats}, warmup={warmup}."
        )
    return {name: Timing(tuple(found)) for name, found in take_turns(callables, repeats, warm=warmup).items()}


def take_turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int, seconds: float = math.inf, warm: int = 0
) -> dict[str, list[float]]:
    """Milliseconds of every call in each round; the order turns from round to round.

    `warm` untimed rounds, then `rounds`, or as many as are done in `seconds` (`FEWEST_ROUNDS` at least).
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in _turns(rounds, seconds, warm):
        shift = max(turn, 0) % len(names)
        for name in names[shift:] + names[:shift]:
            took = _milliseconds(calls[name])
            if turn >= 0:
                times[name].append(took)
    return times


def ratio(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """How many times as long `first` takes as `second`, and how far from it the truth may lie.

    The median over the rounds, in each of which both were measured; three standard errors of it, taken from the
    median absolute deviation, and one percent at least.
    """
    ratios = [a / b for a, b in zip(first, second)]
    middle = statistics.median(ratios)
    deviation = 1.4826 * statistics.median(abs(r - middle) for r in ratios)
    return middle, max(0.01, 3 * 1.2533 * deviation / math.sqrt(len(ratios)))


@dataclass(frozen=True)
class Duel:
    """Two ways to compute the same, timed in turns: the median milliseconds of each over all calls of a round.

    `ratio` is the median over the rounds of second/first, `noise` how far from it the true ratio may lie.
    """

    first_ms: float
    second_ms: float
    ratio: float
    noise: float

    @property
    def winner(self) -> str | None:
        """ "first" or "second"; None where the difference does not stand out from the noise."""
        if abs(self.ratio - 1) <= self.noise:
            return None
        return "first" if self.ratio > 1 else "second"


def duel(
    first: Sequence[Callable[[], Any]], second: Sequence[Callable[[], Any]], seconds: float = 1.5, rounds: int = 60
) -> Duel:
    """Times the calls of two candidates in turns, for about `seconds` (`FEWEST_ROUNDS` at least, `rounds` at most).

    They change places from round to round. The noise is that of `ratio`.
    """
    times: tuple[list[float], list[float]] = [], []
    for turn in _turns(rounds, seconds, warm=2):
        spent = [0.0, 0.0]
        for pair in zip(first, second, strict=True):
            for which in (0, 1) if turn % 2 else (1, 0):
                spent[which] += _milliseconds(pair[which])
        if turn >= 0:
            for which in (0, 1):
                times[which].append(spent[which])
    return Duel(statistics.median(times[0]), statistics.median(times[1]), *ratio(times[1], times[0]))


def _turns(rounds: int, seconds: float, warm: int) -> Iterator[int]:
    """The numbers of the rounds: those below 0 come first, to warm up, and do not count."""
    yield from range(-warm, 0)
    end = time.perf_counter() + seconds
    for turn in range(rounds):
        yield turn
        if turn + 1 >= FEWEST_ROUNDS and time.perf_counter() > end:
            return


def _milliseconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began) / 1e6


@dataclass(frozen=True)
class Row:
    """One measured point: what, at which shape, and its timing as a dict."""

    candidate: str
    shape: str
    timing: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

"""Timing that compares: the candidates take turns (A B A B …) in one run, so that a slow minute hits them all."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tfvllm.errors import InputError


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

    def ratio(self, other: "Timing") -> float:
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
    names = list(callables)
    for _ in range(warmup):
        for name in names:
            callables[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(repeats):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            call = callables[name]
            began = time.perf_counter_ns()
            call()
            samples[name].append((time.perf_counter_ns() - began) / 1e6)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


@dataclass(frozen=True)
class Row:
    """One measured point: what, at which shape, and its timing as a dict."""

    candidate: str
    shape: str
    timing: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

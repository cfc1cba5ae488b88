"""Variants timed in turns on requests of each shape."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tfvllm import timing
from tfvllm.simplifier import trial
from tfvllm.simplifier.dispatch.requests import RequestShape
from tfvllm.simplifier.dispatch.variants import Variant
from tfvllm.simplifier.state import State

FEATURES = ("batch × length", "length", "batch")


_MOST = 200  # rounds of one measurement


_CONTENDER = 1.15  # what takes more than this times the fastest after the fewest rounds is not measured further


Rounds = dict[str, list[float]]  # variant -> milliseconds in each round


@dataclass
class Point:
    """One kind of request, as measured: milliseconds of each round by variant."""

    kind: RequestShape
    batch: int
    length: int | None
    tokens: int  # rows of the padded batch
    sample: list[Any]
    rounds: Rounds = field(default_factory=dict)

    def median(self, variant: str) -> float:
        return statistics.median(self.rounds[variant])

    def ratio(self, variant: str, other: str) -> tuple[float, float]:
        """How many times as long `variant` takes as `other`, and the noise; see `tfvllm.timing.ratio`."""
        return timing.ratio(self.rounds[variant], self.rounds[other])

    def relative(self, variant: str, other: str) -> float:
        """The ratio where it stands out from the noise, else 1."""
        middle, noise = self.ratio(variant, other)
        return middle if abs(middle - 1) > noise else 1.0

    def feature(self, name: str) -> int:
        length = self.length or 1
        return {FEATURES[0]: self.batch * length, FEATURES[1]: length, FEATURES[2]: self.batch}[name]


def measure(points: Sequence[Point], variants: Sequence[Variant], specs: tuple[tuple, dict], seconds: float) -> None:
    """Times all variants at all points: a few rounds each, then more for those that may be the best somewhere."""
    state = State.of(variants[0].graph)
    made = {variant.name: trial.Trial(variant.graph, specs, state) for variant in variants}
    calls = [{name: _fetched(attempt.call(point.sample)) for name, attempt in made.items()} for point in points]
    with state.kept():
        _measure(points, calls, seconds)


def _measure(points: Sequence[Point], calls: Sequence[Mapping[str, Callable[[], Any]]], seconds: float) -> None:
    began = time.perf_counter()
    for point, mine in zip(points, calls):
        point.rounds = timing.take_turns(mine, timing.FEWEST_ROUNDS, warm=2)
    left = (seconds - (time.perf_counter() - began)) / len(points)
    overall = sorted(calls[0], key=lambda name: sum(p.kind.count * math.log(p.median(name)) for p in points))
    for point, mine in zip(points, calls):
        bar = _CONTENDER * min(point.median(name) for name in mine)
        chosen = [name for name in mine if name in overall[:2] or point.median(name) <= bar]
        for name, times in timing.take_turns({n: mine[n] for n in chosen}, _MOST, left).items():
            point.rounds[name].extend(times)


def _fetched(call: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: [t.numpy() for t in call()]

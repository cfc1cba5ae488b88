"""Which variant a request takes: a small tree over batch and length, grown from measured times."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tfvllm.simplifier.dispatch.measure import FEATURES, Point
from tfvllm.simplifier.dispatch.variants import Variant, bytes_of

_LEAVES = 4


_WORTH = 0.03  # a branch must save this share of the time of the requests it takes


_WORTH_WEIGHTS = 0.10  # and this one if it brings weights of its own


@dataclass
class Leaf:
    """The requests that come here are computed by this variant."""

    variant: str


@dataclass
class Split:
    """`feature` >= `threshold` goes to `high`."""

    feature: str
    threshold: int
    low: Leaf | Split
    high: Leaf | Split


def leaves(tree: Leaf | Split) -> list[Leaf]:
    return [tree] if isinstance(tree, Leaf) else [*leaves(tree.low), *leaves(tree.high)]


def splits(tree: Leaf | Split) -> list[Split]:
    return [] if isinstance(tree, Leaf) else [tree, *splits(tree.low), *splits(tree.high)]


def chosen(tree: Leaf | Split, point: Point) -> str:
    """The variant that a request of this point's shape is computed by."""
    while isinstance(tree, Split):
        tree = tree.high if point.feature(tree.feature) >= tree.threshold else tree.low
    return tree.variant


def lines(tree: Leaf | Split, conditions: tuple[str, ...] = ()) -> list[str]:
    """The decisions as sentences: "batch × length < 220: padded"."""
    if isinstance(tree, Leaf):
        return [f"{' and '.join(conditions) or 'always'}: {tree.variant}"]
    below, above = f"{tree.feature} < {tree.threshold}", f"{tree.feature} ≥ {tree.threshold}"
    return [*lines(tree.low, (*conditions, below)), *lines(tree.high, (*conditions, above))]


def best_single(variants: Sequence[Variant], points: Sequence[Point], limit: float) -> str:
    """The variant with the smallest mean of the logarithm of the time: each request counts alike, short or long."""
    allowed = [v.name for v in variants if bytes_of([v]) <= limit] or [min(variants, key=lambda v: bytes_of([v])).name]
    return min(allowed, key=lambda v: sum(p.kind.count * math.log(p.median(v)) for p in points))


def decide(variants: Sequence[Variant], points: Sequence[Point], limit: float) -> Leaf | Split:
    """The decision tree: grown split by split, as long as one saves enough beyond the noise.

    Args:
        limit: bytes that the weights of all chosen variants may take together.
    """
    default = best_single(variants, points, limit)
    by_name = {v.name: v for v in variants}
    # The time of each variant at each point, relative to the default's; within the noise it is the default's.
    relative = {v.name: [p.relative(v.name, default) for p in points] for v in variants}
    counts = [p.kind.count for p in points]
    first = Leaf(default)
    tree: Leaf | Split = first
    mine = {id(first): list(range(len(points)))}  # leaf -> the points that come there
    while len(leaves(tree)) < _LEAVES:
        used = {leaf.variant for leaf in leaves(tree)}
        held = bytes_of([by_name[v] for v in used])
        best: tuple[float, Leaf, Split] | None = None
        for leaf in leaves(tree):
            for feature, threshold in _thresholds([points[i] for i in mine[id(leaf)]]):
                for high in (False, True):
                    moved = [i for i in mine[id(leaf)] if (points[i].feature(feature) >= threshold) == high]
                    before = sum(counts[i] * relative[leaf.variant][i] for i in moved)
                    for name in by_name:
                        together = bytes_of([by_name[v] for v in used | {name}])
                        gain = before - sum(counts[i] * relative[name][i] for i in moved)
                        worth = _WORTH_WEIGHTS if together > held else _WORTH
                        if together > limit or gain < worth * before or (best is not None and gain <= best[0]):
                            continue
                        sides = (Leaf(leaf.variant), Leaf(name)) if high else (Leaf(name), Leaf(leaf.variant))
                        best = (gain, leaf, Split(feature, threshold, *sides))
        if best is None:
            break
        _, old, new = best
        for side, high in ((new.low, False), (new.high, True)):
            here = mine[id(old)]
            mine[id(side)] = [i for i in here if (points[i].feature(new.feature) >= new.threshold) == high]
        tree = _grown(tree, old, new)
    return tree


def _grown(tree: Leaf | Split, old: Leaf, new: Split) -> Leaf | Split:
    if tree is old:
        return new
    if isinstance(tree, Split):
        return Split(tree.feature, tree.threshold, _grown(tree.low, old, new), _grown(tree.high, old, new))
    return tree


def _thresholds(points: Sequence[Point]) -> list[tuple[str, int]]:
    """Between any two neighbouring values of each feature, their geometric mean."""
    found = []
    for feature in FEATURES:
        values = sorted({p.feature(feature) for p in points})
        for low, high in itertools.pairwise(values):
            found.append((feature, min(high, max(low + 1, round(math.sqrt(low * high))))))
    return found

"""How many units each block keeps of what all of them may keep together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Site:
    """The heads of one attention, the neurons of one feed-forward, or the experts of one block.

    Attributes:
        count: units that stay; until they are allotted, those of the share that was asked for.
        scores: float64[units].
        cost: parameters that one unit has.
        channels: of one unit: those of a group of heads, 1 of a neuron.
        step: how many units go or stay together.
        attention: whose heads they are; None for neurons and experts.
    """

    unit: str
    place: str
    count: int
    scores: np.ndarray
    cost: int
    channels: int = 1
    step: int = 1
    attention: Any = None


def compete(sites: Sequence[Site]) -> None:
    """Lets the best units of all sites stay, as many as all sites would keep, by scores divided by their site's mean.

    Counts are rounded to whole steps, at least one each.
    """
    if not sites:
        return
    normal = [site.scores / max(float(np.mean(site.scores)), 1e-30) for site in sites]
    ranked = np.sort(np.concatenate(normal))[::-1]
    threshold = ranked[min(sum(site.count for site in sites), len(ranked)) - 1]
    for site, score in zip(sites, normal):
        steps = round(int(np.count_nonzero(score >= threshold)) / site.step)
        site.count = min(max(steps, 1) * site.step, len(score))


def adapt(sites: Sequence[Site]) -> None:
    """Spends the parameters that all sites would keep on the units of the highest standardised scores.

    Scores are standardised within their site, z = (s - mean) / std; one threshold on z then serves heads and neurons of
    all blocks alike: FLAP's adaptive structure search (An et al. 2023, arXiv:2312.11983). There channels are
    standardised and a head has the mean of its own; here z / sqrt(channels), the spread of such a mean. A unit costs
    its parameters. Units go or stay in whole steps, each by its mean, and every site keeps one step at least: beyond
    that, what is kept in all differs from the budget by less than one step of one site.
    """
    budget = sum(site.count * site.cost for site in sites)
    ranked: list[tuple[float, int, Site]] = []
    for site in sites:
        z = np.sort(standardised(site.scores))[::-1] / math.sqrt(site.channels)
        steps = [z[start : start + site.step] for start in range(0, len(z), site.step)]
        site.count = len(steps[0])
        ranked += [(float(step.mean()), len(step), site) for step in steps[1:]]
    left = budget - sum(site.count * site.cost for site in sites)
    for _, units, site in sorted(ranked, key=lambda entry: -entry[0]):
        price = units * site.cost
        if price > 2 * left:  # further from the budget with it than without
            break
        site.count += units
        left -= price


def standardised(scores: np.ndarray) -> np.ndarray:
    """(scores - mean) / std; 0 where all are alike."""
    spread = float(np.std(scores))
    return np.zeros_like(scores) if spread == 0.0 else (scores - np.mean(scores)) / spread

"""What a rule promises about the numbers it gives, and how far apart they may then be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Guarantee:
    """The promise of one rule. `max_error` is the largest relative error it may add of its own accord."""

    max_error: float = 0.0

    def __str__(self):
        return type(self).__name__


@dataclass(frozen=True)
class Exact(Guarantee):
    """The very same bits, NaN and infinities included.

    Example:
        >>> from tfvllm.graph.guarantee import Exact
        >>> print(Exact(), Exact().max_error)
        Exact 0.0
    """


@dataclass(frozen=True)
class Reordered(Guarantee):
    """The same terms, summed or multiplied in another order, in the same precision.

    The result may differ from the original by rounding alone; against a float64 evaluation of the original graph its
    error is of the size of the original's own error.

    Attributes:
        within: what is computed on the way that the original does not compute, such as "x + y" where x·c + y·c becomes
            (x + y)·c. It holds where that stays in the range of the dtype: below 3.4e38 in float32 and bfloat16.
            float16 ends at 65504, which ordinary activations reach: there the rule declines.

    Example:
        >>> from tfvllm.graph.guarantee import Reordered
        >>> print(Reordered())
        Reordered
    """

    within: str = ""


@dataclass(frozen=True)
class Approximate(Guarantee):
    """Another formula: at most `max_error` (relative to the largest magnitude) on `domain`, as `source` shows.

    Example:
        >>> from tfvllm.graph.guarantee import Approximate
        >>> print(Approximate(2e-6, domain="all finite x", source="measured against float64"))
        Approximate(2e-06 on all finite x; measured against float64)
    """

    domain: str = ""
    source: str = ""

    def __str__(self):
        return f"Approximate({self.max_error:g} on {self.domain}; {self.source})"

"""Attention masks: what is done twice over [heads, queries, keys] is done once, and the rest over [queries, 1]."""

import numpy as np

from tfvllm.graph import dims
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.pattern import constant, op
from tfvllm.graph.rewriter import Declined, Rule


class MaskRowsAfterAttention(Rule):
    """where(mask, softmax(where(mask, s, -big)), 0) @ v -> where(any(mask), softmax(where(mask, s, -big)) @ v, 0).

    A masked position of a row that has an unmasked one gets exp(-big - max) = 0 from the softmax already; only rows
    without any unmasked position need the second `where`, and those can be blanked after the product.
    """

    guarantee = Approximate(
        max_error=0.0,
        domain="scores within ±1e8, masked ones at -1e9 or lower",
        source="exp(x) is 0 in float32 for x < -104 (IEEE 754)",
    )

    def pattern(self, mask, scores, v):
        chances = op.Softmax(op.SelectV2(mask, scores, constant("low")), name="softmax")
        blanked = op.SelectV2(mask, chances, constant("zero"), name="blanked")
        return op.BatchMatMulV2(blanked, v, name="product")

    def condition(self, graph, m):
        if m.node("product").attr("adj_x"):
            raise Declined("the chances are transposed")
        zero, low = graph.constant(m.zero), graph.constant(m.low)
        if np.any(zero.astype(np.float64) != 0):
            raise Declined("masked positions are not set to 0")
        if low.size != 1 or not float(np.reshape(low, ())) <= -1e9:
            raise Declined("masked scores are not set to -1e9 or lower")
        if graph.sole_reader(m.blanked) is None:
            raise Declined("the masked chances are read elsewhere")
        if m.mask.rank is None or m.mask.rank < 1 or m.softmax.shape is None:
            raise Declined("a rank is unknown")
        if m.blanked.shape != m.softmax.shape or m.mask.rank > m.softmax.rank:
            raise Declined("the mask widens the chances")
        if m.mask.rank == m.softmax.rank and any(
            d not in (1, s) for d, s in zip(m.mask.shape[:-1], m.softmax.shape[:-1])
        ):
            raise Declined("the mask is not known to fit the chances")
        if dims.broadcast(m.mask.shape[-1], m.softmax.shape[-1]) != m.softmax.shape[-1]:
            raise Declined("the mask is longer than a row of chances")

    def replacement(self, b, m):
        product = b.BatchMatMulV2(m.softmax, m.v, adj_x=False, adj_y=bool(m.node("product").attr("adj_y")))
        some = b.op("Any", [m.mask, b.const(-1)], keep_dims=True)[0]
        return b.SelectV2(some, product, b.const(0.0, product.dtype))

"""Attention masks: what is done twice over [heads, queries, keys] is done once, and the rest over [queries, 1]."""

import numpy as np
import tensorflow as tf

from tfvllm.graph import dims
from tfvllm.graph.builder import Declined
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.pattern import constant, op
from tfvllm.graph.rewriter import Rule
from tfvllm.rules.pack_tokens import comes_unpacked

_FAR = -1e38  # in float32 and bfloat16 nothing below 1e29 moves it


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
        _check_low(low)
        if graph.single_use(m.blanked) is None:
            raise Declined("the masked chances are read elsewhere")
        if m.mask.rank is None or m.mask.rank < 1 or m.softmax.shape is None:
            raise Declined("a rank is unknown")
        if m.blanked.shape != m.softmax.shape or m.mask.rank > m.softmax.rank:
            raise Declined("the mask widens the chances")
        if any(dims.broadcast(d, s) != s for d, s in zip(m.mask.shape[::-1], m.softmax.shape[::-1])):
            raise Declined("the mask is not known to fit the chances")

    def replacement(self, b, m):
        product = b.BatchMatMulV2(m.softmax, m.v, adj_x=False, adj_y=bool(m.node("product").attr("adj_y")))
        some = b.op("Any", [m.mask, b.const(-1)], keep_dims=True)[0]
        return b.SelectV2(some, product, b.const(0.0, product.dtype))


class MaskByAddition(Rule):
    """softmax(where(mask, s, low)) -> softmax(s + where(mask, 0, -1e38)) for a mask [sequences, 1, 1, keys].

    An addition is done in place; a choice fills another tensor of [sequences, heads, queries, keys]. Only where the
    keys come out of `PackTokens`: at masked positions they are then those of a token of the same sequence, so that a
    NaN or an infinity there has done its harm already.
    """

    guarantee = Approximate(
        max_error=0.0,
        domain="scores within ±1e8, masked ones at -1e9 or lower",
        source="s - 1e38 rounds to -1e38, and exp(x) is 0 in float32 for x < -104 (IEEE 754)",
    )

    def pattern(self, mask, scores):
        return op.Softmax(op.SelectV2(mask, scores, constant("low"), name="masked"))

    def condition(self, graph, m):
        if m.scores.dtype != tf.float32 or m.mask.rank != 4 or m.scores.rank != 4:
            raise Declined("not a mask of scores")
        if m.mask.shape[1:3] != (1, 1):
            raise Declined("the mask is not one of keys alone")
        _check_low(graph.constant(m.low))
        if graph.single_use(m.masked) is None:
            raise Declined("the masked scores are read elsewhere")
        product = m.scores.node
        while product.op in ("Mul", "RealDiv") and product.inputs[0].rank == 4:
            product = product.inputs[0].node
        if product.op != "BatchMatMulV2" or not comes_unpacked(product.inputs[1]):
            raise Declined("the keys at masked positions may be anything")

    def replacement(self, b, m):
        far = b.SelectV2(m.mask, b.const(0.0, tf.float32), b.const(_FAR, tf.float32))
        return b.Softmax(b.AddV2(m.scores, far))


def _check_low(low: np.ndarray) -> None:
    if low.size != 1 or not float(np.reshape(low, ())) <= -1e9:
        raise Declined("masked scores are not set to -1e9 or lower")

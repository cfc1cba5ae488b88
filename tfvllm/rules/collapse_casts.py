"""Chains of casts become one."""

import tensorflow as tf

from tfvllm.graph.builder import Declined
from tfvllm.graph.guarantee import Exact
from tfvllm.graph.pattern import op
from tfvllm.graph.rewriter import Rule

_SIGNED = (tf.int8, tf.int16, tf.int32, tf.int64)
_UNSIGNED = (tf.uint8, tf.uint16, tf.uint32, tf.uint64)
_MANTISSA = {tf.float16: 11, tf.bfloat16: 8, tf.float32: 24, tf.float64: 53}
_EXPONENT = {tf.float16: 5, tf.bfloat16: 8, tf.float32: 8, tf.float64: 11}


class CollapseCasts(Rule):
    """cast(cast(x, wider), t) -> cast(x, t), where the type between holds every value of x's."""

    guarantee = Exact()

    def pattern(self, x):
        return op.Cast(op.Cast(x, name="inner"), name="out")

    def replacement(self, b, m):
        if m.node("inner").attr("Truncate") or m.node("out").attr("Truncate"):
            raise Declined("a cast truncates")
        if not _holds(m.inner.dtype, m.x.dtype):
            raise Declined(f"{m.inner.dtype.name} does not hold every value of {m.x.dtype.name}")
        if m.x.dtype == m.out.dtype:
            return m.x
        return b.Cast(m.x, SrcT=m.x.dtype, DstT=m.out.dtype)


def _holds(wide: tf.DType, narrow: tf.DType) -> bool:
    if wide == narrow or narrow == tf.bool:
        return True
    if narrow in _MANTISSA:
        return wide in _MANTISSA and _MANTISSA[wide] >= _MANTISSA[narrow] and _EXPONENT[wide] >= _EXPONENT[narrow]
    if narrow in _SIGNED + _UNSIGNED:
        bits = narrow.size * 8 - (narrow in _SIGNED)
        if wide in _MANTISSA:
            return _MANTISSA[wide] >= bits
        if wide in _SIGNED:
            return wide.size * 8 - 1 >= bits
        return wide in _UNSIGNED and narrow in _UNSIGNED and wide.size >= narrow.size
    return False

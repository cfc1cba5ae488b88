"""Transposes of floats moved as integers of the same size."""

import tensorflow as tf

from tfvllm.graph.guarantee import Exact
from tfvllm.graph.rewriter import NodePass

_AS = {tf.float32: tf.int32, tf.bfloat16: tf.int16, tf.float16: tf.int16}


class TransposesAsIntegers(NodePass):
    """transpose(x) -> bitcast(transpose(bitcast(x, int32)), float32), where the last axis stays the last.

    With oneDNN switched on TensorFlow gives transposes of floats to it, which prepares a kernel at every call: 40 to
    60 µs whatever the size. The same bytes as integers go through TensorFlow's own loops: 4 to 16 µs for one short
    sentence, and not slower for large batches (8·128·12·32 elements: 84 against 98 µs, two AVX-512 cores). Where the
    last axis moves, oneDNN is up to twice as fast from some size on, and keeps the work.
    """

    guarantee = Exact()
    ops = frozenset({"Transpose"})

    def rewrite(self, b, node):
        kind = _AS.get(node.output.dtype)
        order = b.graph.constant(node.inputs[1]) if kind is not None else None
        if order is None or len(order) < 2 or order[-1] not in (-1, len(order) - 1):
            return None
        moved = b.Transpose(b.Bitcast(node.inputs[0], type=kind), node.inputs[1])
        new = b.Bitcast(moved, type=node.output.dtype)
        new.shape = node.output.shape
        return {node.output: new}

"""Builds the replacement of a match: typed nodes with inferred shapes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.graph import dims, infer
from tfvllm.graph.ir import Graph, Node, Value


class Declined(Exception):
    """Raised by a rule that could match but must not rewrite; the message is the reason a user reads.

    Example:
        >>> from tfvllm.graph.rewriter import Declined
        >>> str(Declined("the sum is read elsewhere"))  # raised in a rule's `condition` or `replacement`
        'the sum is read elsewhere'
    """


class Skip(Declined):
    """Raised where the match is by chance, not a near miss: nothing is recorded.

    Example:
        >>> from tfvllm.graph.rewriter import Declined, Skip
        >>> issubclass(Skip, Declined)
        True
    """


class Builder:
    """Makes the nodes of a replacement: `b.MatMul(x, w, transpose_b=True)`, named after the root it replaces."""

    def __init__(self, graph: Graph, scope: str):
        self.graph = graph
        self.scope = scope
        self.made: list[Node] = []

    def __getattr__(self, op_name: str) -> Callable[..., Value]:
        return lambda *inputs, **attrs: self.op(op_name, inputs, **attrs)[0]

    def op(self, op_name: str, inputs: Sequence[Any], hint: str | None = None, **attrs) -> list[Value]:
        """Adds a node and infers its shapes; Python numbers and arrays among `inputs` become constants."""
        like = next((v.dtype for v in inputs if isinstance(v, Value)), None)
        values = [v if isinstance(v, Value) else self.const(v, like) for v in inputs]
        node = self.graph.add(f"{self.scope}/{hint or op_name.lstrip('_')}", op_name, values, attrs)
        infer.infer_node(self.graph, node)
        self.made.append(node)
        return node.outputs

    def const(self, content: Any, dtype: tf.DType | None = None) -> Value:
        if dtype is None:
            dtype = tf.as_dtype(np.asarray(content).dtype)
            dtype = tf.float32 if dtype == tf.float64 else tf.int32 if dtype == tf.int64 else dtype
        array = np.asarray(content, dtype.as_numpy_dtype)
        node = self.graph.add(f"{self.scope}/Const", "Const", [], {"dtype": dtype, "value": array})
        infer.infer_node(self.graph, node)
        self.made.append(node)
        return node.output

    def ints(self, *content: int) -> Value:
        """An int32 vector constant."""
        return self.const(np.asarray(content, np.int32), tf.int32)

    def weight(self, array: np.ndarray, dtype: tf.DType, hint: str = "weight") -> Value:
        value = self.graph.weight(self.graph.unique(f"{self.scope}/{hint}"), array, dtype)
        self.made.append(value.node)
        return value

    def reshape(self, value: Value, sizes: Sequence[Any], like: Sequence[Value] = ()) -> Value:
        """`value` with the shape `sizes` (ints and `Dim`s).

        Unknown sizes are read off `value` and the values `like` it; declines where one can be read off none of them.
        """
        sizes = tuple(sizes)
        if value.shape == sizes:
            return value
        return self.Reshape(value, self.sizes(sizes, [value, *like], whole=value.shape))

    def sizes(self, sizes: Sequence[Any], like: Sequence[Value], whole: tuple | None = None) -> Value:
        """An int32 vector that holds `sizes`. `whole`: the shape being reshaped, which lets one unknown be -1."""
        unknown = [i for i, s in enumerate(sizes) if not isinstance(s, int)]
        if len(unknown) <= 1 and (whole is not None or not unknown) and 0 not in sizes:
            return self.ints(*(s if isinstance(s, int) else -1 for s in sizes))
        return self.Pack(
            *(self.const(s, tf.int32) if isinstance(s, int) else self._size(s, like) for s in sizes), axis=0
        )

    def _size(self, size: Any, like: Sequence[Value]) -> Value:
        for value in _upstream(like):
            for axis, known in enumerate(value.shape or ()):
                if known == size:
                    shape = self.Shape(value, out_type=tf.int32)
                    ends = (self.ints(axis), self.ints(axis + 1), self.ints(1))
                    return self.StridedSlice(shape, *ends, shrink_axis_mask=1)
        if len(size.terms) == 1 and len(size.terms[0][0]) > 1:  # a product of sizes
            names, factor = size.terms[0]
            result = self._size(dims.symbol(names[0]), like)
            for name in names[1:]:
                result = self.Mul(result, self._size(dims.symbol(name), like))
            return result if factor == 1 else self.Mul(result, self.const(factor, tf.int32))
        raise Declined(f"no tensor at hand has an axis of size {size}")


def _upstream(values: Sequence[Value]) -> Iterator[Value]:
    """The values and everything they are computed from, nearest first: a size may be read off any of it."""
    queue = deque(values)
    seen = set(values)
    while queue:
        value = queue.popleft()
        yield value
        for needed in value.node.inputs:
            if needed not in seen:
                seen.add(needed)
                queue.append(needed)

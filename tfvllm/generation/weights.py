"""Many small vectors held in one variable."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf


class Vectors:
    """All biases, or all that norms are scaled and moved by, of a stack: one variable.

    A step reads a hundred of them. As variables they would be a hundred inputs of every function on the way there: the
    SavedModel of a GPT-2 took twice as long to load.
    """

    def __init__(self, dtype: tf.DType):
        self._dtype = dtype
        self._values: list[np.ndarray] = []
        self._graph: tf.Graph | None = None  # where they were read last, and as what
        self._parts: list[tf.Tensor] = []

    def add(self, value: np.ndarray) -> Vector:
        self._values.append(value)
        return Vector(self, len(self._values) - 1)

    def joined(self, name: str) -> list[tf.Variable]:
        """Makes the variable; none where there is no vector."""
        self._sizes = [value.size for value in self._values]
        if not self._values:
            return []
        self._variable = tf.Variable(tf.cast(np.concatenate(self._values), self._dtype), trainable=False, name=name)
        self._values = []
        return [self._variable]

    def read(self, index: int) -> tf.Tensor:
        if tf.executing_eagerly():
            start = sum(self._sizes[:index])
            return self._variable[start : start + self._sizes[index]]
        graph = tf.compat.v1.get_default_graph()
        if self._graph is not graph:
            self._graph, self._parts = graph, tf.split(self._variable, self._sizes)
        return self._parts[index]


@dataclasses.dataclass
class Vector:
    """One of several vectors in a variable."""

    vectors: Vectors
    index: int


def read_vector(vector: Any) -> tf.Tensor | None:
    """A bias, scale or offset of a held stack."""
    return None if vector is None else vector.vectors.read(vector.index)

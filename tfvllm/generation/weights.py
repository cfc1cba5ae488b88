"""The arrays of a model as variables: matrices as kernels want them, many small vectors in one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.families import spec as specs
from tfvllm.generation.kernels import Portable

# From a value, its name and its type to the variable that holds it.
Make = Callable[[np.ndarray, str, tf.DType], tf.Variable]


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

    def joined(self, name: str, make: Make) -> list[tf.Variable]:
        """The variable; none where there is no vector."""
        self._sizes = [value.size for value in self._values]
        if not self._values:
            return []
        self._variable = make(np.concatenate(self._values), name, self._dtype)
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


def variable(value: np.ndarray, name: str, dtype: tf.DType) -> tf.Variable:
    return tf.Variable(tf.cast(value, dtype), trainable=False, name=name)


def refilled(variables: Iterable[tf.Variable]) -> Make:
    """In place of `variable`: gives the value to the next of `variables`, which were made in the same order."""
    left: Iterator[tf.Variable] = iter(variables)

    def make(value: np.ndarray, name: str, dtype: tf.DType) -> tf.Variable:
        held = next(left)
        held.assign(tf.cast(value, dtype))
        return held

    return make


def matrix(value: np.ndarray, name: str, kernels: Portable, make: Make = variable) -> tf.Variable:
    """A matrix [inputs, outputs] in the type and layout that `kernels` want."""
    held = value.T if kernels.transposed(*value.shape) else value
    return make(np.ascontiguousarray(held), name, kernels.dtype)


def hold(
    stack: specs.Stack, name: str, kernels: Portable, make: Make = variable
) -> tuple[specs.Stack, list[tf.Variable]]:
    """The same dataclasses with variables, and vectors of variables, in place of arrays; and these variables."""
    held: list[tf.Variable] = []
    # Norms are held as what they compute in, or every step would cast them.
    biases, norms = Vectors(kernels.dtype), Vectors(tf.float32)

    def put(value: Any, path: str, vectors: Vectors = biases) -> Any:
        if isinstance(value, specs.Rotary):
            return value  # a few numbers, kept as constants
        if isinstance(value, specs.Attention):
            value = _folded(value)
        if isinstance(value, specs.Linear):
            held.append(matrix(value.kernel, f"{path}/kernel", kernels, make))
            return specs.Linear(held[-1], put(value.bias, f"{path}/bias"))
        if isinstance(value, np.ndarray) and value.ndim == 1:
            return vectors.add(value)
        if isinstance(value, np.ndarray):
            held.append(make(value, path, kernels.dtype))
            return held[-1]
        if isinstance(value, list):
            return [put(item, f"{path}/{i}") for i, item in enumerate(value)]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            vectors = norms if isinstance(value, specs.Norm) else biases
            return dataclasses.replace(value, **{k: put(v, f"{path}/{k}", vectors) for k, v in fields.items()})
        return value

    stack = put(stack, name)
    for vectors, what in ((biases, "biases"), (norms, "norms")):
        held.extend(vectors.joined(f"{name}/{what}", make))
    return stack, held


def _folded(attention: specs.Attention) -> specs.Attention:
    """The scale of the scores inside the query weights, where that changes no bit: where it is a power of two."""
    scale = attention.scale
    if scale == 1.0 or math.frexp(scale)[0] != 0.5:
        return attention
    norm, linear = attention.query_norm, attention.query_key_value
    if norm is not None:
        norm = dataclasses.replace(norm, scale=norm.scale * scale)
    else:
        factors = np.ones(linear.kernel.shape[1], np.float32)
        factors[: attention.heads * attention.head_dim] = scale
        bias = None if linear.bias is None else linear.bias * factors
        linear = specs.Linear(linear.kernel * factors, bias)
    return dataclasses.replace(attention, scale=1.0, query_norm=norm, query_key_value=linear)

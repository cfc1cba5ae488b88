"""Which weights of a Keras 3 model can be masked, and how each is seen as a matrix [inputs, outputs]."""

import abc
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError

_L = keras.layers
# As in TFMOT's prune_registry: layer class -> prunable weights.
_WEIGHTS: dict[type, tuple[str, ...]] = {
    _L.Dense: ("kernel",),
    _L.EinsumDense: ("kernel",),
    _L.Conv1D: ("kernel",),
    _L.Conv2D: ("kernel",),
    _L.Conv3D: ("kernel",),
    _L.Conv1DTranspose: ("kernel",),
    _L.Conv2DTranspose: ("kernel",),
    _L.Conv3DTranspose: ("kernel",),
    _L.SeparableConv1D: ("pointwise_kernel",),
    _L.SeparableConv2D: ("pointwise_kernel",),
    _L.DepthwiseConv1D: (),
    _L.DepthwiseConv2D: (),
    _L.Embedding: ("embeddings",),
    _L.LSTMCell: ("kernel", "recurrent_kernel"),
    _L.GRUCell: ("kernel", "recurrent_kernel"),
    _L.SimpleRNNCell: ("kernel", "recurrent_kernel"),
}


class MatrixView(NamedTuple):
    """A weight seen as [inputs, outputs]: transpose by `permutation`, then the first `inputs` axes become rows."""

    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    inputs: int

    @property
    def matrix_shape(self) -> tuple[int, int]:
        moved = [self.shape[i] for i in self.permutation]
        return int(np.prod(moved[: self.inputs])), int(np.prod(moved[self.inputs :]))

    def to_matrix(self, value: Any) -> Any:
        """[inputs, outputs] of a tensor or array of the weight's shape."""
        if isinstance(value, np.ndarray):
            return value.transpose(self.permutation).reshape(self.matrix_shape)
        return tf.reshape(tf.transpose(value, self.permutation), self.matrix_shape)

    def from_matrix(self, matrix: Any) -> Any:
        """The inverse of `to_matrix`."""
        moved = [self.shape[i] for i in self.permutation]
        back = tuple(int(i) for i in np.argsort(self.permutation))
        if isinstance(matrix, np.ndarray):
            return matrix.reshape(moved).transpose(back)
        return tf.transpose(tf.reshape(matrix, moved), back)


class Prunable(NamedTuple):
    """A weight that can be masked."""

    name: str  # "transformer_layer_0/self_attention/query/kernel"
    layer: Any
    variable: Any
    view: MatrixView


def matrix_view(layer: Any, variable: Any) -> MatrixView:
    """How the weight of `layer` multiplies its input: EinsumDense by its equation, convolutions with outputs last."""
    shape = tuple(int(size) for size in variable.shape)
    axes = tuple(range(len(shape)))
    if isinstance(layer, _L.EinsumDense) and variable is layer.kernel:
        source, target = layer.equation.split("->")
        _, kernel = source.split(",")
        outputs = [i for i, letter in enumerate(kernel) if letter in target]
        inputs = [i for i, letter in enumerate(kernel) if letter not in target]
        return MatrixView(shape, tuple(inputs + outputs), len(inputs))
    if isinstance(layer, _L.Conv1DTranspose | _L.Conv2DTranspose | _L.Conv3DTranspose):
        return MatrixView(shape, (*axes[:-2], axes[-1], axes[-2]), len(shape) - 1)
    return MatrixView(shape, axes, max(len(shape) - 1, 1))


class PruningPolicy(abc.ABC):
    """Which layers are masked (TFMOT's `PruningPolicy`). Inherit to write your own.

    Example:
        >>> class NoOutput(tfvllm.pruning.PruneKernels):
        ...     def allow_pruning(self, layer):
        ...         return layer.name != "logits" and super().allow_pruning(layer)
        >>> schedule = tfvllm.ConstantSparsity(0.5, 0)
        >>> callback = tfvllm.callbacks.MagnitudePruning(tiny_bert(), schedule, policy=NoOutput())
        >>> any("logits" in target.name for target in callback.state.targets)
        False
    """

    @abc.abstractmethod
    def allow_pruning(self, layer: Any) -> bool:
        """Whether the weights of `layer` (a layer without prunable sub-layers) are masked."""

    @abc.abstractmethod
    def ensure_model_supports_pruning(self, model: Any) -> None:
        """Raises `InputError` if the policy does not fit `model`."""


class PruneKernels(PruningPolicy):
    """Products only: Dense, EinsumDense, convolutions, recurrent cells. Embeddings stay dense.

    Example:
        >>> policy = tfvllm.pruning.PruneKernels()
        >>> policy.allow_pruning(keras.layers.Dense(1)), policy.allow_pruning(keras.layers.Embedding(2, 2))
        (True, False)
    """

    def allow_pruning(self, layer: Any) -> bool:
        return not isinstance(layer, _L.Embedding)

    def ensure_model_supports_pruning(self, model: Any) -> None:
        if not any(True for _ in prunable_weights(model, self)):
            raise InputError(
                f"{type(model).__name__} has no kernel to prune; expected a built model with Dense-like layers."
            )


class PruneForLatencyOnXNNPack(PruningPolicy):
    """1x1 convolutions only, which XNNPACK can run sparse (Elsen et al. 2019, arXiv:1911.09723).

    Example:
        >>> policy = tfvllm.pruning.PruneForLatencyOnXNNPack()
        >>> policy.allow_pruning(keras.layers.Conv2D(4, 1)), policy.allow_pruning(keras.layers.Conv2D(4, 3))
        (True, False)
    """

    def allow_pruning(self, layer: Any) -> bool:
        return isinstance(layer, _L.Conv2D) and tuple(layer.kernel_size) == (1, 1)

    def ensure_model_supports_pruning(self, model: Any) -> None:
        if not any(True for _ in prunable_weights(model, self)):
            raise InputError("PruneForLatencyOnXNNPack: expected a model with 1x1 Conv2D layers, found none.")


def own_weights(layer: Any) -> tuple[str, ...] | None:
    """Names of the prunable weights of one layer, None for a layer that is not known."""
    for cls in type(layer).__mro__:
        if cls in _WEIGHTS:
            return _WEIGHTS[cls]
    return None


def prunable_weights(model: Any, policy: PruningPolicy | None = None) -> Iterator[Prunable]:
    """Every weight of a layer or model (nested ones included) that can be masked, each once.

    A layer of one's own may say its weights through `get_prunable_weights()`, as in TFMOT.

    Raises:
        InputError: an unbuilt layer.
    """
    seen: set[int] = set()
    for layer in model._flatten_layers():
        own: list[Any] = []
        if hasattr(layer, "get_prunable_weights"):
            own = list(layer.get_prunable_weights())
        elif own_weights(layer):
            if not layer.built:
                raise InputError(
                    f"layer {layer.name} is not built: it has no weights yet. Call the model on data once."
                )
            own = [getattr(layer, name) for name in own_weights(layer) or ()]
            if getattr(layer, "reverse_embeddings", None) is not None:
                own.append(layer.reverse_embeddings)
        if own and policy is not None and not policy.allow_pruning(layer):
            continue
        for variable in own:
            if id(variable) not in seen:
                seen.add(id(variable))
                yield Prunable(variable.path, layer, variable, matrix_view(layer, variable))

"""Which weights of a Keras 3 model can be masked, and how each is seen as a matrix [inputs, outputs]."""

import abc
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell

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
    ConvLSTMCell: ("kernel", "recurrent_kernel"),
}
_KERAS_LAYERS = {cls for cls in vars(_L).values() if isinstance(cls, type)} - {_L.Layer, _L.Wrapper}
_KNOWN_MODULES = ("keras_hub.", "keras_nlp.", "tfvllm.")
_CONVOLUTIONS = (_L.Conv1D, _L.Conv2D, _L.Conv3D, _L.SeparableConv1D, _L.SeparableConv2D, ConvLSTMCell)
_TRANSPOSED = (_L.Conv1DTranspose, _L.Conv2DTranspose, _L.Conv3DTranspose)


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
    if isinstance(layer, _TRANSPOSED):
        return MatrixView(shape, (*axes[:-2], axes[-1], axes[-2]), len(shape) - 1)
    return MatrixView(shape, axes, max(len(shape) - 1, 1))


def channel_view(target: Prunable) -> MatrixView:
    """The weight with what M:N groups run along as rows: the input channels of a convolution, else all its inputs."""
    axes = target.view.permutation
    if isinstance(target.layer, (*_CONVOLUTIONS, *_TRANSPOSED)):
        channels = axes[target.view.inputs - 1]
        return MatrixView(target.view.shape, (channels, *(axis for axis in axes if axis != channels)), 1)
    return target.view


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


def own_weights(layer: Any) -> tuple[str, ...] | None:
    """Names of the prunable weights of one layer, None for a layer that is not known."""
    for cls in type(layer).__mro__:
        if cls in _WEIGHTS:
            return _WEIGHTS[cls]
    return None


def is_known(layer: Any) -> bool:
    """Whether what `layer` itself has to prune is told: by its class, `get_prunable_weights` or its sub-layers."""
    known = (base in _KERAS_LAYERS or base.__module__.startswith(_KNOWN_MODULES) for base in type(layer).__mro__)
    if hasattr(layer, "get_prunable_weights") or type(layer).__module__.startswith("keras.") or any(known):
        return True
    if not layer.built:
        return any(True for _ in layer._flatten_layers(include_self=False))
    # A scale, a bias or a class token is no product.
    return all(sum(size > 1 for size in variable.shape) < 2 for variable in layer._trainable_variables)


def refuse_unknown(layers: Any) -> None:
    """Raises `InputError` for a layer of one's own whose weights nobody has told of."""
    for layer in layers:
        if not is_known(layer):
            raise InputError(
                f"layer {layer.name} ({type(layer).__name__}) is not known: which of its weights are to be pruned? "
                "Expected a Keras layer, one made of Keras layers, or one with get_prunable_weights(), which returns a "
                "list of its weights, empty to leave it dense. A policy can leave it out too."
            )


def prunable_weights(model: Any, policy: PruningPolicy | None = None) -> Iterator[Prunable]:
    """Every weight of a layer or model (nested ones included) that can be masked, each once, frozen ones too.

    A layer of one's own may say its weights through `get_prunable_weights()`, as in TFMOT. Layers of a built model
    that were never called have no weights and are passed over.

    Raises:
        InputError: an unbuilt model, a layer with LoRA, or one that Keras has quantised.
    """
    seen: set[int] = set()
    unbuilt = []
    for layer in model._flatten_layers():
        listed = hasattr(layer, "get_prunable_weights")
        if not (listed or own_weights(layer)) or (policy is not None and not policy.allow_pruning(layer)):
            continue
        if listed:
            own = list(layer.get_prunable_weights())
        else:
            if not layer.built:
                unbuilt.append(layer.name)
                continue
            _refuse_derived(layer)
            own = [getattr(layer, name) for name in own_weights(layer) or ()]
            if getattr(layer, "reverse_embeddings", None) is not None:
                own.append(layer.reverse_embeddings)
        for variable in own:
            if id(variable) not in seen:
                seen.add(id(variable))
                yield Prunable(variable.path, layer, variable, matrix_view(layer, variable))
    if unbuilt and not seen:
        raise InputError(f"layer {unbuilt[0]} is not built: it has no weights yet. Call the model on data once.")


def _refuse_derived(layer: Any) -> None:
    if getattr(layer, "lora_enabled", False):
        raise InputError(
            f"layer {layer.name} has LoRA: its kernel is a sum of which a mask can zero no part. Call "
            "tfvllm.pruning.merge_lora(model) first, or prune before enable_lora."
        )
    mode = getattr(layer, "quantization_mode", None)
    if mode is not None and mode != "float8":  # whose kernel is still a float variable, rounded as it is used
        raise InputError(
            f"layer {layer.name} is quantised to {mode}: its kernel is no float variable to mask. Prune the model "
            f"before quantize({mode!r}): zeros stay zeros."
        )


class Selection(NamedTuple):
    """What training will mask in a model."""

    targets: list[Prunable]
    frozen: list[str]  # names of prunable weights that are not trained
    unknown: list[str]  # names of layers of one's own with matrices nobody has told of


def select(model: Any, policy: PruningPolicy | None = None) -> Selection:
    """The prunable weights of `model` that are trained, and what is left dense. Raises as `prunable_weights`."""
    found = list(prunable_weights(model, policy))
    return Selection(
        [target for target in found if is_trained(target)],
        [target.name for target in found if not is_trained(target)],
        [
            layer.name
            for layer in model._flatten_layers()
            if not is_known(layer) and (policy is None or policy.allow_pruning(layer))
        ],
    )


def is_trained(target: Prunable) -> bool:
    """A layer that lists a weight it does not train is taken at its word, unless the layer is frozen."""
    return target.layer.trainable and (target.variable.trainable or hasattr(target.layer, "get_prunable_weights"))


def say_what_stays_dense(selection: Selection, stacklevel: int = 3) -> None:
    """Warns of frozen weights and unknown layers."""
    for names, reason in (
        (selection.frozen, "frozen (set trainable = True to prune them)"),
        (selection.unknown, "layers that are not known (give them get_prunable_weights())"),
    ):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            warnings.warn(f"not pruned, as {reason}: {', '.join(names[:4])}{more}", stacklevel=stacklevel)

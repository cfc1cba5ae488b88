"""The pruning policy for XNNPACK's sparse inference: 1x1 convolutions between one first and one last layer."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import keras

from tfvllm.errors import InputError
from tfvllm.pruning.prunable import PruningPolicy

_L = keras.layers
_ELEMENTWISE = (_L.Add, _L.Multiply, _L.ZeroPadding2D, _L.ReLU, _L.LeakyReLU, _L.ELU, _L.Dropout, _L.InputLayer)
_OPERATIONS = ("Add", "Subtract", "Multiply", "Identity")
_ACTIVATIONS = ("relu", "relu6", "leaky_relu", "elu", "sigmoid")


class PruneForLatencyOnXNNPack(PruningPolicy):
    """1x1 convolutions only, in models that XNNPACK can run sparse (Elsen et al. 2019, arXiv:1911.09723).

    As TFMOT's: from every input a 3x3 convolution of 3 channels with stride 2 behind a padding of 1 comes first, from
    every output a global average pooling last, and XNNPACK knows all layers between them.

    Example:
        >>> policy = tfvllm.pruning.PruneForLatencyOnXNNPack()
        >>> policy.allow_pruning(keras.layers.Conv2D(4, 1)), policy.allow_pruning(keras.layers.Conv2D(4, 3))
        (True, False)
    """

    def allow_pruning(self, layer: Any) -> bool:
        return isinstance(layer, _L.Conv2D) and tuple(layer.kernel_size) == (1, 1)

    def ensure_model_supports_pruning(self, model: Any) -> None:
        """Raises `InputError`: a model without a graph, without such a first or last layer, or with others between."""
        if not isinstance(model, keras.Sequential | keras.src.models.functional.Functional):
            raise InputError("PruneForLatencyOnXNNPack: subclassed models have no graph to check; expected another.")
        if not model.built:
            raise InputError("PruneForLatencyOnXNNPack: the model is not built. Begin it with keras.Input.")
        above: dict[int, list[Any]] = defaultdict(list)
        below: dict[int, list[Any]] = defaultdict(list)
        inputs, outputs = _wire(model, above, below)
        starts = _reached(inputs, lambda op: _is_first(op, above), below)
        if not starts:
            raise InputError(
                "PruneForLatencyOnXNNPack: expected a 3x3 Conv2D with stride 2, 3 input channels and `valid` padding "
                "behind a ZeroPadding2D of 1 in every input branch, found none."
            )
        ends = _reached(outputs, _is_last, above)
        if not ends:
            raise InputError("PruneForLatencyOnXNNPack: expected a GlobalAveragePooling2D in every output branch.")

        def at_end(operation: Any) -> bool:
            if any(operation is end for end in ends):
                return True
            if not _is_known(operation, above):
                raise InputError(
                    f"PruneForLatencyOnXNNPack: layer {operation.name} ({type(_inner(operation)).__name__}) is not one "
                    "that XNNPACK runs sparse."
                )
            return False

        _reached([operation for start in starts for operation in below[id(start)]], at_end, below)


def _inner(operation: Any) -> Any:
    return operation.layer if isinstance(operation, _L.Wrapper) else operation


def _wire(model: Any, above: dict[int, list[Any]], below: dict[int, list[Any]]) -> tuple[list[Any], list[Any]]:
    """Fills what feeds, and what reads, each operation; models inside are opened. The model's first and last ones."""
    functional = model._functional if isinstance(model, keras.Sequential) else model
    inside: dict[int, tuple[list[Any], list[Any]]] = {}

    def ends(operation: Any) -> tuple[list[Any], list[Any]]:
        if not isinstance(operation, keras.Model):
            return [operation], [operation]
        if id(operation) not in inside:
            inside[id(operation)] = _wire(operation, above, below)
        return inside[id(operation)]

    for node in (node for nodes in functional._nodes_by_depth.values() for node in nodes):
        for parent in node.parent_nodes:
            for source in ends(parent.operation)[1]:
                for target in ends(node.operation)[0]:
                    if not any(target is known for known in below[id(source)]):
                        below[id(source)].append(target)
                        above[id(target)].append(source)

    def of(tensors: Any, end: int) -> list[Any]:
        return [
            operation
            for tensor in keras.tree.flatten(tensors)
            for operation in ends(tensor._keras_history.operation)[end]
        ]

    return of(functional.inputs, 0), of(functional.outputs, 1)


def _reached(sources: Iterable[Any], stop: Callable[[Any], bool], onward: dict[int, list[Any]]) -> list[Any]:
    """The first operations from `sources` on for which `stop` holds; none if any branch has no such operation."""
    waiting, seen, found = list(sources), set[int](), []
    while waiting:
        operation = waiting.pop()
        if id(operation) in seen:
            continue
        seen.add(id(operation))
        if stop(operation):
            found.append(operation)
        elif onward[id(operation)]:
            waiting += onward[id(operation)]
        else:
            return []
    return found


def _padding_before(operation: Any, above: dict[int, list[Any]]) -> Any:
    sources = above[id(operation)]
    only = _inner(sources[0]) if len(sources) == 1 else None
    return only.padding if isinstance(only, _L.ZeroPadding2D) else None


def _is_first(operation: Any, above: dict[int, list[Any]]) -> bool:
    layer = _inner(operation)
    return (
        isinstance(layer, _L.Conv2D)
        and tuple(layer.kernel.shape[:3]) == (3, 3, 3)
        and (tuple(layer.strides), layer.padding) == ((2, 2), "valid")
        and _padding_before(operation, above) == ((1, 1), (1, 1))
    )


def _is_last(operation: Any) -> bool:
    return isinstance(_inner(operation), _L.GlobalAveragePooling2D)


def _is_known(operation: Any, above: dict[int, list[Any]]) -> bool:
    """XNNPACK's own test for sparse inference (its src/subgraph.c)."""
    layer = _inner(operation)
    if isinstance(layer, _ELEMENTWISE):
        return True
    if isinstance(layer, _L.DepthwiseConv2D):
        if layer.depth_multiplier != 1 or tuple(layer.dilation_rate) != (1, 1):
            return False
        size, strides = tuple(layer.kernel_size), tuple(layer.strides)
        if size not in ((3, 3), (5, 5)):
            return False
        if layer.padding == "same":
            return strides == (1, 1)
        half = size[0] // 2
        return strides in ((1, 1), (2, 2)) and _padding_before(operation, above) == ((half, half), (half, half))
    if isinstance(layer, _L.Conv2D):
        sizes = (tuple(layer.kernel_size), tuple(layer.strides), tuple(layer.dilation_rate))
        return layer.groups == 1 and all(size == (1, 1) for size in sizes)
    if isinstance(layer, _L.GlobalAveragePooling2D):
        return layer.keepdims
    if isinstance(layer, _L.BatchNormalization):
        return layer.axis in (3, -1)
    if isinstance(layer, _L.UpSampling2D):
        return layer.interpolation == "bilinear"
    if isinstance(layer, _L.Activation):
        return getattr(layer.activation, "__name__", "") in _ACTIVATIONS
    return not isinstance(layer, _L.Layer) and type(layer).__name__ in _OPERATIONS

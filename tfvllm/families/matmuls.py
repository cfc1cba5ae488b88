"""Products of a model that is being trained, as TensorFlow computes them fastest.

Keras gives the projections around attention (`EinsumDense`, `abc,cde->abde`) to TensorFlow as one product for every row
of the batch. The gradient of the kernel is then one matrix for every row, summed afterwards, and on a CPU that is most
of a training step. The same sum over all positions at once is one product.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import keras

from tfvllm.families.taps import hooked


@contextlib.contextmanager
def einsum_as_matmul(*models: keras.Model) -> Iterator[None]:
    """While it lasts, what is traced of `models` has each `EinsumDense` as one product of matrices.

    Results are those of Keras up to the order of sums. Equations that are no such product, int8 kernels and LoRA are
    left as they are, and so are subclasses with a `call` of their own. Graphs that are traced outside, such as those
    that are exported, are Keras's own.

    Args:
        models: built models; whatever is no `EinsumDense` in them is not touched.

    Example:
        >>> layer = keras.layers.EinsumDense("abc,cde->abde", (None, 2, 3))
        >>> layer.build((None, 5, 4))
        >>> x = np.ones((2, 5, 4), "float32")
        >>> before = layer(x)
        >>> with tfvllm.families.matmuls.einsum_as_matmul(keras.Sequential([layer])):
        ...     bool(np.allclose(layer(x), before))
        True
    """
    with contextlib.ExitStack() as taps:
        for model in models:
            for layer in model._flatten_layers():
                if count := _contracted(layer):
                    taps.enter_context(hooked(layer, "call", functools.partial(_matmul, layer, count)))
        yield


def _contracted(layer: Any) -> int:
    """How many of the last input axes `layer` sums over, the first of its kernel; 0 where it is no plain product."""
    if type(layer) is not keras.layers.EinsumDense or not layer.built:
        return 0
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        return 0
    operands, out = layer.equation.split("->")
    x, kernel = operands.split(",")
    shared = 0
    while not kernel.startswith(x[shared:]):
        shared += 1
    count = len(x) - shared
    if "." in layer.equation or not count or not shared or len(set(x)) != len(x):
        return 0
    return count if out == x[:shared] + kernel[count:] and not set(x[:shared]) & set(kernel) else 0


def _matmul(layer: Any, count: int, method: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    if keras.backend.is_keras_tensor(inputs):  # of unknown sizes: only shapes are wanted
        return method(inputs, *args, **kwargs)
    ops = keras.ops
    kernel = ops.convert_to_tensor(layer.kernel)
    of_inputs, of_outputs = kernel.shape[:count], kernel.shape[count:]
    rows = ops.shape(inputs)[: len(inputs.shape) - count]
    flat = ops.reshape(inputs, (-1, math.prod(of_inputs)))
    x = ops.matmul(flat, ops.reshape(kernel, (math.prod(of_inputs), math.prod(of_outputs))))
    x = ops.reshape(x, (*rows, *of_outputs))
    if layer.bias is not None:
        x = ops.add(x, layer.bias)
    return x if layer.activation is None else layer.activation(x)

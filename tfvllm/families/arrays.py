"""What the readers share: arrays out of Keras layers, merged kernels, names of activations."""

import keras
import numpy as np

from tfvllm.errors import InputError
from tfvllm.families.spec import Attention, CrossAttention, FeedForward, Linear, Norm


def array(variable) -> np.ndarray:
    """The value of a Keras variable as float32."""
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32")), dtype=np.float32)


def bias(layer) -> np.ndarray | None:
    """A layer's bias as one vector, or None."""
    value = getattr(layer, "bias", None)
    return None if value is None else array(value).reshape(-1)


def projection(layer) -> tuple[np.ndarray, np.ndarray | None, int, int]:
    """An EinsumDense from width to heads: (kernel [width, heads*head_dim], bias, heads, head_dim).

    keras-nlp stores either [width, heads, head_dim] ("bqm,muh->bquh") or [heads, width, head_dim] ("btd,ndh->btnh").
    """
    kernel = array(layer.kernel)
    weights = layer.equation.split("->")[0].split(",")[1]
    width_axis = weights.index(layer.equation.split(",")[0][-1])
    kernel = np.moveaxis(kernel, width_axis, 0)
    width, heads, head_dim = kernel.shape
    return kernel.reshape(width, heads * head_dim), bias(layer), heads, head_dim


def merged(*parts: tuple[np.ndarray, np.ndarray | None]) -> Linear:
    """[A | B | …] with its bias; a part without a bias gets zeros where another has one."""
    kernel = np.concatenate([kernel for kernel, _ in parts], axis=1)
    if all(bias is None for _, bias in parts):
        return Linear(kernel)
    biases = [np.zeros(kernel.shape[1], np.float32) if bias is None else bias for kernel, bias in parts]
    return Linear(kernel, np.concatenate(biases))


def from_heads(layer) -> Linear:
    """An EinsumDense or Dense from heads back to the width, as [heads*head_dim, width]."""
    kernel = array(layer.kernel)
    return Linear(kernel.reshape(-1, kernel.shape[-1]), bias(layer))


def self_attention(query, key, value, output, *, scale: float, **more) -> Attention:
    """From the four layers of attention, grouped or not; `more`: other fields of `spec.Attention`."""
    kernels = [projection(layer) for layer in (query, key, value)]
    _, _, heads, head_dim = kernels[0]
    return Attention(
        heads=heads,
        kv_heads=kernels[1][2],
        head_dim=head_dim,
        query_key_value=merged(*[kernel[:2] for kernel in kernels]),
        output=from_heads(output),
        scale=scale,
        **more,
    )


def cross_attention(query, key, value, output, *, scale: float, soft_cap: float | None = None) -> CrossAttention:
    """From the four layers of a decoder's attention to the encoder."""
    kernel, query_bias, heads, head_dim = projection(query)
    keys, values = projection(key), projection(value)
    return CrossAttention(
        heads=heads,
        kv_heads=keys[2],
        head_dim=head_dim,
        query=Linear(kernel, query_bias),
        key_value=merged(keys[:2], values[:2]),
        output=from_heads(output),
        scale=scale,
        soft_cap=soft_cap,
    )


def gated(gate, up, output, activation) -> FeedForward:
    """From the three Dense layers of `output(activation(gate(x)) * up(x))`."""
    both = merged(*[(array(layer.kernel), bias(layer)) for layer in (gate, up)])
    return FeedForward(up=both, output=dense(output), activation=activation_name(activation), gated=True)


def dense(layer) -> Linear:
    return Linear(array(layer.kernel), bias(layer))


def layer_norm(layer) -> Norm:
    return Norm("layer", array(layer.gamma), array(layer.beta), float(layer.epsilon))


_ACTIVATIONS = {"relu", "silu", "tanh", "linear", "gelu"}


def activation_name(function) -> str:
    """The engine's name of a Keras activation.

    Raises:
        InputError: the engine does not compute this activation.
    """
    name = getattr(function, "__name__", str(function))
    if name == "swish":
        return "silu"
    if name == "gelu_approximate" or (name == "gelu" and _is_approximate(function)):
        return "gelu_approximate"
    if name in _ACTIVATIONS:
        return name
    raise InputError(f"activation {name!r} is not known to the decode engine; expected one of {sorted(_ACTIVATIONS)}")


def _is_approximate(function) -> bool:
    # keras.activations.gelu(x) is exact; wrappers exist under the same name, so ask the function itself.
    exact = 0.8413447  # gelu(1)
    return abs(float(keras.ops.convert_to_numpy(function(keras.ops.convert_to_tensor([1.0])))[0]) - exact) > 1e-5

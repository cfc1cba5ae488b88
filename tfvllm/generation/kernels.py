"""The few dense computations a step is made of, once with public ops and once with TensorFlow's fused oneDNN ops.

`Portable` runs wherever TensorFlow runs. `OneDnn` emits internal ops (`_FusedMatMul`, `_MklLayerNorm`,
`_MklNativeFusedMatMul`) that a SavedModel can hold and TensorFlow builds with oneDNN can run. All take and give
two-dimensional tensors [rows, features].
"""

from __future__ import annotations

from typing import ClassVar

import tensorflow as tf
from tensorflow.core.framework import graph_pb2

from tfvllm.graph import onednn_costs, targets


def activate(x: tf.Tensor, activation: str) -> tf.Tensor:
    """An element-wise activation by its name in `tfvllm.families.spec.FeedForward`."""
    if activation == "linear":
        return x
    if activation == "gelu":
        return tf.nn.gelu(x, approximate=False)
    if activation == "gelu_approximate":
        return tf.nn.gelu(x, approximate=True)
    if activation == "silu":
        # keras-nlp computes this one in float32 whatever the model's type. tf.nn.silu is the same product, but with a
        # gradient of its own: a SavedModel would hold a function for each use of it.
        wide = tf.cast(x, tf.float32)
        return tf.cast(wide * tf.sigmoid(wide), x.dtype)
    if activation == "swish_1702":  # GPT-OSS
        return x * tf.sigmoid(1.702 * x)
    return {"relu": tf.nn.relu, "tanh": tf.nn.tanh}[activation](x)


class Portable:
    """Public ops only.

    Args:
        dtype: type of weights and activations.
    """

    name = "portable"

    def __init__(self, dtype: tf.DType = tf.float32):
        self.dtype = dtype

    def transposed(self, inputs: int, outputs: int) -> bool:
        """Whether `linear` wants a kernel as [outputs, inputs]; else as [inputs, outputs]."""
        # oneDNN packs a bfloat16 kernel anew at each call: a third faster out of [outputs, inputs] at the few rows of a
        # step (768 x 3072, AMX and AVX-512), and as fast at many rows. In float32 the layouts are level.
        return self.dtype == tf.bfloat16

    def _held_transposed(self, x: tf.Tensor, kernel: tf.Variable) -> bool:
        inputs = x.shape[-1]
        return self.transposed(inputs, kernel.shape[0] * kernel.shape[1] // inputs)

    @property
    def alternative(self) -> tuple[int, int, Portable] | None:
        """Kernels that are faster for some numbers of rows, and the least and most rows that they are for."""
        return None

    def linear(self, x, kernel, bias=None, activation: str = "linear"):
        """`act(x @ kernel + bias)`. x [rows, inputs], kernel as `transposed` says -> [rows, outputs]."""
        y = tf.matmul(x, kernel, transpose_b=self._held_transposed(x, kernel))
        if bias is not None:
            y = tf.nn.bias_add(y, bias)
        return activate(y, activation)

    def layer_norm(self, x, scale, offset, epsilon: float):
        """(x - mean) / sqrt(variance + epsilon) * scale + offset over the last axis, computed in float32."""
        y = tf.cast(x, tf.float32)
        mean = tf.reduce_mean(y, axis=-1, keepdims=True)
        centred = y - mean
        variance = tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True)
        y = centred * tf.math.rsqrt(variance + epsilon) * tf.cast(scale, tf.float32) + tf.cast(offset, tf.float32)
        return tf.cast(y, x.dtype)

    def rms_norm(self, x, scale, epsilon: float):
        """x / sqrt(mean(x²) + epsilon) * scale over the last axis, computed in float32 (Zhang and Sennrich 2019)."""
        y = tf.cast(x, tf.float32)
        variance = tf.reduce_mean(tf.square(y), axis=-1, keepdims=True)
        return tf.cast(y * tf.math.rsqrt(variance + epsilon) * tf.cast(scale, tf.float32), x.dtype)


class OneDnn(Portable):
    """Fused internal ops. Products are `_MklNativeFusedMatMul`, of packed weights or of weights as they are.

    oneDNN packs weights once, at the first call, and keeps them (`is_filter_const`); in float32 for the number of rows
    that this call has. bfloat16 weights are packed but for a single row, and float32 weights only for 8 to 63 rows,
    whose first call then takes the memory of a second copy: `onednn_costs.OTHER_ROWS` has the times. A single row meets
    unpacked weights sooner where their rows are long; what is packed may come in either layout.

    Args:
        dtype: type of weights and activations.
        packed: whether weights are packed; default: what is best for most numbers of rows.
    """

    name = "onednn"
    _FUSED: ClassVar = {"relu": "Relu", "tanh": "Tanh", "gelu": "GeluExact", "gelu_approximate": "GeluApproximate"}

    def __init__(self, dtype: tf.DType = tf.float32, packed: bool | None = None):
        super().__init__(dtype)
        usual = dtype == tf.bfloat16
        self._packed = usual if packed is None else packed
        self._alternative = (*onednn_costs.OTHER_ROWS[dtype], OneDnn(dtype, not usual)) if packed is None else None

    @property
    def alternative(self) -> tuple[int, int, Portable] | None:
        return self._alternative

    def transposed(self, inputs: int, outputs: int) -> bool:
        return self.dtype == tf.bfloat16 and inputs > outputs

    def linear(self, x, kernel, bias=None, activation="linear"):
        native = self._packed or x.dtype == tf.bfloat16
        if bias is None and not native:
            return super().linear(x, kernel, None, activation)
        transposed = self._held_transposed(x, kernel)
        if bias is None:  # the native op must be given one
            bias = tf.zeros([kernel.shape[0 if transposed else 1]], x.dtype)
        fused = ["BiasAdd"]
        if activation in self._FUSED:
            fused.append(self._FUSED[activation])
            activation = "linear"
        attributes = {"transpose_a": False, "transpose_b": transposed, "fused_ops": fused, "num_args": 1}
        if native:
            attributes |= {"is_filter_const": self._packed, "_kernel": "MklNameChangeOp"}
        y = internal_op("_MklNativeFusedMatMul" if native else "_FusedMatMul", [x, kernel, bias], attributes)
        return activate(y, activation)

    def layer_norm(self, x, scale, offset, epsilon):
        return internal_op(
            "_MklLayerNorm", [x, tf.cast(scale, x.dtype), tf.cast(offset, x.dtype)], {"epsilon": epsilon}
        )


def kernels_for(target: str, dtype: tf.DType) -> Portable:
    """The kernels of a target for weights of a type.

    Raises:
        InputError: the target is unknown.
    """
    return (OneDnn if targets.check(target) == targets.ONEDNN else Portable)(dtype)


def internal_op(op: str, inputs: list[tf.Tensor], attributes: dict) -> tf.Tensor:
    """Adds one node that Python's own op builders refuse to make to the graph being traced; returns its first output.

    All inputs have one type, which becomes attribute `T`. A name is given, for the default one would begin with `_`.
    """
    tracing = tf.compat.v1.get_default_graph()
    inputs = [
        tracing.capture(tf.convert_to_tensor(value)) for value in inputs
    ]  # import_graph_def captures nothing itself
    graph = graph_pb2.GraphDef()
    names = [f"x{i}" for i in range(len(inputs))]
    for name, value in zip(names, inputs):
        placeholder = graph.node.add(name=name, op="Placeholder")
        placeholder.attr["dtype"].type = value.dtype.as_datatype_enum
    node = graph.node.add(name="y", op=op, input=names)
    node.attr["T"].type = inputs[0].dtype.as_datatype_enum
    for key, value in attributes.items():
        _set_attribute(node.attr[key], value)
    (result,) = tf.graph_util.import_graph_def(
        graph, input_map=dict(zip(names, inputs)), return_elements=["y:0"], name=op.lstrip("_")
    )
    return result


def _set_attribute(attribute, value) -> None:
    if isinstance(value, bool):
        attribute.b = value
    elif isinstance(value, int):
        attribute.i = value
    elif isinstance(value, float):
        attribute.f = value
    elif isinstance(value, str):
        attribute.s = value.encode()
    else:
        attribute.list.s.extend(item.encode() for item in value)
        if not value:
            attribute.list.SetInParent()

"""EinsumDense as one product of matrices while a model is trained: the same results, and fewer, larger products."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.models import zoo
from tfvllm.families.matmuls import einsum_as_matmul


def built(equation, output, shape, **options):
    keras.utils.set_random_seed(0)
    layer = keras.layers.EinsumDense(equation, output, **options)
    layer.build(shape)
    if layer.bias is not None:
        layer.bias.assign(keras.random.normal(layer.bias.shape))
    return layer


def ops_of(function, *args):
    return [op.type for op in function.get_concrete_function(*args).graph.get_operations()]


@pytest.mark.parametrize(
    ("equation", "output", "shape", "options"),
    [
        ("abc,cde->abde", (None, 3, 4), (2, 5, 6), {"bias_axes": "de"}),  # queries
        ("abcd,cde->abe", (None, 7), (2, 5, 3, 4), {"bias_axes": "e", "activation": "tanh"}),  # attention output
        ("ab,bc->ac", 3, (1, 4), {}),
        ("abc,cd->abd", (None, 4), (0, 5, 6), {}),  # an empty batch
    ],
)
def test_values_and_gradients_are_those_of_keras(equation, output, shape, options):
    layer = built(equation, output, shape, **options)
    model = keras.Sequential([layer])
    x = tf.constant(np.random.default_rng(0).normal(size=shape), tf.float32)
    eager = layer(x)

    @tf.function(input_signature=[tf.TensorSpec([None] * len(shape[:2]) + list(shape[2:]))])
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
            loss = tf.reduce_sum(y * y)
        return y, tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])

    expected = run(x)
    with einsum_as_matmul(model):
        flat = tf.function(run.python_function)
        found = flat(x)
    tf.nest.map_structure(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
    assert "Einsum" not in ops_of(flat, x) and "BatchMatMulV2" not in ops_of(flat, x)
    assert "call" not in vars(layer)  # Keras's own again
    np.testing.assert_array_equal(layer(x), eager)


@pytest.mark.parametrize(
    ("equation", "output", "shape"),
    [("abc,dc->abd", (None, 4), (2, 5, 6)), ("...b,bc->...c", (5, 4), (2, 5, 6)), ("abc,bcd->abd", (5, 4), (2, 5, 6))],
)
def test_other_equations_are_left_as_they_are(equation, output, shape):
    layer = built(equation, output, shape)
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    expected = layer(x)
    with einsum_as_matmul(keras.Sequential([layer])):
        assert "call" not in vars(layer)
        np.testing.assert_array_equal(layer(x), expected)


def test_mixed_precision_computes_in_bfloat16_as_keras_does():
    layer = built("abc,cde->abde", (None, 3, 4), (2, 5, 6), bias_axes="de", dtype="mixed_bfloat16")
    x = tf.random.normal((2, 5, 6))
    with einsum_as_matmul(keras.Sequential([layer])):
        found = layer(x)
    assert found.dtype == tf.bfloat16
    np.testing.assert_allclose(tf.cast(found, tf.float32), tf.cast(layer(x), tf.float32), rtol=0.02, atol=0.02)


def test_one_model_inside_another_call_and_under_xla():
    model, x = zoo.build("bert"), zoo.inputs("bert")
    expected = model(x)
    with einsum_as_matmul(model), einsum_as_matmul(model):
        np.testing.assert_allclose(model(x), expected, atol=1e-5)
        compiled = tf.function(lambda: model(x), jit_compile=True)
        np.testing.assert_allclose(compiled(), expected, atol=1e-5)
        symbolic = model({name: keras.Input(value.shape[1:], dtype=value.dtype) for name, value in x.items()})
        assert symbolic.shape[1:] == expected.shape[1:]
    assert not [layer for layer in model._flatten_layers() if "call" in vars(layer)]


def test_an_error_inside_leaves_the_layers_as_they_were():
    layer = built("ab,bc->ac", 3, (1, 4))
    with pytest.raises(RuntimeError), einsum_as_matmul(keras.Sequential([layer])):
        raise RuntimeError
    assert "call" not in vars(layer)

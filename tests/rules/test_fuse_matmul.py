import numpy as np
import pytest
import tensorflow as tf

from tests.rules.checks import check, f32, weight

BIAS = "FuseMatMulBias"


def dense(x, w, b, **kwargs):
    return tf.nn.bias_add(tf.matmul(x, w, **kwargs), b)


@pytest.mark.parametrize("rows", [None, 1, 7])
def test_bias(rows):
    w, b = weight(33, 17), weight(17)
    c = check(lambda x: dense(x, w, b), [f32(rows, 33)], BIAS, 1)
    (fused,) = c.ops("_FusedMatMul")
    assert fused.attr("fused_ops") == ["BiasAdd"]


def test_transposed_weight():
    w, b = weight(5, 8), weight(5)
    c = check(lambda x: dense(x, w, b, transpose_b=True), [f32(None, 8)], BIAS, 1)
    assert c.ops("_FusedMatMul")[0].attr("transpose_b")


def test_bias_declines():
    w, b = weight(8, 5), weight(5)
    check(lambda x: dense(x, w, b, transpose_a=True), [f32(8, 3)], BIAS, 0, reason="transposed")

    def shared(x):
        y = x @ w
        return tf.nn.bias_add(y, b), y

    check(shared, [f32(None, 8)], BIAS, 0, reason="read elsewhere")
    check(
        lambda x: dense(x, tf.cast(w, tf.float64), tf.cast(b, tf.float64)),
        [tf.TensorSpec([None, 8], tf.float64)],
        BIAS,
        0,
        reason="float64",
    )


@pytest.mark.parametrize("function", [tf.nn.relu, tf.nn.relu6, tf.nn.elu, tf.tanh, tf.sigmoid])
def test_activation(function):
    w, b = weight(9, 21), weight(21)
    large = np.linspace(-60, 60, 9 * 40).reshape(40, 9)
    c = check(
        lambda x: function(dense(x, w, b)),
        [f32(None, 9)],
        [BIAS, "FuseActivation"],
        {BIAS: 1, "FuseActivation": 1},
        finite_only=True,
        samples=[[large]],
    )
    assert len(c.ops("_FusedMatMul")) == 1 and not [n for n in c.ops() if n.op not in ("_FusedMatMul", "Identity")]


def test_activation_declines():
    w, b = weight(9, 5), weight(5)

    def both(x):
        y = dense(x, w, b)
        return tf.nn.relu(y), y

    check(both, [f32(None, 9)], ["FuseActivation", BIAS], {"FuseActivation": 0}, reason="read elsewhere")
    check(lambda x: tf.nn.relu(x), [f32(None, 9)], "FuseActivation", 0)
    check(
        lambda x: tf.nn.relu(tf.nn.relu6(dense(x, w, b))),
        [f32(None, 9)],
        ["FuseActivation", BIAS],
        {"FuseActivation": 1},
        reason="fused already",
        finite_only=True,
    )


def erfc_gelu(y):
    return 0.5 * y * tf.math.erfc(-y * 0.7071067811865476)


@pytest.mark.parametrize(
    "gelu",
    [
        lambda y: tf.nn.gelu(y, approximate=True),
        lambda y: tf.nn.gelu(y, approximate=False),
        lambda y: y * (0.5 * (1.0 + tf.math.erf(y * 0.70710678))),
        lambda y: y * (1.0 + tf.math.erf(y / 1.41421356)) * 0.5,
        lambda y: 0.5 * y * (1.0 + tf.tanh(0.7978845608 * (y + 0.044715 * (y * tf.square(y))))),
        erfc_gelu,
        lambda y: 0.5 * y * tf.math.erfc(-y / 1.4142135623730951),
    ],
)
def test_gelu(gelu):
    w, b = weight(9, 21), weight(21)
    c = check(
        lambda x: gelu(dense(x, w, b)),
        [f32(None, 9)],
        [BIAS, "FuseGelu"],
        {BIAS: 1, "FuseGelu": 1},
        finite_only=True,
        samples=[[np.linspace(-20, 20, 360).reshape(40, 9)]],
    )
    assert len([n for n in c.ops() if n.op != "Identity"]) == 1


def test_what_is_almost_gelu_stays():
    w, b = weight(9, 21), weight(21)
    almost = [
        lambda y: 0.5 * y * (1.0 + tf.math.erf(y * 0.70)),
        lambda y: 0.5 * y * (1.01 + tf.math.erf(y * 0.70710678)),
        lambda y: 0.5 * y * (1.0 + tf.tanh(0.7978845608 * (y + 0.05 * y**3))),
        lambda y: 0.5 * y * tf.math.erfc(y * 0.70710678),
    ]
    for function in almost:
        check(
            lambda x, f=function: f(dense(x, w, b)),
            [f32(None, 9)],
            [BIAS, "FuseGelu"],
            {BIAS: 1, "FuseGelu": 0},
            special=False,
        )


def test_residual():
    w, b = weight(9, 5), weight(5)
    check(
        lambda x, r: r + dense(x, w, b),
        [f32(None, 9), f32(None, 5, name="r")],
        [BIAS, "FuseResidual"],
        {BIAS: 1, "FuseResidual": 0},
        reason="cannot be proved equal",
        samples=[[np.ones((3, 9)), np.ones((1, 5))]],
    )
    c = check(
        lambda x: tf.nn.relu(x)[:, :5] + dense(x, w, b),
        [f32(None, 9)],
        [BIAS, "FuseResidual"],
        {BIAS: 1, "FuseResidual": 1},
    )
    assert c.ops("_FusedMatMul")[0].attr("fused_ops") == ["BiasAdd", "Add"]

import pytest
import tensorflow as tf

from tests.rules.checks import check, f32, weight


def conv(x, w, b, **kwargs):
    return tf.nn.bias_add(tf.nn.conv2d(x, w, kwargs.pop("strides", 1), kwargs.pop("padding", "SAME"), **kwargs), b)


def depthwise(x, w, b, stride=1, padding="SAME"):
    return tf.nn.bias_add(tf.nn.depthwise_conv2d(x, w, [1, stride, stride, 1], padding), b)


@pytest.mark.parametrize("kwargs", [{}, {"strides": 2, "padding": "VALID"}, {"dilations": 2}])
def test_convolution(kwargs):
    w, b = weight(3, 3, 5, 7), weight(7)
    c = check(lambda x: conv(x, w, b, **kwargs), [f32(None, 9, 8, 5)], "FuseConvBias", 1, special=False)
    assert c.ops("_FusedConv2D")[0].attr("fused_ops") == ["BiasAdd"]


@pytest.mark.parametrize("activation", [tf.nn.relu, tf.nn.relu6, tf.nn.elu])
@pytest.mark.parametrize("layer, bias", [(conv, "FuseConvBias"), (depthwise, "FuseDepthwiseBias")])
def test_activation(activation, layer, bias):
    w, b = (weight(3, 3, 5, 7), weight(7)) if layer is conv else (weight(3, 3, 5, 1), weight(5))
    c = check(
        lambda x: activation(layer(x, w, b)),
        [f32(None, 9, 8, 5)],
        [bias, "FuseConvActivation"],
        {bias: 1, "FuseConvActivation": 1},
        special=False,
    )
    assert len([n for n in c.ops() if n.op != "Identity"]) == 1


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise(stride):
    w, b = weight(3, 3, 6, 1), weight(6)
    check(lambda x: depthwise(x, w, b, stride, "VALID"), [f32(None, 9, 8, 6)], "FuseDepthwiseBias", 1, special=False)


def test_declines():
    w, b = weight(3, 3, 5, 7), weight(7)

    def shared(x):
        y = tf.nn.conv2d(x, w, 1, "SAME")
        return tf.nn.bias_add(y, b), y

    check(shared, [f32(None, 9, 8, 5)], "FuseConvBias", 0, reason="read elsewhere", special=False)
    explicit = [[0, 0], [1, 1], [1, 1], [0, 0]]
    check(
        lambda x: conv(x, w, b, padding=explicit),
        [f32(None, 9, 8, 5)],
        "FuseConvBias",
        0,
        reason="explicit",
        special=False,
    )

    def activated_twice(x):
        y = conv(x, w, b)
        return tf.nn.relu(y), y

    check(
        activated_twice,
        [f32(None, 9, 8, 5)],
        ["FuseConvBias", "FuseConvActivation"],
        {"FuseConvActivation": 0},
        reason="read elsewhere",
        special=False,
    )


def test_residual():
    w, b = weight(3, 3, 5, 5), weight(5)
    rules = ["FuseConvBias", "FuseConvActivation", "FuseConvResidual"]
    counts = {"FuseConvBias": 1, "FuseConvResidual": 1, "FuseConvActivation": 0}
    specs = [f32(None, 9, 8, 5)]
    c = check(lambda x: tf.tanh(x) + conv(x, w, b), specs, rules, counts, special=False)
    assert c.ops("_FusedConv2D")[0].attr("fused_ops") == ["BiasAdd", "Add"]
    counts["FuseConvActivation"] = 1
    c = check(lambda x: tf.nn.relu(conv(x, w, b) + tf.tanh(x)), specs, rules, counts, special=False)
    assert c.ops("_FusedConv2D")[0].attr("fused_ops") == ["BiasAdd", "Add", "Relu"]


def test_residual_declines():
    w, b = weight(3, 3, 5, 5), weight(5)
    rules = ["FuseConvBias", "FuseConvActivation", "FuseConvResidual"]
    none = {"FuseConvBias": 1, "FuseConvResidual": 0}
    specs = [f32(None, 9, 8, 5)]
    wide = {"reason": "cannot be proved equal", "special": False}
    check(lambda x: conv(x, w, b) + tf.reduce_max(x, [1, 2], keepdims=True), specs, rules, none, **wide)
    apart = {"reason": "something fused already", "special": False}
    check(lambda x: tf.nn.relu(conv(x, w, b)) + x, specs, rules, none, **apart)
    elu = {"FuseConvResidual": 1, "FuseConvActivation": 0}
    check(lambda x: tf.nn.elu(conv(x, w, b) + x), specs, rules, elu, reason="another activation", special=False)

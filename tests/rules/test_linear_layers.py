import pytest
import tensorflow as tf

from tests.rules.checks import check, f32, weight

SCALE = "ScaleIntoWeights"


def test_matmul_with_a_factor_for_each_output():
    w, b, c = weight(6, 5), weight(5), weight(5)
    check(lambda x: tf.nn.bias_add(x @ w, b) * c, [f32(None, 6)], SCALE, 1)
    wt = weight(5, 6)
    result = check(lambda x: c * tf.matmul(x, wt, transpose_b=True), [f32(None, 6)], SCALE, 1)
    assert result.ops("MatMul")[0].attr("transpose_b")


@pytest.mark.parametrize("strides, padding", [(1, "SAME"), (2, "VALID")])
def test_convolution_and_depthwise(strides, padding):
    w, b, c = weight(3, 3, 4, 5), weight(5), weight(1, 1, 1, 5)
    check(
        lambda x: tf.nn.bias_add(tf.nn.conv2d(x, w, strides, padding), b) * c,
        [f32(None, 7, 9, 4)],
        SCALE,
        1,
        special=False,
    )
    d, e = weight(3, 3, 4, 2), weight(8)
    check(
        lambda x: tf.nn.depthwise_conv2d(x, d, [1, strides, strides, 1], padding) * e,
        [f32(None, 7, 9, 4)],
        SCALE,
        1,
        special=False,
    )


def test_scale_declines():
    w, c = weight(6, 5), weight(5)
    check(lambda x, c: x @ w * c, [f32(None, 6), f32(5, name="c")], SCALE, 0)

    def shared(x):
        y = x @ w
        return y * c, y

    check(shared, [f32(None, 6)], SCALE, 0, reason="read elsewhere")
    column, matrix = weight(4, 1), weight(4, 5)
    check(lambda x: x @ w * column, [f32(4, 6)], SCALE, 0, reason="for each output channel")
    check(lambda x: x @ w * matrix, [f32(4, 6)], SCALE, 0, reason="for each output channel")
    check(lambda x: x @ w * matrix, [f32(1, 6)], SCALE, 0, reason="for each output channel")


def test_term_to_bias():
    w, b = weight(3, 3, 4, 5), weight(5)
    c = check(lambda x: tf.nn.conv2d(x, w, 1, "SAME") + b, [f32(None, 6, 6, 4)], "TermToBias", 1, special=False)
    assert len(c.ops("BiasAdd")) == 1
    m, square = weight(6, 5), weight(5, 5)
    check(lambda x: b + x @ m, [f32(None, 6)], "TermToBias", 1)
    check(lambda x: x @ m + square, [f32(5, 6)], "TermToBias", 0, reason="for each output channel")
    one = weight(5, 1)
    check(lambda x: x @ m + one, [f32(5, 6)], "TermToBias", 0, reason="last axis")


def test_batch_normalisation_of_legacy_keras():
    gamma, beta, mean, variance = weight(4), weight(4, seed=1), weight(4, seed=2), tf.Variable([0.1, 1.0, 20.0, 1e-4])

    def f(x):
        return tf.raw_ops.FusedBatchNormV3(
            x=x, scale=gamma, offset=beta, mean=mean, variance=variance, epsilon=1e-3, is_training=False
        )[0]

    check(f, [f32(None, 5, 5, 4)], "BatchNormToAffine", 1, finite_only=True)


def test_training_mode_stays():
    gamma, beta, mean, variance = weight(4), weight(4), tf.Variable([]), tf.Variable([])

    def f(x):
        return tf.raw_ops.FusedBatchNormV3(
            x=x, scale=gamma, offset=beta, mean=mean, variance=variance, epsilon=1e-3, is_training=True
        )[0]

    check(f, [f32(None, 5, 5, 4)], "BatchNormToAffine", 0, reason="training mode", special=False)


def test_convolution_batchnorm_and_bias_fold_completely():
    w, b, gamma, beta, mean = weight(3, 3, 4, 5), weight(5), weight(5), weight(5, seed=1), weight(5, seed=2)
    variance = tf.Variable([0.1, 1.0, 20.0, 1e-4, 0.0])

    def f(x):
        y = tf.nn.bias_add(tf.nn.conv2d(x, w, 1, "SAME"), b)
        return tf.nn.relu(tf.nn.batch_normalization(y, mean, variance, beta, gamma, 1e-3))

    rules = [SCALE, "TermToBias", "JoinTerms", "FoldWeights", "DropIdentities"]
    c = check(f, [f32(None, 6, 7, 4)], rules, {SCALE: 1, "JoinTerms": 1}, special=False)
    assert [n.op for n in c.ops()] == ["Conv2D", "BiasAdd", "Relu"]


def test_two_layers_become_one():
    a, u, b, v = weight(8, 6), weight(6), weight(6, 4), weight(4)
    c = check(
        lambda x: tf.nn.bias_add(tf.nn.bias_add(x @ a, u) @ b, v), [f32(None, 8)], "JoinLinearLayers", 1, special=False
    )
    assert len([p for p in c.ops("MatMul") if not c.graph.is_static(p.output)]) == 1
    at, bt = weight(6, 8), weight(4, 6)
    check(
        lambda x: tf.matmul(tf.matmul(x, at, transpose_b=True), bt, transpose_b=True),
        [f32(None, 8)],
        "JoinLinearLayers",
        1,
        special=False,
    )


def test_a_bottleneck_stays():
    down, up = weight(64, 2), weight(2, 64)
    check(lambda x: (x @ down) @ up, [f32(None, 64)], "JoinLinearLayers", 0, reason="more work", special=False)


def test_layers_with_something_between_stay():
    a, b = weight(8, 6), weight(6, 4)
    check(lambda x: tf.nn.relu(x @ a) @ b, [f32(None, 8)], "JoinLinearLayers", 0)

    def shared(x):
        y = x @ a
        return y @ b, y

    check(shared, [f32(None, 8)], "JoinLinearLayers", 0, reason="read elsewhere")
    check(lambda x, b: (x @ a) @ b, [f32(None, 8), f32(6, 4, name="b")], "JoinLinearLayers", 0)

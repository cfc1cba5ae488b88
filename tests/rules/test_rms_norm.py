import numpy as np
import tensorflow as tf

from tests.rules.checks import check, f32, weight
from tests.rules.test_layer_norm import keras_form, sub_form

GAMMA, CENTRE = "GammaIntoWeights", "CentreLayerNorm"


def rms(x, gamma, epsilon=1e-6):
    return x * tf.math.rsqrt(tf.reduce_mean(tf.square(x), -1, keepdims=True) + epsilon) * gamma


def test_the_gain_moves_into_every_product():
    gamma, q, k = weight(8), weight(8, 5), weight(3, 8)

    def f(x):
        y = tf.reshape(rms(x, gamma), [-1, 8])
        return y @ q, tf.matmul(y, k, transpose_b=True)

    c = check(f, [f32(None, None, 8)], GAMMA, 1, special=False)
    assert all(c.graph.is_static(p.inputs[1]) for p in c.ops("MatMul"))
    computed = [n for n in c.ops("Mul") if not c.graph.is_static(n.output)]
    assert len(computed) == 1


def test_gemmas_gain_is_one_more():
    gamma, w = weight(8), weight(8, 5)
    check(lambda x: rms(x, 1.0 + gamma) @ w, [f32(None, 8)], GAMMA, 1, special=False)


def test_a_gain_that_others_need_stays():
    gamma, w = weight(8), weight(8, 5)

    def f(x):
        y = rms(x, gamma)
        return y @ w, tf.nn.relu(y)

    check(f, [f32(None, 8)], GAMMA, 0, reason="Relu reads the scaled rows", special=False)
    check(
        lambda x, w: rms(x, gamma) @ w,
        [f32(None, 8), f32(8, 3, name="w")],
        GAMMA,
        0,
        reason="not a weight",
        special=False,
    )
    check(lambda x: tf.matmul(rms(x, gamma), rms(x, gamma), transpose_b=True), [f32(None, 8)], GAMMA, 0, special=False)
    result = check(lambda x: rms(x, gamma), [f32(None, 8)], GAMMA, 0, special=False)
    assert result.ops("Mul")
    table = weight(8, 9000)
    check(
        lambda x: (rms(x, gamma) @ table, tf.gather(table, [1], axis=1)),
        [f32(None, 8)],
        GAMMA,
        0,
        reason="stored twice",
        special=False,
    )


def test_layer_norm_in_fewer_passes():
    gamma, beta = weight(16), weight(16, seed=1)
    rows = np.random.default_rng(0).normal(100.0, 1e-2, (3, 2, 16))
    for form in (keras_form, sub_form):
        c = check(
            lambda x, f=form: f(x, gamma, beta, 1e-12),
            [f32(None, None, 16)],
            CENTRE,
            1,
            special=False,
            samples=[[rows]],
        )
        full = [n for n in c.ops() if n.output.shape == c.graph.inputs["x"].shape and n.op != "Identity"]
        assert sorted(n.op for n in full) == ["AddV2", "Mul", "Mul", "SquaredDifference", "Sub"]
    assert c.rewriter.target == "portable"


def test_centre_declines():
    beta = weight(16)
    check(
        lambda x, g: keras_form(x, g, beta),
        [f32(None, 16), f32(16, name="g")],
        CENTRE,
        0,
        reason="run time",
        special=False,
    )

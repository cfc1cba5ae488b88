import tensorflow as tf

from tests.rules.checks import check, f32, weight

RULE = "FoldScale"


def test_the_factor_moves_into_weight_and_bias():
    w, b = weight(8, 5), weight(5)
    c = check(lambda x: tf.nn.bias_add(x @ w, b) * 0.125, [f32(None, 8)], RULE, 1)
    assert c.graph.live()[-1].op in ("BiasAdd", "Identity")
    c = check(lambda x: 3.0 * tf.matmul(x, w, transpose_a=True), [f32(8, 3)], RULE, 1, special=False)
    (product,) = c.ops("MatMul")
    assert product.attr("transpose_a")


def test_a_product_that_others_read_keeps_its_scale():
    w = weight(8, 5)

    def f(x):
        y = x @ w
        return y * 0.5, y

    c = check(f, [f32(None, 8)], RULE, 0, reason="read elsewhere")
    assert len(c.ops("Mul")) == 1


def test_computed_weights_and_vectors_decline():
    check(lambda x, w: x @ w * 0.5, [f32(None, 4), f32(4, 3, name="w")], RULE, 0, reason="at run time")
    w = weight(4, 3)
    check(lambda x: x @ w * tf.constant([1.0, 2.0, 3.0]), [f32(None, 4)], RULE, 0, reason="not one number")


def test_a_weight_that_others_read_is_not_copied():
    table = weight(700, 512)  # larger than what may be added

    def f(x):
        return x @ table * 0.5, tf.gather(table, [1, 2])

    check(f, [f32(None, 700)], RULE, 0, reason="stored twice")

import tensorflow as tf

from tests.rules.checks import check, f32, weight

RULE = "MergeParallelMatMuls"


def test_query_key_value():
    q, k, v = (weight(8, 4, seed=s) for s in range(3))
    a, b, d = (weight(4, seed=s) for s in range(3))

    def f(x):
        return [tf.nn.bias_add(x @ w, c) for w, c in ((q, a), (k, b), (v, d))]

    c = check(f, [f32(None, 8)], RULE, 1)
    assert len(c.ops("MatMul")) == 1 and len(c.ops("BiasAdd")) == 1 and len(c.ops("Split")) == 1


def test_unlike_widths_and_transposed_weights():
    gate, up = weight(5, 8), weight(3, 8)
    c = check(
        lambda x: [tf.matmul(x, gate, transpose_b=True), tf.nn.relu(tf.matmul(x, up, transpose_b=True))],
        [f32(None, 8)],
        RULE,
        1,
    )
    (product,) = c.ops("MatMul")
    assert product.attr("transpose_b") and product.output.shape[1] == 8
    assert len(c.ops("SplitV")) == 1


def test_with_and_without_bias_do_not_mix():
    q, k, v, a, b = weight(8, 4), weight(8, 4, seed=1), weight(8, 4, seed=2), weight(4), weight(4, seed=1)

    def f(x):
        return tf.nn.bias_add(x @ q, a), tf.nn.bias_add(x @ k, b), tf.nn.relu(x @ v)

    c = check(f, [f32(None, 8)], RULE, 1)
    assert len(c.ops("MatMul")) == 2


def test_declines():
    w, u, wide = weight(8, 4), weight(8, 3), weight(400, 200)
    check(lambda x, y: (x @ y, x @ w), [f32(None, 8), f32(8, 3, name="y")], RULE, 0, reason="not a weight")
    check(lambda x: (x @ w, tf.nn.relu(x) @ u), [f32(None, 8)], RULE, 0)
    table = weight(400, 300)

    def tied(x):
        return x @ table, x @ wide, tf.gather(table, [1])

    check(tied, [f32(None, 400)], RULE, 0, reason="stored twice")


def test_a_product_that_others_read_stays_readable():
    q, k, a = weight(8, 4), weight(8, 4, seed=1), weight(4)

    def f(x):
        y = x @ q
        return y, tf.nn.bias_add(y, a), x @ k

    c = check(f, [f32(None, 8)], RULE, 1)
    assert len(c.ops("MatMul")) == 1 and len(c.ops("BiasAdd")) == 1


def test_products_of_weights_are_left_to_folding():
    a, b = weight(8, 8), weight(8, 8, seed=1)

    def f(x):
        ab = a @ b
        return x @ (a @ ab), x @ ab

    c = check(f, [f32(None, 8)], [RULE, "FoldWeights", "DeleteDead"], {RULE: 1, "FoldWeights": 1})
    assert len(c.ops("MatMul")) == 1

import tensorflow as tf

from tests.rules.checks import check, f32

LEFT, RIGHT, WHOLE = "FoldTransposeLeft", "FoldTransposeRight", "TransposedProduct"


def test_right_operand():
    c = check(lambda x, y: x @ tf.transpose(y, [0, 2, 3, 1]), [f32(2, 3, 5, 4), f32(2, 7, 3, 4, name="y")], RIGHT, 1)
    (product,) = c.ops("BatchMatMulV2")
    assert product.attr("adj_y") and c.ops("Transpose")[0].inputs[1].known_value == (0, 2, 1, 3)


def test_left_operand_and_flags_toggle():
    c = check(lambda x: tf.transpose(x, [0, 2, 1]) @ x, [f32(None, 5, 4)], [LEFT, "DropIdentities"], {LEFT: 1})
    assert c.ops("BatchMatMulV2")[0].attr("adj_x") and not c.ops("Transpose")


def test_a_transpose_in_memory_order_stays():
    c = check(
        lambda x, y: x @ tf.transpose(y, [0, 2, 1, 3]),
        [f32(2, 3, 5, 4), f32(2, 4, 3, 7, name="y")],
        RIGHT,
        0,
        reason="keeps the order",
    )
    assert len(c.ops("Transpose")) == 1


def test_complex_products_conjugate():
    spec = tf.TensorSpec([2, 3, 3], tf.complex64, "x")
    check(lambda x: x @ tf.transpose(x, [0, 2, 1]), [spec], RIGHT, 0, reason="conjugate", generated=False)
    check(lambda x: tf.transpose(x @ x, [0, 2, 1]), [spec], WHOLE, 0, reason="conjugate", generated=False)


def test_transposed_product():
    c = check(
        lambda x, y: tf.transpose(tf.matmul(x, y, transpose_b=True), [0, 2, 1]),
        [f32(2, 5, 4), f32(2, 3, 4, name="y")],
        WHOLE,
        1,
    )
    (product,) = c.ops("BatchMatMulV2")
    assert not product.attr("adj_x") and product.attr("adj_y") and not c.ops("Transpose")


def test_transposed_product_declines():
    spec = [f32(2, 3, 5, 4)]
    check(
        lambda x: tf.transpose(tf.matmul(x, x, transpose_b=True), [0, 2, 1, 3]), spec, WHOLE, 0, reason="more than swap"
    )

    def shared(x):
        y = tf.matmul(x, x, transpose_b=True)
        return tf.transpose(y, [0, 1, 3, 2]), tf.nn.relu(y)

    check(shared, spec, WHOLE, 0, reason="read elsewhere")

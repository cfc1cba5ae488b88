import tensorflow as tf

from tests.rules.checks import check, f32, weight

RULE = "HoistSlices"


def test_only_the_demanded_row_is_multiplied():
    w, b = weight(8, 8), weight(8)

    def f(x):
        y = tf.reshape(tf.reshape(x, [-1, 8]) @ w, tf.shape(x))
        return tf.nn.gelu(tf.nn.bias_add(y, b))[:, 2, :]

    c = check(f, [f32(None, None, 8)], RULE, 1, samples=[[_rows(2, 3)], [_rows(4, 9)]], generated=False)
    (product,) = c.ops("MatMul")
    assert product.inputs[0].shape[0] == c.graph.inputs["x"].shape[0]  # one row in each sequence


def _rows(batch, length):
    return tf.random.stateless_normal([batch, length, 8], [batch, length]).numpy()


def test_through_residuals_norms_and_attention():
    q, k, v, o = (weight(8, 8, seed=s) for s in range(4))

    def heads(x, w):
        y = tf.reshape(tf.reshape(x, [-1, 8]) @ w, [tf.shape(x)[0], tf.shape(x)[1], 2, 4])
        return tf.transpose(y, [0, 2, 1, 3])

    def f(x):
        scores = tf.matmul(heads(x, q), heads(x, k), transpose_b=True)
        mixed = tf.transpose(tf.matmul(tf.nn.softmax(scores), heads(x, v)), [0, 2, 1, 3])
        y = tf.reshape(tf.reshape(mixed, [-1, 8]) @ o, tf.shape(x)) + x
        mean, variance = tf.nn.moments(y, -1, keepdims=True)
        return ((y - mean) * tf.math.rsqrt(variance + 1e-6))[:, 0]

    c = check(f, [f32(None, None, 8)], RULE, 1)
    sizes = [p.inputs[0].shape[0] for p in c.ops("MatMul")]
    batch = c.graph.inputs["x"].shape[0]
    assert sizes.count(batch) == 2  # the query and the output; key and value need every row


def test_what_is_read_whole_stays_whole():
    w = weight(8, 8)

    def f(x):
        y = tf.reshape(tf.reshape(x, [-1, 8]) @ w, tf.shape(x))
        return y[:, 0], tf.reduce_max(y, 1)

    check(f, [f32(None, None, 8)], RULE, 0, special=False)


def test_a_slice_that_saves_no_product_stays():
    check(lambda x: tf.nn.relu(x)[:, 0], [f32(None, None, 8)], RULE, 0)


def test_sums_over_the_sliced_axis_stop_it():
    w = weight(8, 8)

    def f(x):
        y = tf.reshape(tf.reshape(x, [-1, 8]) @ w, tf.shape(x))
        return tf.nn.softmax(y, axis=1)[:, 0]

    c = check(f, [f32(None, None, 8)], RULE, 0, special=False)
    assert len(c.ops("MatMul")) == 1


def test_a_value_of_unknown_rank_is_left_whole():
    w = weight(8, 2, 4)
    specs = [tf.TensorSpec([], tf.int32), tf.TensorSpec(None)]
    cond = tf.function(lambda i, y: i < 2).get_concrete_function(*specs)
    body = tf.function(lambda i, y: (i + 1, tf.tanh(y))).get_concrete_function(*specs)

    def f(x):
        looped = tf.raw_ops.StatelessWhile(input=[tf.constant(0), x], cond=cond, body=body)[1]
        return tf.raw_ops.Einsum(inputs=[looped, w], equation="abc,cde->abde")[:, 0]

    check(f, [f32(None, None, 8)], RULE, None, special=False)


def test_one_head_of_attention_is_computed_alone():
    q, k = weight(8, 3, 4, seed=0), weight(8, 3, 4, seed=1)

    def f(x):
        heads = (tf.einsum("bsd,dhk->bhsk", x, w) for w in (q, k))
        return tf.raw_ops.Einsum(inputs=[*heads], equation="bhqk,bhsk->bhqs")[:, 1]

    c = check(f, [f32(None, None, 8)], RULE, 1, special=False)
    scores = next(n for n in c.ops("Einsum") if n.output.rank == 4 and not c.graph.is_static(n.inputs[1]))
    assert [v.shape[1] for v in scores.inputs] == [1, 1]


def test_columns_of_a_product_are_not_cut_apart():
    w = weight(8, 6)
    check(lambda x: (x @ w)[:, 2], [f32(None, 8)], RULE, 0)

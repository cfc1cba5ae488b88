import tensorflow as tf

from tests.rules.checks import check, f32, weight

RULE = "MergeDuplicates"


def test_equal_expressions_become_one():
    c = check(lambda x: tf.exp(x) * 2.0 + tf.exp(x), [f32(None, 3)], RULE, 1)
    assert len(c.ops("Exp")) == 1


def test_commuted_operands_are_equal():
    c = check(lambda x, y: (x + y) * (y + x), [f32(None), f32(None, name="y")], RULE, 1)
    assert len(c.ops("AddV2")) == 1
    c = check(lambda x, y: (x - y) * (y - x), [f32(None), f32(None, name="y")], RULE, 0)
    assert len(c.ops("Sub")) == 2


def test_attributes_tell_apart():
    check(lambda x: x @ tf.transpose(x) + tf.matmul(x, x, transpose_b=True), [f32(3, 3)], RULE, 0)
    check(lambda x: (tf.cast(x, tf.float64), tf.cast(x, tf.int32)), [f32(3)], RULE, 0, special=False)


def test_reads_of_one_weight_become_one():
    w = weight(3, 3)
    c = check(lambda x: (x @ w) @ w, [f32(None, 3)], RULE, None)
    assert len(c.ops("MatMul")) == 2
    assert sum(n.op == "ReadVariableOp" for n in c.graph.live()) == 1


def test_reads_around_an_assignment_stay_apart():
    w = weight(3)

    def f(x):
        first = x + w
        w.assign_add(tf.ones([3]))
        return first, x + w

    c = check(f, [f32(None, 3)], RULE, None, samples=[], generated=False)
    assert sum(n.op == "ReadVariableOp" for n in c.graph.live()) == 2


def test_random_numbers_stay_apart():
    c = check(
        lambda x: (x + tf.random.uniform([3]), x + tf.random.uniform([3])),
        [f32(None, 3)],
        RULE,
        None,
        samples=[],
        generated=False,
    )
    assert len(c.ops("RandomUniform")) == 2


def test_nan_constants_and_signed_zeros_stay_apart():
    c = check(lambda x: (x / tf.constant(0.0), x / tf.constant(-0.0)), [f32(None)], RULE, None)
    assert len(c.ops("RealDiv")) == 2


def test_sizes_that_are_provably_equal():
    def f(x):
        y = tf.nn.relu(x)
        return tf.reshape(y, [tf.shape(y)[0], -1]), tf.reshape(x, [tf.shape(x)[0], -1])

    c = check(f, [f32(None, 2, 3)], RULE, None)
    assert len(c.ops("Shape")) == 1

import tensorflow as tf

from tests.rules.checks import check, f32


def test_what_nobody_reads_goes():
    def f(x):
        tf.linalg.matmul(tf.exp(x), x, transpose_b=True)
        return tf.nn.relu(x)

    c = check(f, [f32(None, 3)], "DeleteDead", 0)
    assert {n.op for n in c.graph.nodes.values()} <= {"Placeholder", "Relu", "Identity"}
    assert c.rewriter.removed_dead >= 2


def test_effects_and_unused_arguments_stay():
    counter = tf.Variable(0.0)

    def f(x, unused):
        counter.assign_add(1.0)
        return x * 2.0

    c = check(f, [f32(None, 3), f32(None, name="unused")], "DeleteDead", 0)
    assert len(c.ops("AssignAddVariableOp")) == 1
    assert len(c.graph.inputs) == 2
    assert counter.numpy() > 1.0  # the rewritten function counts too

import numpy as np
import tensorflow as tf

from tests.rules.checks import check, f32, weight

RULE = "FoldWeights"


def test_expressions_of_weights_become_one_weight():
    a, b = weight(4, 3), weight(4, 2)
    c = check(lambda x: x @ tf.concat([a, b * 2.0], 1), [f32(None, 4)], RULE, 1)
    assert not c.ops("ConcatV2") and not c.ops("Mul")
    (folded,) = [v for v in c.graph.captures.values() if tuple(v.owner.shape) == (4, 5)]
    np.testing.assert_array_equal(folded.owner.numpy(), np.concatenate([a.numpy(), b.numpy() * 2], 1))


def test_the_same_expression_is_stored_once():
    a = weight(4, 4)
    c = check(lambda x: (x + tf.transpose(a), tf.nn.relu(x) * tf.transpose(a)), [f32(4, 4)], RULE, 2)
    owners = {id(c.graph.captures[n.inputs[0].node.name].owner) for n in c.graph.live() if n.op == "ReadVariableOp"}
    assert len(owners) == 1


def test_the_model_does_not_grow():
    table = weight(1000, 300)

    def f(x):
        return x @ tf.transpose(table), tf.gather(table, [3])

    c = check(f, [f32(None, 300)], RULE, 0, reason="kept beside its sources")
    assert c.ops("Transpose")


def test_assigned_variables_do_not_fold():
    a, count = weight(3, 3), tf.Variable(0.0)

    def f(x):
        product = x @ tf.transpose(a)
        count.assign_add(1.0)
        with tf.control_dependencies([a.assign(a * 1.0)]):
            return product + 0.0

    check(f, [f32(None, 3)], RULE, 0)


def test_nothing_of_the_input_folds():
    a = weight(3)
    check(lambda x: x + a, [f32(None, 3)], RULE, 0)

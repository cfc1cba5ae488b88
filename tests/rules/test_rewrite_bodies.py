import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.rules.checks import check, f32, weight
from tfvllm.graph import loading

RULES = ["RewriteBodies", "Signs", "MergeDuplicates", "DeleteDead", "DropIdentities", "FactorOut"]


def _wasteful(x):
    return x * 0.5 - (-tf.tanh(x) * 0.5) + tf.tanh(x) * 0.0


def _body_ops(graph, op):
    (node,) = [n for n in graph.live() if n.op.removeprefix("Stateless") in ("While", "If", "Case")]
    names = {f.name for a in node.attrs.values() for f in [a.func, *a.list.func] if f.name}
    return [n.op for name in names for n in graph.library[name].node_def if n.op == op]


def test_while():
    w = weight(3, 3)

    def f(x):
        def body(i, y):
            return i + 1, _wasteful(y) @ w

        return tf.while_loop(lambda i, y: i + 0 < 4, body, [tf.constant(0), x])[1]

    c = check(f, [f32(None, 3)], RULES, {"RewriteBodies": 1}, special=False)
    assert len(_body_ops(c.before, "Tanh")) == 2 and len(_body_ops(c.graph, "Tanh")) == 1
    assert not _body_ops(c.graph, "Neg")


def test_if_and_case():
    def f(x):
        return tf.cond(tf.reduce_sum(x) > 0.0, lambda: _wasteful(x), lambda: x - -x)

    c = check(f, [f32(None, 3)], RULES, {"RewriteBodies": 1}, special=False, samples=[[-np.ones((2, 3))]])
    assert not _body_ops(c.graph, "Neg")

    def g(x, i):
        return tf.switch_case(i, [lambda: _wasteful(x), lambda: x, lambda: x + -x])

    specs = [f32(None, 3), tf.TensorSpec([], tf.int32, "i")]
    samples = [[np.ones((2, 3)) * 3, i] for i in range(3)]
    check(g, specs, RULES, {"RewriteBodies": 1}, special=False, samples=samples)


def test_nested_loops():
    def f(x):
        def inner(j, y):
            return j + 1, _wasteful(y)

        def outer(i, y):
            return i + 1, tf.while_loop(lambda j, y: j < 2, inner, [0, y])[1] - -y

        return tf.while_loop(lambda i, y: i < 3, outer, [0, x])[1]

    check(f, [f32(None, 3)], RULES, {"RewriteBodies": 1}, special=False)


def test_effects_inside_a_body_stay():
    count = tf.Variable(0.0)

    def f(x):
        def body(i, y):
            count.assign_add(1.0)
            return i + 1, _wasteful(y)

        return tf.while_loop(lambda i, y: i < 4, body, [0, x])[1]

    check(f, [f32(2, 3)], RULES, {"RewriteBodies": 1}, special=False)
    assert count.numpy() % 4 == 0 and count.numpy() > 4


def test_nothing_to_do_leaves_the_loop_alone():
    def f(x):
        return tf.while_loop(lambda i, y: i < 4, lambda i, y: (i + 1, tf.tanh(y)), [0, x])[1]

    c = check(f, [f32(None, 3)], ["RewriteBodies", "Signs"], {"RewriteBodies": 0}, special=False)
    assert c.graph.library.keys() == c.before.library.keys()


@pytest.mark.parametrize("target", ["portable", "onednn"])
def test_in_a_saved_model(tmp_path, target):
    w = weight(3, 3)
    module = tf.Module()
    module.w = w

    @tf.function(input_signature=[f32(None, 3)])
    def f(x):
        return {"y": tf.while_loop(lambda i, y: i < 4, lambda i, y: (i + 1, _wasteful(y) @ w), [0, x])[1]}

    tf.saved_model.save(module, str(tmp_path / "a"), signatures=f)
    report = tfvllm.simplify_saved_model(tmp_path / "a", tmp_path / "b", target=target)
    assert report.rules["RewriteBodies"] == 1
    x = tf.constant(np.random.default_rng(0).normal(size=(5, 3)), tf.float32)
    loaded = tf.saved_model.load(str(tmp_path / "b"))
    np.testing.assert_allclose(loaded.signatures["serving_default"](x=x)["y"], f(x)["y"], atol=1e-6)
    graph = loading.load(tmp_path / "b").signatures["serving_default"].graph
    assert len(_body_ops(graph, "Tanh")) == 1

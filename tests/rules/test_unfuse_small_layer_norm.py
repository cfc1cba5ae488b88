import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.rules.checks import check, f32, weight
from tests.rules.test_layer_norm import keras_form
from tfvllm.graph import functions
from tfvllm.graph.onednn_costs import LAYER_NORM_ELEMENTS
from tfvllm.graph.rewriter import Step
from tfvllm.rules.layer_norm import FuseLayerNorm
from tfvllm.rules.unfuse_small_layer_norm import UnfuseSmallLayerNorm
from tfvllm.simplifier import cost

BOTH = ["FuseLayerNorm", "UnfuseSmallLayerNorm"]
WIDTH = 256
MANY = LAYER_NORM_ELEMENTS // WIDTH


def rows(count, width=WIDTH):
    return np.random.default_rng([count, width]).normal(2.0, 1e-2, (count, width)).astype(np.float32)


def inner_ops(graph, node, key):
    (name,) = functions.names_in(node, key)
    return [n.op for n in functions.from_definition(graph, name, functions.argument_shapes(node)).live()]


def test_unknown_rows_choose_when_the_graph_runs():
    gamma, beta = weight(WIDTH), weight(WIDTH, seed=1)

    def f(x):
        y = keras_form(x, gamma, beta, 1e-12)
        return keras_form(y * 2.0, gamma, beta, 1e-12)

    samples = [[rows(n)] for n in (1, MANY - 1, MANY, MANY + 1)]
    c = check(
        f, [f32(None, WIDTH)], BOTH, {"FuseLayerNorm": 2, "UnfuseSmallLayerNorm": 2}, special=False, samples=samples
    )
    first, second = c.ops("StatelessIf")
    assert not c.ops("_MklLayerNorm") and len(c.ops("Size")) == 1  # one comparison for all norms of one shape
    assert first.attr("then_branch") == second.attr("then_branch")
    assert "_MklLayerNorm" in inner_ops(c.graph, first, "then_branch")
    assert "_MklLayerNorm" not in inner_ops(c.graph, first, "else_branch")
    counted = cost.count(c.graph, {})
    assert counted["ops"]["_MklLayerNorm"] == 2 and "StatelessIf" not in counted["ops"]


@pytest.mark.parametrize("count, fused", [(MANY - 1, False), (MANY, True)])
def test_known_rows_are_decided_now(count, fused):
    gamma, beta = weight(WIDTH), weight(WIDTH, seed=1)
    fires = {"FuseLayerNorm": 1, "UnfuseSmallLayerNorm": 0 if fused else 1}
    c = check(lambda x: keras_form(x, gamma, beta), [f32(count, WIDTH)], BOTH, fires, special=False)
    assert bool(c.ops("_MklLayerNorm")) == fused and not c.ops("StatelessIf")


def test_both_ways_take_epsilon_from_the_graph():
    gamma, beta = weight(WIDTH), weight(WIDTH, seed=1)
    f = tf.function(lambda x: keras_form(x, gamma, beta, 1e-12), input_signature=[f32(None, WIDTH)])
    fast = tfvllm.simplify(f, target="onednn")
    assert fast.report.rules["UnfuseSmallLayerNorm"] == 1
    for count in (3, MANY):
        x = rows(count) * 1e-3  # a variance far below Grappler's 0.001
        wide = x.astype(np.float64)
        r = 1 / np.sqrt(wide.var(-1, keepdims=True) + 1e-12)
        expected = (wide - wide.mean(-1, keepdims=True)) * r * gamma.numpy() + beta.numpy()
        np.testing.assert_allclose(fast(x), expected, rtol=0, atol=2e-3)


def test_bfloat16_norms_choose_too(tmp_path):
    gamma, beta, w, v = weight(WIDTH), weight(WIDTH, seed=1), weight(WIDTH, WIDTH), weight(WIDTH, 8)

    @tf.function(input_signature=[f32(None, WIDTH)])
    def f(x):
        return keras_form(x @ w, gamma, beta) @ v

    module = tf.Module()
    module.variables_of_f = [gamma, beta, w, v]
    tf.saved_model.save(module, str(tmp_path / "a"), signatures=f)
    report = tfvllm.simplify_saved_model(tmp_path / "a", tmp_path / "b", target="onednn", precision="bfloat16")
    assert report.rules["UnfuseSmallLayerNorm"] == 1 and report.rules["LowerLayerNorm"] == 1
    assert report.after["ops"]["_MklLayerNorm"] == 1
    fast = tf.saved_model.load(str(tmp_path / "b")).signatures["serving_default"]
    for count in (3, MANY):
        x = tf.constant(rows(count))
        (result,) = fast(x).values()
        scale = float(tf.reduce_max(tf.abs(f(x))))
        np.testing.assert_allclose(result, f(x), rtol=0, atol=0.03 * scale)


def test_left_alone():
    gamma, beta = weight(WIDTH), weight(WIDTH, seed=1)
    c = check(lambda x: keras_form(x, gamma, beta), [f32(None, WIDTH)], "UnfuseSmallLayerNorm", 0, special=False)
    assert not c.ops("StatelessIf")  # portable's own form is as it was
    steps = [Step("test", (FuseLayerNorm(),)), Step("last", (UnfuseSmallLayerNorm(),))]
    assert all("onednn" in r.targets and "portable" not in r.targets for s in steps for r in s.rules)

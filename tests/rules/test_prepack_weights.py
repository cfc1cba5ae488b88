from itertools import pairwise

import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.capi.loader import run
from tests.rules.checks import check, f32, weight
from tfvllm.graph import functions
from tfvllm.graph.onednn_costs import PACKED_ROWS
from tfvllm.graph.rewriter import Rewriter, Step
from tfvllm.rules.fuse_matmul import FuseActivation, FuseMatMulBias
from tfvllm.rules.prepack_weights import PrepackWeightsSmallBatch
from tfvllm.simplifier import cost
from tfvllm.simplifier.dispatch import driver
from tfvllm.simplifier.dispatch.variants import Variant, bytes_of

KEPT = "_MklNativeFusedMatMul"


def layers(*widths, activation=tf.nn.relu):
    """Products with a bias and an activation, each with weights of its own, on x [rows, widths[0]]."""
    weights = [(weight(m, n, seed=i, scale=0.1), weight(n, seed=i)) for i, (m, n) in enumerate(pairwise(widths))]

    def call(x):
        for w, b in weights:
            x = activation(tf.nn.bias_add(tf.matmul(x, w), b))
        return x

    return call


def rows(*counts, width=24):
    return [[np.random.default_rng(n).normal(size=(n, width)).astype(np.float32)] for n in counts]


# The weights are alike in shape and differ in content: what one product keeps must not reach another.
SQUARE = layers(24, 24, 24, 24)


def saved(function, width, folder):
    module = tf.Module()
    module.call = tf.function(function, input_signature=[f32(None, width)])
    module.weights = list(module.call.get_concrete_function().variables)
    tf.saved_model.save(module, str(folder), signatures=module.call)


def fused_and_kept(function, spec, samples, fires=3):
    class Together(PrepackWeightsSmallBatch):
        """The products fused first, then kept."""

        def run(self, rewriter):
            fusing = Rewriter(rewriter.graph, "onednn")
            fusing.run([Step("fuse", (FuseMatMulBias(), FuseActivation()))])
            return super().run(rewriter)

    return check(function, [spec], Together(), fires, target="onednn", special=False, generated=False, samples=samples)


@pytest.mark.parametrize("order", [1, -1])
def test_few_rows_take_the_packed_copy_whatever_came_first(order):
    counts = (1, PACKED_ROWS[0] - 1, PACKED_ROWS[0], 16, PACKED_ROWS[1] - 1, PACKED_ROWS[1], 200)[::order]
    c = fused_and_kept(SQUARE, f32(None, 24), rows(*counts, *counts))
    choices = c.ops("StatelessIf")
    assert len(choices) == 3 and len(c.ops("LogicalAnd")) == 1, "the rows are counted once"
    taken = [name for n in choices for key in ("then_branch", "else_branch") for name in functions.names_in(n, key)]
    assert len(set(taken)) == 6, "a kernel that keeps a weight has its branch for itself"
    assert len(cost.packed_weights(c.graph)) == 3
    kept = sum(24 * 24 * 4 for _ in range(3))
    assert bytes_of([Variant("kept", c.graph)]) - bytes_of([Variant("before", c.before)]) == kept


def test_known_rows():
    assert len(fused_and_kept(SQUARE, f32(16, 24), rows(16)).ops(KEPT)) == 3
    fused_and_kept(SQUARE, f32(PACKED_ROWS[1], 24), rows(PACKED_ROWS[1]), fires=0)


def test_weights_that_are_arguments_are_not_kept():
    def call(x, w):
        return tf.nn.relu(tf.nn.bias_add(tf.matmul(x, w), tf.ones(4)))

    fast = tfvllm.simplify(
        tf.function(call, input_signature=[f32(None, 8), f32(8, 4)]), target="onednn", precision="bfloat16"
    )
    assert "PrepackWeights" not in fast.report.rules
    x = np.random.default_rng(0).normal(size=(9, 8)).astype(np.float32)
    for seed in (1, 2):
        w = np.random.default_rng(seed).normal(size=(8, 4)).astype(np.float32)
        np.testing.assert_allclose(fast(x, w), np.maximum(x @ w + 1, 0), atol=0.1)


@pytest.mark.parametrize("order", [1, -1])
def test_bfloat16(tmp_path, order):
    """Kept in all products; the same answers as without, for any number of rows, in Python and by the C API."""
    saved(SQUARE, 24, tmp_path / "a")
    options = {"target": "onednn", "precision": "bfloat16"}
    report = tfvllm.simplify_saved_model(tmp_path / "a", tmp_path / "kept", **options)
    tfvllm.simplify_saved_model(tmp_path / "a", tmp_path / "anew", rules="-PrepackWeights", **options)
    assert report.rules["PrepackWeights"] == 3 and report.after["ops"][KEPT] == 3
    kept, anew = (tf.saved_model.load(str(tmp_path / n)).signatures["serving_default"] for n in ("kept", "anew"))
    for count in (1, 3, 8, 40, 64, 97, 300)[::order]:
        ((x,),) = rows(count)
        answers = [next(iter(f(tf.constant(x)).values())).numpy() for f in (kept, anew)]
        np.testing.assert_allclose(*answers, atol=2**-7 * np.abs(answers[1]).max())
        np.testing.assert_allclose(answers[0], SQUARE(x), atol=0.03 * np.abs(answers[1]).max())
    name = next(iter(kept.structured_input_signature[1]))
    (answer,) = run(tmp_path / "kept", "serving_default", {name: x}).values()
    np.testing.assert_array_equal(answer, next(iter(kept(tf.constant(x)).values())))


def test_a_profile_may_choose_it_within_the_memory_limit(tmp_path, monkeypatch):

    def measure(points, ways, specs, seconds):
        for p in points:
            p.rounds = {w.name: [1.0 if "kept" in w.name else 2.0] * 9 for w in ways}

    monkeypatch.setattr(driver, "measure", measure)
    call = layers(64, 64, 64)
    saved(call, 64, tmp_path / "a")
    (x,) = rows(16, width=64)[0]
    for limit, kept in ((None, True), (1.5, False)):
        report = tfvllm.simplify_saved_model(
            tmp_path / "a", tmp_path / f"{limit}", target="onednn", profile=[{"batch": 16}], memory_limit=limit
        )
        found = report.main.dispatch
        assert ("kept" in found["default"]) == kept, found
        assert found["bytes"] <= (limit or 2.0) * report.before["bytes"]
        answer = tf.saved_model.load(str(tmp_path / f"{limit}")).signatures["serving_default"](tf.constant(x))
        np.testing.assert_allclose(next(iter(answer.values())), call(x), atol=1e-5)
    # Of a model that lives on outside, whose weights may change, nothing is kept.
    fast = tfvllm.simplify(tf.function(call, input_signature=[f32(None, 64)]), target="onednn", profile=[{"batch": 16}])
    assert "kept" not in fast.report.main.dispatch["default"]

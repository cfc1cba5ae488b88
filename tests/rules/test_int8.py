"""int8 products: values against NumPy, what saturates, what declines, and that nothing of float32 is left behind."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.capi import loader
from tests.rules.checks import f32, weight
from tests.rules.test_bfloat16 import attention, masked_rows
from tfvllm.cli import main
from tfvllm.errors import InputError, VerificationError
from tfvllm.graph import executable, importer, probes
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.int8_ops import align_zero_point, quantise_weight
from tfvllm.graph.int8_ops import smoothing as smoothing_factors
from tfvllm.graph.rewriter import Rewriter
from tfvllm.rules import lowering, smoothing
from tfvllm.rules.fuse_requantize import FuseRequantize
from tfvllm.simplifier import calibrate

K, N = 69, 77  # odd, and more than the 4096 elements that a product needs


def lower(function, specs, span=(-4.5, 4.5)):
    """The function simplified for oneDNN, then every product in int8 with one range."""
    probes.check_runs("onednn", "int8")
    fast = tfvllm.simplify(tf.function(function, autograph=False, input_signature=specs), target="onednn")
    rewriter = Rewriter(fast.graph.copy(), "onednn")
    names = [n.name for n in rewriter.graph.live() if n.op in ("MatMul", "_FusedMatMul")]
    rewriter.run(lowering("int8", dict.fromkeys(names, align_zero_point(*span)), Approximate()))
    rewriter.graph.check()
    function = executable.to_concrete(rewriter.graph, fast.specs, pack=list)
    return (lambda *arrays: [r.numpy() for r in function(*map(tf.convert_to_tensor, arrays))]), rewriter


def ops(graph, op):
    return [n for n in graph.live() if n.op == op]


def by_hand(x, w, bias, span=(-4.5, 4.5)):
    """The same arithmetic in NumPy: bytes, int64 sums, one scale a column."""
    low, high = align_zero_point(*span)
    step = (high - low) / 255
    zero = round(-low / step)
    q = np.clip(np.round(x.astype(np.float64) / step) + zero, 0, 255).astype(np.int64)
    content, scale = quantise_weight(w)
    return (q - zero) @ content.astype(np.int64) * (step * scale.astype(np.float64) / 127) + bias


def inputs(rows, width=K, scale=1.0, seed=0):
    return np.random.default_rng([seed, rows]).normal(0, scale, (rows, width)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- the arithmetic


def test_weight_scales_are_those_of_each_column():
    w = np.array([[1.0, 0.0, -0.5, 3e-45], [-4.0, 0.0, 0.25, 0.0]], np.float32)
    content, scale = quantise_weight(w)
    assert content.dtype == np.int8
    assert content.tolist() == [[32, 0, -127, 0], [-127, 0, 64, 0]]  # 31.75 and 63.5 rounded, half to even
    assert scale.tolist() == [4.0, 1.0, 0.5, 1.0]
    big = np.asarray(weight(K, N))
    content, scale = quantise_weight(big)
    np.testing.assert_array_equal(scale, np.abs(big).max(axis=0))
    assert np.abs(content * (scale / 127) - big).max() <= (scale / 254).max() * 1.001


@pytest.mark.parametrize("span", [(-3.0, 3.0), (-0.17, 20.0), (0.0, 6.0), (-5.0, 0.0), (2.0, 4.0), (-1e-7, 1e-7)])
def test_a_range_holds_zero_as_one_of_its_levels(span):
    low, high = align_zero_point(*span)
    step = (high - low) / 255
    assert low <= 0.0 <= high
    assert abs(low / step - round(low / step)) < 1e-4
    assert low <= span[0] + step
    assert high >= span[1] - step


def test_an_empty_range_becomes_one_that_can_be_divided_by():
    assert align_zero_point(0.0, 0.0) == (0.0, 1.0)
    assert align_zero_point(0.0, 1e-40) == (0.0, 1.0)


def test_smoothing_factors_are_equation_4_of_smoothquant():
    x, w = np.array([8.0, 2.0, 0.0, 0.5]), np.array([0.5, 2.0, 1.0, 0.5])
    raw = np.array([8**0.5 / 0.5**0.5, 1.0, 1.0])  # of the channels that are not always zero
    found = smoothing_factors(x, w, 0.5)
    np.testing.assert_allclose(found[[0, 1, 3]], raw / np.prod(raw) ** (1 / 3), rtol=1e-6)
    assert found[2] == 1.0


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 33, 130])
def test_a_product_is_what_numpy_makes_of_the_same_bytes(rows):
    w, b = weight(K, N), weight(N, seed=1)
    run, rewriter = lower(lambda x: tf.nn.bias_add(x @ w, b), [f32(None, K)])
    assert rewriter.counts["QuantizeProducts"] == 1
    x = inputs(rows)
    np.testing.assert_allclose(run(x)[0], by_hand(x, w.numpy(), b.numpy()), atol=2e-5)
    exact = x @ w.numpy() + b.numpy()
    assert 1e-4 < np.abs(run(x)[0] - exact).max() / np.abs(exact).max() < 0.02


def test_no_rows_give_no_rows():
    w, b = weight(K, N), weight(N, seed=1)
    run, _ = lower(lambda x: tf.nn.bias_add(x @ w, b), [f32(None, K)])
    assert run(np.zeros((0, K), np.float32))[0].shape == (0, N)


def test_a_product_without_bias_and_with_a_transposed_weight():
    w = weight(N, K)
    run, rewriter = lower(lambda x: tf.matmul(x, w, transpose_b=True), [f32(None, K)])
    assert rewriter.counts["QuantizeProducts"] == 1
    x = inputs(5)
    np.testing.assert_allclose(run(x)[0], by_hand(x, w.numpy().T, 0.0), atol=2e-5)


@pytest.mark.parametrize("span", [(-0.5, 0.5), (-0.1, 3.0), (0.0, 1.0)])
def test_what_lies_outside_the_range_saturates(span):
    w, b = weight(K, N), weight(N, seed=1)
    run, _ = lower(lambda x: tf.nn.bias_add(x @ w, b), [f32(None, K)], span)
    x = inputs(7, scale=100.0)
    x[0, :3] = np.inf, -np.inf, 3e38
    found = run(x)[0]
    low, high = align_zero_point(*span)
    np.testing.assert_allclose(found, by_hand(np.clip(x, low, high), w.numpy(), b.numpy(), span), atol=1e-4)
    assert np.all(np.isfinite(found))


def test_columns_of_zeros_give_the_bias_alone():
    content = weight(K, N).numpy()
    content[:, 5:9] = 0.0
    w, b = tf.Variable(content), weight(N, seed=1)
    run, _ = lower(lambda x: tf.nn.bias_add(x @ w, b), [f32(None, K)])
    np.testing.assert_array_equal(run(inputs(4))[0][:, 5:9], np.tile(b.numpy()[5:9], (4, 1)))


def test_zeros_give_the_bias_alone():
    w, b = weight(K, N), weight(N, seed=1)
    run, _ = lower(lambda x: tf.nn.bias_add(x @ w, b), [f32(None, K)], (-0.17, 19.0))
    np.testing.assert_allclose(run(np.zeros((3, K), np.float32))[0], np.tile(b.numpy(), (3, 1)), atol=1e-5)


ACTIVATIONS = {
    "Relu": tf.nn.relu,
    "Tanh": tf.nn.tanh,
    "Sigmoid": tf.nn.sigmoid,
    "Elu": tf.nn.elu,
    "Relu6": tf.nn.relu6,
    "GeluExact": lambda y: tf.nn.gelu(y, approximate=False),
    "GeluApproximate": lambda y: tf.nn.gelu(y, approximate=True),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_stay_fused(name):
    w, b = weight(K, N), weight(N, seed=1)
    run, rewriter = lower(lambda x: ACTIVATIONS[name](tf.nn.bias_add(x @ w, b)), [f32(None, K)])
    (product,) = ops(rewriter.graph, "_QuantizedMatMul")
    assert product.attr("fused_ops") == ["BiasAdd", name, "Dequantize"]
    x = inputs(9)
    before = by_hand(x, w.numpy(), b.numpy()).astype(np.float32)
    np.testing.assert_allclose(run(x)[0], ACTIVATIONS[name](before).numpy(), atol=1e-4)


def test_a_residual_stays_fused():
    w, b = weight(K, K), weight(K, seed=1)
    run, rewriter = lower(lambda x: tf.nn.bias_add(x @ w, b) + x, [f32(None, K)])
    assert [n.attr("fused_ops") for n in ops(rewriter.graph, "_QuantizedMatMul")] == [["BiasAdd", "Add", "Dequantize"]]
    x = inputs(6)
    np.testing.assert_allclose(run(x)[0], by_hand(x, w.numpy(), b.numpy()) + x, atol=3e-5)


def test_bytes_go_from_one_product_to_the_next():
    w1, b1, w2, b2 = weight(K, N, scale=0.1), weight(N, seed=1), weight(N, K), weight(K, seed=2)

    def two(x):
        y = tf.nn.relu(tf.nn.bias_add(x @ w1, b1))
        return tf.nn.bias_add(y @ w2, b2)

    run, rewriter = lower(two, [f32(None, K)])
    assert rewriter.counts["FuseRequantize"] == 1
    assert len(ops(rewriter.graph, "QuantizeV2")) == 1
    x = inputs(11)
    middle = np.maximum(by_hand(x, w1.numpy(), b1.numpy()), 0)
    wanted = by_hand(middle, w2.numpy(), b2.numpy())
    assert np.abs(run(x)[0] - wanted).max() < 0.02 * np.abs(wanted).max()  # a tie that rounds the other way: one step


def test_a_product_that_is_read_in_float32_too_is_not_requantised():
    w1, w2, b = weight(K, K), weight(K, N), weight(K, seed=1)

    def two(x):
        y = tf.nn.relu(tf.nn.bias_add(x @ w1, b))
        return y @ w2, y

    _, rewriter = lower(two, [f32(None, K)])
    assert rewriter.counts["FuseRequantize"] == 0
    assert rewriter.declined[next(k for k in rewriter.declined if k[0] == FuseRequantize().name)]


def test_an_input_of_several_products_is_quantised_once():
    w1, w2 = weight(K, N), weight(K, N + 2, seed=3)
    run, rewriter = lower(lambda x: (x @ w1, tf.nn.relu(x @ w2)), [f32(None, K)])
    assert len(ops(rewriter.graph, "QuantizeV2")) == 1
    x = inputs(3)
    np.testing.assert_allclose(run(x)[1], np.maximum(by_hand(x, w2.numpy(), 0.0), 0), atol=2e-5)


def test_a_table_of_embeddings_keeps_a_byte_an_element():
    table = tf.Variable(np.random.default_rng(3).normal(0, 1, (1100, 64)).astype(np.float32) * 3.0)
    table[5].assign(tf.zeros(64))
    call = tf.function(
        lambda ids: tf.gather(tf.identity(table), ids),
        autograph=False,
        input_signature=[tf.TensorSpec([None, None], tf.int32)],
    )
    fast = tfvllm.simplify(call, target="onednn", precision="int8")
    assert fast.report.rules["QuantizeTables"] == 1
    ids = np.array([[0, 5, 1099], [7, 7, 8]])
    found = fast(ids).numpy()
    content, scale = quantise_weight(table.numpy().T)
    np.testing.assert_allclose(found, (content * (scale / 127)).T[ids], rtol=1e-6)
    assert not found[0, 1].any()
    assert fast.report.after["bytes"] < 0.27 * fast.report.before["bytes"]


# -------------------------------------------------------------------------------------------------------- calibration


def observed(*samples, width=K):
    function = tf.function(lambda x: x * 1.0, autograph=False, input_signature=[f32(None, width)])
    graph = importer.from_concrete(function.get_concrete_function())
    (value,) = graph.inputs.values()
    return calibrate.observe(graph, function.get_concrete_function().structured_input_signature, samples, [value])[
        value
    ]


def test_what_is_observed_is_what_numpy_finds():
    samples = [[inputs(rows, scale=rows, seed=4)] for rows in (1, 3, 8)]
    spread = observed(*samples)
    rows = np.concatenate([s[0] for s in samples])
    np.testing.assert_allclose(spread.largest, np.abs(rows).max(axis=0), rtol=1e-6)
    np.testing.assert_allclose(spread.squares, (rows**2).mean(axis=0), rtol=1e-5)
    assert spread.ends == (rows.min(), rows.max())
    assert spread.counts.sum() == rows.size


@pytest.mark.parametrize("percentile", [50, 90, 99, 99.9])
def test_percentiles_are_right_to_a_bin(percentile):
    x = inputs(400, seed=5)
    low, high = observed([x]).span(percentile)
    assert high == pytest.approx(np.percentile(np.abs(x), percentile), rel=0.02)
    assert low == -high
    assert observed([x]).span(100) == (x.min(), x.max())


def test_a_tensor_of_zeros_has_an_empty_range():
    assert observed([np.zeros((4, K), np.float32)], [np.zeros((0, K), np.float32)]).span() == (0.0, 0.0)


def test_a_model_that_gives_nan_on_the_calibration_inputs_is_refused():
    with pytest.raises(InputError, match=r"holds NaN or infinities on the calibration inputs.*calibration="):
        observed([np.full((2, K), np.nan, np.float32)])


# ------------------------------------------------------------------------------------------------------------- models


def mlp(seed=0, outlier=1.0):
    """norm -> dense relu -> dense, as a Keras model; `outlier` scales one channel of the norm."""
    import keras

    keras.utils.set_random_seed(seed)
    x = keras.Input((64,), name="x")
    y = keras.layers.LayerNormalization(name="norm")(x)
    y = keras.layers.Dense(96, "relu", name="up")(y)
    model = keras.Model(x, keras.layers.Dense(80, name="down")(y))
    gamma = np.ones(64, np.float32)
    gamma[7] = outlier
    model.get_layer("norm").gamma.assign(gamma)
    kernel = model.get_layer("up").kernel
    kernel.assign(np.asarray(kernel) / gamma[:, None])  # the outlier matters no more than the others
    return model


REAL = np.random.default_rng(9).normal(0, 1, (256, 64)).astype(np.float32)


def entry(report):
    return report.signatures[next(iter(report.signatures))].lowering


def test_simplify_lowers_measures_and_says_so():
    model = mlp()
    fast = tfvllm.simplify(model, target="onednn", precision="int8", inputs=REAL)
    assert fast.report.rules["QuantizeProducts"] == 2
    wanted = model(REAL).numpy()
    error = np.abs(fast(REAL).numpy() - wanted).max() / np.abs(wanted).max()
    details = entry(fast.report)
    assert details["error"] == pytest.approx(error, rel=0.01)
    assert 0.001 < error < 0.02
    assert details["ranges"] == {"inputs": "given", "samples": 1, "percentile": 100.0}
    assert [p["precision"] for p in details["products"]] == ["int8", "int8"]
    assert all(0.001 < p["error"] < 0.02 for p in details["products"])
    assert not fast.report.notes
    assert "measured" in fast.report.main.fired["QuantizeProducts"]["guarantee"]


def test_made_up_ranges_are_called_so():
    fast = tfvllm.simplify(mlp(), target="onednn", precision="int8")
    assert entry(fast.report)["ranges"]["inputs"] == "made-up"
    assert "int8 ranges come from made-up inputs" in fast.report.notes[0]
    assert "calibration=" in fast.report.notes[0]


def test_a_large_channel_is_spread_into_the_weight():
    model = mlp(outlier=60.0)
    fast = tfvllm.simplify(model, target="onednn", precision="int8", inputs=REAL)
    details = entry(fast.report)
    assert details["smoothed"] >= 1
    assert fast.report.after["ops"]["_MklLayerNorm"] == 1
    assert details["error"] < 0.02
    plain = tfvllm.simplify(mlp(), target="onednn", precision="int8", inputs=REAL)
    assert details["error"] < 2 * entry(plain.report)["error"]


def test_smoothing_changes_no_more_than_rounding():
    fast = tfvllm.simplify(mlp(), target="onednn", inputs=REAL, rules="-UnfuseSmallLayerNorm")
    rewriter = Rewriter(fast.graph.copy(), "onednn")
    (norm,) = ops(rewriter.graph, "_MklLayerNorm")
    factors = np.exp(np.random.default_rng(0).normal(0, 1, 64)).astype(np.float32)
    rewriter.run(smoothing({norm.name: factors}, {}))
    assert rewriter.counts["SmoothInputs"] == 1
    function = executable.to_concrete(rewriter.graph, fast.specs, pack=list)
    np.testing.assert_allclose(function(tf.constant(REAL))[0], fast(REAL), atol=1e-5)


def two_layers(x):
    hidden = tf.nn.gelu(tf.nn.bias_add(x @ UP, BIAS))
    return tf.nn.bias_add(hidden @ DOWN, BIAS[:K]) + x


UP, DOWN, BIAS = weight(K, 2 * K, scale=0.2), weight(2 * K, K, scale=0.2), weight(2 * K, seed=8)


def test_outliers_apart_change_no_more_than_rounding():
    call = tf.function(two_layers, autograph=False, input_signature=[f32(None, K)])
    fast = tfvllm.simplify(call, target="onednn")
    rewriter = Rewriter(fast.graph.copy(), "onednn")
    last = next(n for n in ops(rewriter.graph, "_FusedMatMul") if "Add" in n.attr("fused_ops"))
    rewriter.run(smoothing({}, {last.name: np.array([3, 100])}))
    rewriter.graph.check()
    assert rewriter.counts["SplitOutliers"] == 1
    assert sorted(n.output.shape[-1] for n in ops(rewriter.graph, "_FusedMatMul")) == [2, K, K, 2 * K]
    function = executable.to_concrete(rewriter.graph, fast.specs, pack=list)
    for rows in (1, 5, 64):
        x = inputs(rows)
        np.testing.assert_allclose(function(tf.constant(x))[0], fast(x), atol=2e-5)


def test_a_hidden_outlier_is_computed_apart():
    up, down = UP.numpy().copy(), DOWN.numpy().copy()
    up[:, 3] *= 300.0
    down[3] /= 300.0
    up, down = tf.Variable(up), tf.Variable(down)

    def serve(x):
        return tf.nn.bias_add(tf.nn.gelu(tf.nn.bias_add(x @ up, BIAS)) @ down, BIAS[:K])

    call = tf.function(serve, autograph=False, input_signature=[f32(None, K)])
    loose = tfvllm.simplify(call, target="onednn", precision="int8", inputs=inputs(200), max_error=0.9)
    tight = tfvllm.simplify(call, target="onednn", precision="int8", inputs=inputs(200), max_error=0.03)
    assert tight.report.rules["SplitOutliers"] == 1
    assert [p["precision"] for p in entry(tight.report)["products"]] == ["int8", "int8"]
    assert entry(tight.report)["error"] < 0.03 < 0.1 < entry(loose.report)["error"]


@pytest.mark.thorough
def test_no_more_is_computed_apart_than_the_bound_asks_for():
    """Four layers with an outlier each, of which the first has the largest: the looser the bound, the fewer."""
    rng = np.random.default_rng(4)
    layers = []
    for factor in (900.0, 300.0, 100.0, 30.0):
        up, down = (rng.normal(0, 0.2, shape).astype(np.float32) for shape in ((K, 2 * K), (2 * K, K)))
        up[:, 3] *= factor
        down[3] /= factor
        layers.append((tf.Variable(up), tf.Variable(down)))

    def serve(x):
        for up, down in layers:
            x += tf.nn.bias_add(tf.nn.gelu(tf.nn.bias_add(x @ up, BIAS)) @ down, BIAS[:K]) * 0.1
        return x

    call = tf.function(serve, autograph=False, input_signature=[f32(None, K)])

    def apart(bound):
        fast = tfvllm.simplify(call, target="onednn", precision="int8", inputs=inputs(200), max_error=bound)
        assert entry(fast.report)["error"] <= bound
        assert all(p["precision"] == "int8" for p in entry(fast.report)["products"])
        return entry(fast.report)["smoothed"], entry(fast.report)["error"]

    errors = {}
    for bound, wanted in ((0.9, 0), (0.05, 3), (0.015, 4)):
        count, errors[count] = apart(bound)
        assert count == wanted
    assert errors[0] > 0.1 > errors[3] > errors[4]


@pytest.mark.parametrize("masked", ["added", "chosen", "none"])
def test_attention_between_products_may_be_bfloat16(masked):
    call = attention(masked, width=72)
    x, keep = masked_rows(width=72)
    options = {"target": "onednn", "precision": "int8", "inputs": (x, keep)}
    narrow, wide = (tfvllm.simplify(call, **options, activations=a) for a in ("bfloat16", None))
    assert narrow.report.rules["EmitBfloat16Output"] > 0
    assert narrow.report.rules["QuantizeProducts"] == wide.report.rules["QuantizeProducts"]
    assert {n.output.dtype.name for n in narrow.graph.live() if n.op in ("Softmax", "BatchMatMulV2")} == {"bfloat16"}
    assert [entry(f.report)["activations"] for f in (narrow, wide)] == ["bfloat16", "float32"]
    wanted = call(tf.constant(x), tf.constant(keep)).numpy()
    errors = [np.abs(f(x, keep).numpy() - wanted).max() / np.abs(wanted).max() for f in (narrow, wide)]
    assert 0 < errors[0] < errors[1] + 0.02


def test_what_costs_too_much_stays_in_float32():
    import keras

    keras.utils.set_random_seed(0)
    x = keras.Input((64,))
    slope = np.ones(64, np.float32)
    slope[0] = 3.0  # one large channel, which matters not at all, costs all the others their steps
    fine = keras.layers.Dense(64, name="fine")(x)
    coarse = keras.layers.Dense(64, name="coarse")(keras.layers.Lambda(lambda t: tf.sinh(t * slope))(x))
    model = keras.Model(x, keras.layers.Concatenate()([fine, coarse]))
    kernel = np.array(model.get_layer("coarse").kernel)
    kernel[0] = 0.0
    model.get_layer("coarse").kernel.assign(kernel)
    fast = tfvllm.simplify(model, target="onednn", precision="int8", inputs=REAL, max_error=0.03)
    details = entry(fast.report)
    kept = [p for p in details["products"] if p["precision"] == "float32"]
    assert len(kept) == 1
    assert details["error"] <= 0.03
    assert kept[0]["sensitivity"] > 0.03 > min(p["sensitivity"] for p in details["products"])
    assert any("kept in float32: in int8 it alone moves the result" in d["reason"] for d in fast.report.declined)


def test_an_error_that_nothing_mends_is_refused():
    with pytest.raises(VerificationError, match=r"even with one product alone in int8.*max_error="):
        tfvllm.simplify(mlp(), target="onednn", precision="int8", inputs=REAL, max_error=1e-6)


def test_a_weight_with_nan_stays_as_it_is():
    w, v = weight(K, N), tf.Variable(np.full((K, N), np.inf, np.float32))
    call = tf.function(lambda x: (x @ w, x @ v), autograph=False, input_signature=[f32(None, K)])
    fast = tfvllm.simplify(call, target="onednn", precision="int8", rules=["-merge"])
    assert len(ops(fast.graph, "_QuantizedMatMul")) == 1
    assert any(d["reason"] == "its weight holds NaN or infinities" for d in fast.report.declined)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "portable"}, "precision 'int8' needs target 'onednn', found 'portable'.*--target onednn"),
        ({"target": "onednn", "max_error": 0.0}, "max_error: expected a number between 0 and 1, found 0.0"),
        ({"target": "onednn", "percentile": 101}, "percentile: expected a number from 50 to 100, found 101"),
        ({"target": "onednn", "activations": "half"}, "activations: expected float32 or bfloat16, found 'half'"),
        ({"target": "onednn", "precision": "float32", "max_error": 0.1}, "max_error is for precision int8"),
        ({"precision": "bfloat16", "activations": "bfloat16"}, "activations is for precision int8"),
    ],
)
def test_calls_that_cannot_be_answered(options, message):
    with pytest.raises(InputError, match=message):
        tfvllm.simplify(mlp(), **{"precision": "int8", **options})


def test_a_model_without_large_products_is_refused():
    w = weight(8, 8)
    call = tf.function(lambda x: x @ w, autograph=False, input_signature=[f32(None, 8)])
    with pytest.raises(InputError, match="int8: expected a float32 product with a weight of 4096 elements"):
        tfvllm.simplify(call, target="onednn", precision="int8")


# --------------------------------------------------------------------------------------------------------- SavedModels


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two signatures that share their weights, and 12 calibration samples."""
    folder = tmp_path_factory.mktemp("int8")
    module = tf.Module()
    module.up, module.down = weight(256, 512, scale=0.05), weight(512, 256, scale=0.05)
    module.bias = weight(512, seed=2)

    def serve(x):
        return {"y": tf.nn.gelu(tf.nn.bias_add(x @ module.up, module.bias)) @ module.down}

    call = tf.function(serve, autograph=False, input_signature=[f32(None, 256)])
    positive = tf.function(
        lambda x: {"y": tf.nn.relu(serve(x)["y"])}, autograph=False, input_signature=[f32(None, 256)]
    )
    tf.saved_model.save(module, str(folder / "1"), signatures={"serving_default": call, "positive": positive})
    rows = [{"x": inputs(4, 256, seed=i)} for i in range(12)]
    np.savez(folder / "x.npz", x=np.concatenate([r["x"] for r in rows]))
    return folder, rows


def size_of_variables(folder):
    return sum(os.path.getsize(f) for f in (folder / "variables").glob("variables.data*"))


def test_variables_take_a_quarter_and_signatures_share_them(saved, tmp_path):
    folder, rows = saved
    report = tfvllm.simplify_saved_model(
        folder / "1", tmp_path / "1", target="onednn", precision="int8", calibration=rows
    )
    assert size_of_variables(tmp_path / "1") < 0.27 * size_of_variables(folder / "1")
    assert entry(report)["ranges"]["samples"] == 9  # every fourth of 12 only verifies
    assert report.verification["samples"] == 12
    manifest = json.loads((tmp_path / "1" / "assets.extra" / "tfvllm.json").read_text())
    step = manifest["steps"][-1]
    assert step["precision"] == "int8"
    assert step["lowering"]["error"] == pytest.approx(report.verification["max_rel_error"])
    loaded = tf.saved_model.load(str(tmp_path / "1"))
    old = tf.saved_model.load(str(folder / "1"))
    for name in ("serving_default", "positive"):
        x = tf.constant(inputs(5, 256, seed=77))
        wanted = old.signatures[name](x=x)["y"].numpy()
        found = loaded.signatures[name](x=x)["y"].numpy()
        assert 1e-4 < np.abs(found - wanted).max() / np.abs(wanted).max() < 0.03


def exit_code(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_the_command(saved, tmp_path, capsys):
    folder, _ = saved
    call = ["simplify", str(folder / "1"), str(tmp_path / "1"), "--precision", "int8", "--signature", "serving_default"]
    assert exit_code(call) == 2
    assert "needs target 'onednn'" in capsys.readouterr().err
    call += ["--target", "onednn", "--json", "--calibration", str(folder / "x.npz")]
    probes.check_runs("onednn", "int8")
    assert exit_code([*call, "--max-error", "0.00001"]) == 3
    assert not (tmp_path / "1").exists()
    capsys.readouterr()
    assert exit_code([*call, "--max-error", "0.04", "--percentile", "100"]) == 0
    printed = json.loads(capsys.readouterr().out)
    details = printed["signatures"]["serving_default"]["lowering"]
    assert details["max_error"] == 0.04
    assert details["ranges"] == {"inputs": "given", "samples": 1, "percentile": 100.0}


@pytest.fixture(scope="module")
def served(saved):
    """The SavedModel in int8, two random inputs, and what it gives for them here."""
    folder, rows = saved
    if not (folder / "fast").exists():
        tfvllm.simplify_saved_model(
            folder / "1", folder / "fast", target="onednn", precision="int8", calibration=rows, max_error=0.04
        )
    x = inputs(3, 256, seed=50)
    return folder / "fast", x, tf.saved_model.load(str(folder / "fast")).signatures["serving_default"](x=x)["y"].numpy()


@pytest.mark.slow
def test_it_loads_and_answers_in_a_fresh_process(served, tmp_path):
    folder, x, wanted = served
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, numpy as np, tensorflow as tf\n"
        "f = tf.saved_model.load(sys.argv[1]).signatures['serving_default']\n"
        "np.save(sys.argv[3], f(x=tf.constant(np.load(sys.argv[2])))['y'].numpy())\n"
    )
    files = [str(folder), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, capture_output=True)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), wanted)


@pytest.mark.slow
def test_it_loads_and_answers_through_the_c_api(served):
    folder, x, wanted = served
    np.testing.assert_array_equal(loader.run(folder, "serving_default", {"x": x})["y"], wanted)


@pytest.mark.slow
def test_thousands_of_requests_of_changing_shapes_and_ranges_leave_memory_flat(served):
    folder, _, _ = served
    code = f"""
import numpy as np, os, tensorflow as tf
tf.config.threading.set_inter_op_parallelism_threads(1)
f = tf.saved_model.load({str(folder)!r}).signatures["serving_default"]
rng = np.random.default_rng(0)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
def requests(count):
    for _ in range(count):
        x = rng.standard_normal((rng.integers(1, 200), 256), dtype=np.float32) * np.float32(10.0 ** rng.uniform(-3, 3))
        f(x=tf.constant(x))
requests(3000)
marks = [resident()]
for _ in range(4):
    requests(2000)
    marks.append(resident())
print(*marks)
"""
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    marks = [float(m) for m in answer.stdout.split()]
    assert max(marks[1:]) - marks[0] < 8.0, marks  # MiB, over 8000 requests after the first 3000


def test_the_report_tells_what_became_of_each_product(served, tmp_path):
    folder, _, _ = served
    manifest = json.loads((folder / "assets.extra" / "tfvllm.json").read_text())
    assert [p["what"] for p in manifest["steps"][-1]["lowering"]["products"]] == ["product", "product"]
    fast = tfvllm.simplify(mlp(), target="onednn", precision="int8", inputs=REAL)
    fast.report.to_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "Products and tables" in page
    assert "2 of 2 products and tables, with ranges from 1 given inputs" in page
    assert any("the least exact is the product" in str(part) for part in fast.report.table().renderables)

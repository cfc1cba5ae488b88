"""Models that draw random numbers, or give garbage on made-up inputs: verified on the same draws, or said not to be."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tfvllm.cli import main
from tfvllm.errors import InputError
from tfvllm.graph.guarantee import Exact
from tfvllm.graph.pattern import op
from tfvllm.graph.rewriter import Rule

ROWS = [tf.TensorSpec([None, 4], name="x")]


class _Draw(keras.layers.Layer):
    """z = mean + noise · exp(log variance / 2), as a variational encoder draws."""

    def call(self, x):
        mean, log_variance = tf.split(x, 2, axis=-1)
        return mean + tf.exp(0.5 * log_variance) * tf.random.normal(tf.shape(mean))


def _vae():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(6), _Draw(name="draw"), keras.layers.Dense(2)])


def _left_on():
    layers = [
        keras.layers.RandomFlip(),
        keras.layers.RandomRotation(0.2),
        keras.layers.GaussianNoise(0.3),
        keras.layers.Conv2D(4, 3),
        keras.layers.Dropout(0.5),
    ]
    model = keras.Sequential([keras.Input((8, 8, 3)), *layers])
    return tf.function(lambda x: model(x, training=True), input_signature=[tf.TensorSpec([None, 8, 8, 3])])


def _loop():
    @tf.function(input_signature=ROWS)
    def call(x):
        for _ in tf.range(3):
            x = x + tf.random.uniform(tf.shape(x))
        return x * 1.0

    return call


def _generator():
    generator = tf.random.Generator.from_seed(1)
    return tf.function(lambda x: x * generator.uniform([4]) * 1.0, input_signature=ROWS)


def _seeded():
    return tf.function(lambda x: tf.nn.dropout(x * 1.0, 0.5, seed=7), input_signature=ROWS)


def _stateless():
    return tf.function(lambda x: x * 1.0 + tf.random.stateless_normal([4], [1, 2]), input_signature=ROWS)


@pytest.mark.parametrize("make", [_vae, _left_on, _loop, _generator, _seeded, _stateless])
def test_random_models_are_verified_on_the_same_draws(make):
    fast = tfvllm.simplify(make())
    check = fast.report.verification
    assert check["status"] == "verified" and check["ok"] and not fast.report.main.rolled_back
    assert check["tolerance"] < 1e-2  # of values around 1
    assert bool(check["random"]) == (make not in (_stateless, _left_on))  # Keras draws from seeds in variables


def test_the_report_names_the_op_and_the_layer_that_draw(tmp_path):
    _vae().export(tmp_path / "a", verbose=False)
    report = tfvllm.simplify_saved_model(tmp_path / "a", tmp_path / "b")
    (named,) = report.verification["random"]
    assert named.startswith("RandomStandardNormal (") and "draw" in named
    report.to_html(tmp_path / "r.html")
    assert "The original is random: RandomStandardNormal" in (tmp_path / "r.html").read_text()


def test_the_result_still_draws_anew():
    fast = tfvllm.simplify(_vae())
    x = np.ones((1, 4), np.float32)
    assert not np.array_equal(fast(x), fast(x))


class _Wrong(Rule):
    """relu(x) -> relu6(x), wrong on purpose for large x."""

    guarantee = Exact()

    def pattern(self, x):
        return op.Relu(x)

    def replacement(self, b, m):
        return b.Relu6(m.x)


def test_a_wrong_rewrite_of_a_random_model_is_found():
    call = tf.function(lambda x: tf.nn.relu(100.0 * x + tf.random.normal([4])), input_signature=ROWS)
    fast = tfvllm.simplify(call, rules=[_Wrong()])
    assert [entry["rule"] for entry in fast.report.main.rolled_back] == ["_Wrong"]


def _clock(x):
    return x * tf.cast(tf.math.floormod(tf.timestamp() * 1e6, 1000.0), tf.float32), x * 2.0 + 0.0


def test_what_does_not_repeat_is_not_verified_and_said_so(tmp_path, capsys):
    fast = tfvllm.simplify(tf.function(_clock, input_signature=ROWS))
    check = fast.report.verification
    assert check["status"] == "partly verified" and check["ok"] is False and not check["failures"]
    assert list(check["not_verified"]) == ["output_0"] and check["tolerance"] < 1e-4
    assert check["not_verified"]["output_0"].startswith("the original is random here: Timestamp (")

    module = tf.Module()
    module.call = tf.function(lambda x: {"y": _clock(x)[0]}, input_signature=ROWS)
    tf.saved_model.save(module, str(tmp_path / "a"), signatures=module.call)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["simplify", str(tmp_path / "a"), *map(str, arguments)])
        assert ended.value.code == 0

    run(tmp_path / "b", "--report", tmp_path / "r.html")
    printed = " ".join(capsys.readouterr().out.split())
    assert "not verified: y: the original is random here: Timestamp" in printed and "verified on" not in printed
    assert "Not verified: y: the original is random here" in (tmp_path / "r.html").read_text()
    run(tmp_path / "c", "--json")
    found = json.loads(capsys.readouterr().out)["verification"]
    assert found["status"] == "not verified" and found["ok"] is False and "y" in found["not_verified"]


def test_lower_precision_needs_something_to_be_held_against():
    weight = tf.Variable(tf.ones([64, 64]))
    call = tf.function(lambda x: _clock(x @ weight)[0], input_signature=[tf.TensorSpec([None, 64])])
    with pytest.raises(InputError, match="the original is random here: Timestamp"):
        tfvllm.simplify(call, target="onednn", precision="bfloat16")


def test_inputs_too_short_for_the_model_prove_nothing():
    """On fewer than ten steps nothing is left after the convolutions, and the mean of nothing is NaN."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv1D(8, 9, strides=2), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((None, 4)), *layers])
    check = tfvllm.simplify(model).report.verification
    assert check["status"] == "verified" and check["tolerance"] < 1e-3


def test_a_model_that_needs_longer_inputs_gets_them():
    model = keras.Sequential([keras.Input((None, 4)), keras.layers.Conv1D(3, 60), keras.layers.GlobalMaxPooling1D()])
    check = tfvllm.simplify(model).report.verification
    assert check["status"] == "verified" and check["samples"] == 2


def test_no_finite_value_is_no_proof():
    call = tf.function(lambda x: (x * np.nan + 0.0, x * 1.0), input_signature=ROWS)
    check = tfvllm.simplify(call).report.verification
    assert check["not_verified"] == {"output_0": "the original gives no finite value on any made-up input"}


def test_a_tolerance_as_large_as_the_values_is_never_ok():
    """sin(10⁹ x) in float32 has nothing in common with its float64 value: only equal bits are accepted."""

    class Nudge(Rule):
        """sin(x) -> sin(x · (1 + 2⁻²²)), as wrong as rounding, which here is all."""

        guarantee = Exact()

        def pattern(self, x):
            return op.Sin(x)

        def condition(self, graph, m):
            from tfvllm.graph.builder import Skip

            if "nudged" in m.x.node.name:
                raise Skip("done")

        def replacement(self, b, m):
            return b.Sin(b.op("Mul", [m.x, b.const(np.float32(1 + 2.0**-22))], hint="nudged")[0])

    call = tf.function(lambda x: tf.sin(x * 1e9), input_signature=ROWS)
    assert tfvllm.simplify(call).report.verification["status"] == "verified"
    check = tfvllm.simplify(call, rules=[Nudge()]).report.verification
    assert check["status"] == "not verified" and "as large as its values" in check["not_verified"]["output_0"]

"""What users read when something is wrong: the graph's own words, and options under the names they know."""

import re

import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

import tfvllm
from tfvllm.cli import cli
from tfvllm.errors import InputError, VerificationError
from tfvllm.simplifier import verify
from tfvllm.simplifier.arguments import REAL_INPUTS


def vector(function):
    return tf.function(function, input_signature=[tf.TensorSpec([None], tf.float32, name="x")])


def positive(x):
    tf.debugging.assert_greater(x, 1e9, message="speeds must be positive")
    return tf.sqrt(x)


FAILING = {
    "assert_positive": (positive, "speeds must be positive"),
    "a kernel": (lambda x: tf.gather(tf.constant([1.0, 2.0]), tf.cast(x, tf.int32) + 7), r"is not in \[0, 2\)"),
}


@pytest.mark.parametrize("name", FAILING)
def test_an_errors_own_text(name):
    function, said = FAILING[name]
    for inputs in (None, np.float32([-1, 5])):
        with pytest.raises(InputError, match=said) as caught:
            tfvllm.simplify(vector(function), inputs=inputs)
        assert "Graph execution error" not in str(caught.value) and "\n" not in str(caught.value)


def test_options_by_the_names_of_the_caller(tmp_path):
    module = tf.Module()
    tf.saved_model.save(module, str(tmp_path / "1"), signatures=vector(lambda x: {"y": FAILING["a kernel"][0](x)}))
    with pytest.raises(InputError, match=re.escape(f"pass real ones: {REAL_INPUTS}")):
        tfvllm.simplify_saved_model(tmp_path / "1", tmp_path / "2")
    with pytest.raises(InputError, match="Pass signature= with one of these"):
        tfvllm.simplify_saved_model(tmp_path / "1", tmp_path / "2", signature="none")
    call = ["simplify", str(tmp_path / "1"), str(tmp_path / "2")]
    for arguments, said in ((call, "--calibration FILE"), ([*call, "--signature", "none"], "Pass --signature with")):
        error = CliRunner().invoke(cli, arguments).exception
        assert said in str(error) and "calibration=" not in str(error) and "signature=" not in str(error)


def test_the_bound_that_was_broken_is_named(monkeypatch):
    weight = tf.Variable(np.random.default_rng(0).normal(size=[64, 64]), dtype=tf.float32)
    function = tf.function(lambda x: x @ weight, input_signature=[tf.TensorSpec([None, 64], tf.float32)])

    def never(self, graph, extra_tolerance=0.0):
        return verify.Comparison(samples=1, failures=["off by 3"] if extra_tolerance else [])

    monkeypatch.setattr(verify.Verifier, "compare", never)
    with pytest.raises(
        VerificationError, match=r"bfloat16 is off by more than 0\.05 .*off by 3.*Allow more with rtol="
    ):
        tfvllm.simplify(function, precision="bfloat16")


def test_a_student_without_weights_yet_is_not_called_frozen():
    """Its first batch builds it, as Keras does, and it learns."""
    import keras

    class Student(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    teacher = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    distiller = tfvllm.Distiller(teacher, Student())
    distiller.compile(optimizer="adam", loss="mse")
    logs = distiller.fit(np.ones([4, 3], np.float32), np.ones([4, 2], np.float32), epochs=3, verbose=0).history
    assert len(distiller.student.trainable_variables) == 2
    assert logs["loss"][0] > logs["loss"][1] > logs["loss"][2]

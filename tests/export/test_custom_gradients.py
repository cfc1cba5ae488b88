"""Models with gradients of their own (`tf.nn.silu` has one): a SavedModel names what they read, and must hold it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tfvllm.savedmodel import parity, protos, write

POINTS = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")


@tf.custom_gradient
def scaled_tanh(x, scale):
    """A gradient that is seven times the true one, to be told from TensorFlow's own."""
    result = tf.tanh(x * scale)

    def gradient(upstream):
        return upstream * (1.0 - result * result) * scale * 7.0, tf.zeros_like(scale)

    return result, gradient


def networks():
    """Functions of x and a weight; what each custom gradient reads lies in the function, in a loop or in a branch."""

    def in_line(x, weight):
        hidden = tf.nn.silu(x @ weight)
        hidden = scaled_tanh(hidden, tf.constant(2.0)) + tf.constant(2.0)
        return tf.nn.silu(hidden, beta=tf.constant(2.0)) + tf.nn.silu(hidden)

    def in_a_loop(x, weight):
        def body(step, hidden):
            return step + 1, scaled_tanh(tf.nn.silu(hidden @ weight), tf.constant(2.0)) * tf.constant(2.0)

        return tf.while_loop(lambda step, hidden: step < 3, body, [0, x], maximum_iterations=3)[1]

    def in_branches(x, weight):
        return tf.cond(
            tf.reduce_sum(x) < 1e6,
            lambda: scaled_tanh(x @ weight, tf.constant(2.0)) + tf.constant(2.0),
            lambda: tf.nn.silu(x),
        )

    return [in_line, in_a_loop, in_branches]


def gradient(function, x):
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        result = function(x)
    return tape.gradient(result, x)


def written(network, directory, save):
    """A network with a weight, as a module that computes it; what `save` wrote lies in `directory`."""
    module = tf.Module()
    module.weight = tf.Variable(np.random.default_rng(1).normal(size=(4, 4)).astype("float32"))

    @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="x")], autograph=False)
    def call(x):
        return {"y": network(x, module.weight)}

    module.call = call
    save(module, {"serving_default": call}, directory)
    return module


@pytest.mark.parametrize("network", networks(), ids=lambda network: network.__name__)
def test_what_gradients_read_stays_in_a_saved_function(network, tmp_path):
    module = written(network, tmp_path / "1", write.save)
    (graph,) = protos.read_proto(tmp_path / "1").meta_graphs
    named = write.named_from_outside(graph)
    assert sum(map(len, named.values())) >= 2
    for function in graph.graph_def.library.function:
        inside = {node.name for node in function.node_def} | {arg.name for arg in function.signature.input_arg}
        assert named[function.signature.name] <= inside
    loaded = tf.saved_model.load(str(tmp_path / "1"))
    served = loaded.signatures["serving_default"]
    np.testing.assert_array_equal(served(x=tf.constant(POINTS))["y"], module.call(tf.constant(POINTS))["y"])
    if network.__name__ == "in_line":  # elsewhere TensorFlow has none, saved or not
        expected = gradient(lambda x: module.call(x)["y"], POINTS)
        np.testing.assert_allclose(gradient(lambda x: served(x=x)["y"], POINTS), expected, rtol=1e-6)


def test_repeats_are_still_merged_beside_what_is_named(tmp_path):
    written(networks()[0], tmp_path / "1", write.save)
    (graph,) = protos.read_proto(tmp_path / "1").meta_graphs
    named = write.named_from_outside(graph)
    (function,) = (f for f in graph.graph_def.library.function if f.signature.name.startswith("__inference_call_"))
    twos = [
        node.name
        for node in function.node_def
        if node.op == "Const" and tf.make_ndarray(node.attr["value"].tensor).tolist() == 2.0
    ]
    assert len(twos) - len(named[function.signature.name] & set(twos)) <= 1


def test_a_classifier_with_silu(tmp_path):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, activation=activation) for activation in ("silu", "swish", "silu")]
    model = keras.Sequential([keras.Input([4]), *layers, keras.layers.Dense(3)])
    path = tfvllm.export(model, tmp_path / "1", task="classify")
    loaded = tf.saved_model.load(str(path)).signatures["serving_default"]
    (name,) = loaded.structured_input_signature[1]
    scores = parity.run_here(path, [("serving_default", {name: POINTS})])[0]["scores"]
    np.testing.assert_allclose(scores, tf.nn.softmax(model(POINTS)), atol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("network", networks(), ids=lambda network: network.__name__)
def test_a_model_with_gradients_of_its_own_is_simplified(network, tmp_path):
    module = written(network, tmp_path / "1", lambda *given: tf.saved_model.save(*given[::2], signatures=given[1]))
    tfvllm.simplify_saved_model(tmp_path / "1", tmp_path / "2", target="portable")
    again = tmp_path / "3"
    tfvllm.simplify_saved_model(tmp_path / "2", again, target="portable")
    found = parity.run_here(again, [("serving_default", {"x": POINTS})])[0]["y"]
    np.testing.assert_allclose(found, module.call(tf.constant(POINTS))["y"], atol=1e-6)

import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.rules.checks import check, f32
from tfvllm.graph import executable, loading

RULE = "TransposesAsIntegers"


def test_the_same_bits_moved_as_integers():
    c = check(lambda x: tf.transpose(x, [0, 2, 1, 3]), [f32(None, None, 3, 4)], RULE, 1)
    (node,) = c.ops("Transpose")
    assert node.output.dtype == tf.int32 and len(c.ops("Bitcast")) == 2
    assert c.graph.outputs["output_0"].shape == c.before.outputs["output_0"].shape
    x = np.random.default_rng(0).integers(0, 2**32, (2, 3, 5, 4), np.uint32).view(np.float32)  # NaN of every kind
    fast = executable.to_concrete(c.graph, ((f32(None, None, 3, 4),), {}))
    np.testing.assert_array_equal(
        np.asarray(tf.nest.flatten(fast(tf.constant(x)))[0]).view(np.uint32), x.transpose(0, 2, 1, 3).view(np.uint32)
    )


@pytest.mark.parametrize("kind", [tf.bfloat16, tf.float16])
def test_two_bytes(kind):
    @tf.function(input_signature=[f32(None, 3, 4)])
    def f(x):
        return tf.cast(tf.transpose(tf.cast(x, kind), [1, 0, 2]), tf.float32)

    fast = tfvllm.simplify(f)
    assert fast.report.rules[RULE] == 1
    x = tf.random.stateless_normal((5, 3, 4), [1, 2])
    np.testing.assert_array_equal(fast(x), f(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: tf.transpose(x, [0, 2, 1]),  # the last axis moves
        lambda x: tf.transpose(tf.cast(x, tf.int32), [1, 0, 2]),
        lambda x: tf.transpose(x, tf.argsort(tf.shape(x))),  # known when the graph runs
    ],
    ids=["last axis", "integers", "unknown order"],
)
def test_left_alone(function):
    check(function, [f32(3, 4, 5)], RULE, 0, special=False)


def test_read_back_as_floats(tmp_path):
    """A simplified model is simplified again: rules and the float64 reference see transposes of floats."""
    w = tf.Variable(tf.random.stateless_normal((4, 6), [3, 4]))

    @tf.function(input_signature=[f32(None, 3, 4)])
    def f(x):
        return tf.transpose(x, [1, 0, 2]) @ w

    module = tf.Module()
    module.w = w
    tf.saved_model.save(module, str(tmp_path / "a"), signatures=f)
    for source, destination in ("ab", "bc"):
        report = tfvllm.simplify_saved_model(tmp_path / source, tmp_path / destination)
        assert report.rules[RULE] == 1 and report.main.verification["reference"] == "float64"
    kept = loading.load(tmp_path / "c").signatures["serving_default"].graph
    assert [n.output.dtype for n in kept.live() if n.op == "Transpose"] == [tf.float32]

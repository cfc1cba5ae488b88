"""Products in bfloat16, except those that measurement shows to cost too much."""

import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.rules.checks import f32, weight


@pytest.mark.parametrize("target", ["portable", "onednn"])
def test_products_that_cancel_stay_in_float32(target):
    w, small = weight(64, 64), weight(64, 64, seed=5, scale=0.01)
    close, fine = tf.Variable(w + small), weight(64, 64, seed=9, scale=0.01)

    def cancel(x, z):
        return (x @ close - tf.nn.relu(z) @ w) + x @ fine

    call = tf.function(cancel, autograph=False, input_signature=[f32(None, 64), f32(None, 64, name="z")])
    x = np.abs(np.random.default_rng(0).normal(0, 1, (32, 64)).astype(np.float32))
    fast = tfvllm.simplify(call, target=target, precision="bfloat16", inputs=(x, x), rules=["-algebra", "-merge"])
    products = [n.output.dtype for n in fast.graph.live() if "MatMul" in n.op]
    assert sorted(d.name for d in products) == ["bfloat16", "float32", "float32"]
    reasons = [d["reason"] for d in fast.report.declined if d["rule"] == "LowerProducts"]
    assert len(reasons) == 2
    assert all("kept in float32: in bfloat16 it alone moves the result by" in r for r in reasons)
    wanted = call(tf.constant(x), tf.constant(x)).numpy()
    error = np.abs(fast(x, x).numpy() - wanted).max() / np.abs(wanted).max()
    assert 1e-5 < error < 0.05


def test_what_is_blanked_between_two_products_is_never_wide():
    w, v = weight(32, 32), weight(32, 32, seed=2)

    def blanked(x, mask):
        y = tf.where(mask[:, None], x @ w, 0.0)
        return tf.reshape(y, [tf.shape(y)[0], 32]) @ v

    call = tf.function(blanked, autograph=False, input_signature=[f32(None, 32), tf.TensorSpec([None], tf.bool)])
    fast = tfvllm.simplify(call, precision="bfloat16")
    assert fast.report.rules["SinkCastBelowMask"] == 1
    assert [n.output.dtype.name for n in fast.graph.live() if n.op == "SelectV2"] == ["bfloat16"]
    assert sum(n.op == "Cast" for n in fast.graph.live()) == 2  # the input's and the result's
    x, mask = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32), np.array([1, 0, 1, 1, 0], bool)
    wanted = call(tf.constant(x), tf.constant(mask)).numpy()
    np.testing.assert_allclose(fast(x, mask), wanted, atol=0.03 * np.abs(wanted).max())
    assert not fast(x, mask).numpy()[~mask].any()


def attention(masked, width=32, low=-1e9):
    """x [batch, length, width], keep [batch, length] -> self-attention, its scores masked in one of three ways."""
    q, k, v = (weight(width, width, seed=seed, scale=0.2) for seed in range(3))

    def attend(x, keep):
        scores = tf.matmul(x @ q, x @ k, transpose_b=True)
        if masked == "added":
            scores += tf.where(keep, 0.0, low)[:, None]
        elif masked == "chosen":
            scores = tf.where(keep[:, None], scores, low)
        return tf.nn.softmax(scores) @ (x @ v)

    specs = [f32(None, None, width), tf.TensorSpec([None, None], tf.bool, "keep")]
    return tf.function(attend, autograph=False, input_signature=specs)


def masked_rows(width=32):
    x = np.random.default_rng(0).normal(0, 0.2, (4, 7, width)).astype(np.float32)
    return x, np.arange(7) < np.array([[7], [3], [1], [0]])  # the last row has no position at all


@pytest.mark.parametrize("masked", ["added", "chosen", "none"])
def test_scores_are_never_wide(masked):
    call = attention(masked)
    fast = tfvllm.simplify(call, target="onednn", precision="bfloat16")
    assert fast.report.rules["LowerSoftmax"] == 1
    assert [n.output.dtype.name for n in fast.graph.live() if n.op == "Softmax"] == ["bfloat16"]
    x, keep = masked_rows()
    wanted = call(tf.constant(x), tf.constant(keep)).numpy()
    np.testing.assert_allclose(fast(x, keep), wanted, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize("masked", ["added", "chosen"])
def test_a_mask_that_is_finite_in_float32_only_stays_there(masked):
    call = attention(masked, low=float(tf.float32.min))
    fast = tfvllm.simplify(call, target="onednn", precision="bfloat16")
    assert "LowerSoftmax" not in fast.report.rules
    x, keep = masked_rows()
    wanted = call(tf.constant(x), tf.constant(keep)).numpy()
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(fast(x, keep), wanted, atol=0.02 * np.abs(wanted).max())


def test_scores_that_are_read_in_float32_too_stay_so():
    call = attention("none")

    def both(x, keep):
        y = call(x, keep)
        return y, tf.nn.softmax(tf.matmul(x, x, transpose_b=True))

    call2 = tf.function(both, autograph=False, input_signature=call.input_signature)
    fast = tfvllm.simplify(call2, target="onednn", precision="bfloat16")
    assert sorted(n.output.dtype.name for n in fast.graph.live() if n.op == "Softmax") == ["bfloat16", "float32"]

import os
import subprocess
import sys

import pytest
import tensorflow as tf

from tests.rules.checks import check, f32

RULE = "SharedMask"
HEADS = [f32(3, 2, 5, 4, name="q"), f32(3, 2, 5, 4, name="k")]


def causal(length=5):
    return tf.where(tf.linalg.band_part(tf.ones([1, 1, length, length]), -1, 0) > 0, 0.0, -1e9)


def test_the_axes_go():
    for scores in (
        lambda q, k: tf.matmul(q, k, transpose_b=True) * 0.3 + causal(),
        lambda q, k: causal() + 0.3 * tf.matmul(q, k, transpose_b=True),
        lambda q, k: tf.matmul(q * 0.3, k, transpose_b=True) + causal(),
    ):
        c = check(scores, HEADS, RULE, 1, special=False)
        assert sorted(v.rank for v in c.ops("AddV2")[0].inputs) == [2, 4]


def test_lengths_that_are_not_known():
    def scores(q, k, mask):
        return tf.matmul(q * 0.3, k, transpose_b=True) + mask

    heads = [f32(None, 2, None, 4, name="q"), f32(None, 2, None, 4, name="k")]
    mask = f32(1, 1, None, None, name="mask")
    check(scores, [*heads, mask], RULE, 0, reason="widens the scores", generated=False, samples=[])
    fixed = [f32(None, 2, 6, 4, name="q"), f32(None, 2, 6, 4, name="k"), f32(1, 1, 6, 6, name="mask")]
    check(scores, fixed, RULE, 1, special=False)


def test_what_stays():
    def scores(q, k, mask, scale=0.3):
        return tf.matmul(q if scale is None else q * scale, k, transpose_b=True) + mask

    each = f32(3, 1, 5, 5, name="mask")
    for mask in (each, f32(1, 1, 1, 5, name="mask"), f32(1, 2, 5, 5, name="mask")):
        check(scores, [*HEADS, mask], RULE, 0, reason="of all sequences")
    shared = f32(1, 1, 5, 5, name="mask")
    check(lambda q, k, m: scores(q, k, m, None), [*HEADS, shared], RULE, 0, reason="TensorFlow fuses")
    check(scores, [f32(1, 2, 5, 4, name="q"), f32(1, 2, 5, 4, name="k"), shared], RULE, 0, reason="of all sequences")


_PROGRAM = """
import sys
import numpy as np, tensorflow as tf, tfvllm

class Attention(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([4, 3, 20, 8])] * 3)
    def __call__(self, q, k, v):
        mask = tf.where(tf.linalg.band_part(tf.ones([1, 1, 20, 20]), -1, 0) > 0, 0.0, -1e9)
        return tf.matmul(tf.nn.softmax(tf.matmul(q * 0.3, k, transpose_b=True) + mask), v)

attention = Attention().__call__
if sys.argv[1] == "simplified":
    attention = tfvllm.simplify(attention)
print("NOW", flush=True)
x = tf.constant(np.random.default_rng(0).normal(size=(4, 3, 20, 8)).astype(np.float32))
attention(x, x, x)
"""


@pytest.mark.slow
def test_onednn_does_not_fall_back_to_its_reference_code():
    def kernels(which):
        environment = {**os.environ, "ONEDNN_VERBOSE": "1", "TF_ENABLE_ONEDNN_OPTS": "1"}
        run = subprocess.run([sys.executable, "-c", _PROGRAM, which], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return [line for line in run.stdout.split("NOW")[1].split("\n") if "exec,cpu,matmul" in line]

    if not any(",ref" in line for line in kernels("as it is")):
        pytest.skip("this oneDNN has a kernel for such masks")
    assert not any(",ref" in line for line in kernels("simplified"))

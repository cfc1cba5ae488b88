import pytest
import tensorflow as tf

from tests.onednn import by_reference_code, products
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
import numpy as np, tensorflow as tf, tfvllm

class Attention(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([4, 3, 40, 8])] * 3)
    def __call__(self, q, k, v):
        mask = tf.where(tf.linalg.band_part(tf.ones([1, 1, 40, 40]), -1, 0) > 0, 0.0, -1e9)
        return tf.matmul(tf.nn.softmax(tf.matmul(q * 0.3, k, transpose_b=True) + mask), v)

attention = tfvllm.simplify(Attention().__call__)
x = tf.constant(np.random.default_rng(0).normal(size=(4, 3, 40, 8)).astype(np.float32))
print("NOW", flush=True)  # simplify has run the original as well
attention(x, x, x)
"""


@pytest.mark.slow
def test_onednn_does_not_fall_back_to_its_reference_code():
    assert not by_reference_code(products(_PROGRAM))

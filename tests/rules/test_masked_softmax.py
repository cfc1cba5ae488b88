import numpy as np
import tensorflow as tf

from tests.rules.checks import check, f32

RULE = "MaskRowsAfterAttention"
LOW = -1e9  # as Keras has it


def attention(mask, scores, v, low=LOW, other=0.0):
    chances = tf.nn.softmax(tf.where(mask, scores, low))
    return tf.matmul(tf.where(mask, chances, other), v)


def specs(*mask):
    return [tf.TensorSpec(mask, tf.bool, "mask"), f32(2, 3, 5, 7, name="scores"), f32(2, 3, 7, 4, name="v")]


def _sample(shape, rows=()):
    rng = np.random.default_rng(0)
    mask = rng.random(shape) < 0.5
    for row in rows:
        mask[row] = False
    return [mask, rng.normal(0, 20, (2, 3, 5, 7)), rng.normal(size=(2, 3, 7, 4))]


def test_padding_and_causal_masks():
    samples = [_sample((2, 1, 1, 7), rows=[(1,)])]
    c = check(attention, specs(2, 1, 1, 7), RULE, 1, samples=samples, special=False)
    selects = c.ops("SelectV2")
    assert sorted(s.output.shape[-1] for s in selects) == [4, 7]
    check(attention, specs(1, 1, 5, 7), RULE, 1, samples=[_sample((1, 1, 5, 7), rows=[(0, 0, 2)])], special=False)
    check(attention, specs(5, 7), RULE, 1, samples=[_sample((5, 7), rows=[(0,), (3,)])], special=False)


def test_fully_masked_rows_are_zero():
    c = check(attention, specs(2, 1, 1, 7), RULE, 1, samples=[_sample((2, 1, 1, 7), rows=[(0,), (1,)])], special=False)
    assert len(c.ops("Any")) == 1


def test_nan_and_infinite_values_go_the_same_way():
    sample = _sample((2, 1, 1, 7))
    sample[1][0, 0, 0, :] = np.nan
    sample[2][1, 1, 2, :] = np.inf
    check(attention, specs(2, 1, 1, 7), RULE, 1, samples=[sample], special=False)


def test_declines():
    check(lambda m, s, v: attention(m, s, v, low=-100.0), specs(5, 7), RULE, 0, reason="-1e9 or lower", special=False)
    check(lambda m, s, v: attention(m, s, v, other=0.5), specs(5, 7), RULE, 0, reason="not set to 0", special=False)

    def shared(mask, scores, v):
        chances = tf.where(mask, tf.nn.softmax(tf.where(mask, scores, LOW)), 0.0)
        return chances @ v, chances

    check(shared, specs(5, 7), RULE, 0, reason="read elsewhere", special=False)

import numpy as np
import tensorflow as tf

from tests.rules.checks import check, f32
from tests.rules.test_pack_tokens import SAMPLES, SPECS, WIDTH, W, batch, first, layer, mean
from tfvllm.graph import executable

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


def test_the_same_mask_fits_by_construction():
    """The sizes of the chances are what comes of those of mask and scores: unknown ones need not be compared."""
    unknown = [
        tf.TensorSpec([None, 1, 1, None], tf.bool, "mask"),
        f32(None, 3, None, None, name="scores"),
        f32(None, 3, None, 4, name="v"),
    ]
    sample = _sample((2, 1, 1, 7), rows=[(1,)])
    one_row = [sample[0][:1], *sample[1:]]
    check(attention, unknown, RULE, 1, samples=[sample, one_row], generated=False, special=False)


ADDED = ["PackTokens", "MaskByAddition"]


def _packed(function, fires, low=LOW, **options):
    def softmax(mask, scores):
        return tf.nn.softmax(tf.where(mask, scores, low))

    def whole(ids, mask):
        return function(ids, mask, softmax)

    wanted = {"PackTokens": 1, "MaskByAddition": fires}
    return check(whole, SPECS, ADDED, wanted, samples=SAMPLES, generated=False, special=False, **options)


def test_where_keys_are_unpacked_the_mask_is_added():
    """Sequences without any token among the samples: they attend to all positions alike, as before."""
    for pool in (first, mean):
        c = _packed(pool, 2)
        scores = [n for n in c.ops("AddV2") if n.output.rank == 4]
        assert len(scores) == 2 and not [n for n in c.ops("SelectV2") if n.output.shape[1] == 2]


def test_large_scores_are_masked_all_the_same():
    def large(ids, mask, softmax):
        return first(ids, mask, lambda m, s: softmax(m, s * 1e4))

    _packed(large, 2)


def test_the_mask_is_not_added():
    _packed(first, 0, low=-1e4, reason="-1e9 or lower")
    shared = [tf.TensorSpec([2, 1, 1, 7], tf.bool, "mask"), *specs(2, 1, 1, 7)[1:]]
    check(
        lambda m, q, v: tf.matmul(tf.nn.softmax(tf.where(m, tf.matmul(q, v, transpose_b=True), LOW)), v),
        [shared[0], f32(2, 3, 5, 4, name="q"), f32(2, 3, 7, 4, name="v")],
        "MaskByAddition",
        0,
        reason="may be anything",
        special=False,
    )
    check(attention, specs(2, 1, 5, 7), "MaskByAddition", 0, reason="keys alone", special=False)


def test_a_nan_stays_in_its_sequence():
    def function(x, mask):
        return layer(layer(x, mask, W[:3]), mask, W[3:6])[:, 0]

    wanted = [tf.TensorSpec([None, None, WIDTH], tf.float32, "x"), SPECS[1]]
    rules = ["MaskRowsAfterAttention", *ADDED]
    c = check(function, wanted, rules, dict.fromkeys(ADDED[:1], 1) | {"MaskByAddition": 2}, generated=False)
    new = executable.to_concrete(c.graph, (tuple(wanted), {}), pack=list)
    _, mask = batch([3, 5, 0, 6], 6)
    for row, position, bad in ((0, 1, np.nan), (0, 4, np.inf), (1, 0, -np.inf), (2, 5, np.nan), (3, 5, np.inf)):
        x = np.random.default_rng(0).normal(size=(4, 6, WIDTH)).astype(np.float32)
        x[row, position] = bad
        old, found = (f(tf.constant(x), tf.constant(mask)) for f in (function, lambda *a: new(*a)[0]))
        was = np.isnan(old).any(1)
        assert not np.any(np.isnan(found).any(1) & ~was)
        np.testing.assert_allclose(found[~was], old[~was], rtol=1e-4, atol=1e-5)

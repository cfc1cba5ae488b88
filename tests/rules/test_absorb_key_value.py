import numpy as np
import pytest
import tensorflow as tf

from tests.rules.checks import check, f32, weight
from tfvllm.graph import padding
from tfvllm.simplifier import cost

RULE = "AbsorbKeyValueProjections"
WIDTH, HEADS, SIZE = 10, 2, 4


class Layer:
    """Attention as Keras has it after its einsums are products: heads cut out of flat products of weights."""

    def __init__(self, width=WIDTH, heads=HEADS, size=SIZE, value_size=SIZE, bias=True):
        self.width, self.heads, self.sizes = width, heads, (size, size, value_size)
        self.weights = [weight(width, heads * n, seed=i) for i, n in enumerate(self.sizes)]
        self.biases = [weight(heads * n, seed=9 + i) if bias else None for i, n in enumerate(self.sizes)]

    def projected(self, x, i):
        y = tf.matmul(tf.reshape(x, [-1, self.width]), self.weights[i])
        y = y if self.biases[i] is None else tf.nn.bias_add(y, self.biases[i])
        return tf.reshape(y, [tf.shape(x)[0], x.shape[1] or tf.shape(x)[1], self.heads, self.sizes[i]])

    def __call__(self, x, mask=None, turned=False, blank=False, rows=1, low=-1e9):
        first = x[:, :rows] if rows > 1 else tf.expand_dims(x[:, 0], 1)
        q = tf.transpose(self.projected(first, 0), [0, 2, 1, 3]) * 0.5
        k = tf.transpose(self.projected(x, 1), [0, 2, 3, 1] if turned else [0, 2, 1, 3])
        v = tf.transpose(self.projected(x, 2), [0, 2, 1, 3])
        scores = tf.raw_ops.BatchMatMulV2(x=q, y=k, adj_y=not turned)
        if mask is not None:
            scores = tf.where(mask, scores, low)
        chances = tf.nn.softmax(scores)
        if blank:
            chances = tf.where(mask, chances, 0.0)
        return tf.raw_ops.BatchMatMulV2(x=chances, y=v)


X = f32(None, None, WIDTH)
MASK = tf.TensorSpec([None, None], tf.bool, "mask")


def samples(*shapes):
    rng = np.random.default_rng(3)
    made = []
    for batch, length in shapes:
        mask = np.arange(length) < rng.integers(0, length + 1, (batch, 1))  # rows without any position among them
        made.append([rng.normal(size=(batch, length, WIDTH)).astype(np.float32), mask])
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_keys_and_values_are_not_computed(bias, turned):
    layer = Layer(bias=bias)
    c = check(lambda x: layer(x, turned=turned), [X], RULE, 1, special=False)
    assert len(c.ops("MatMul")) == 1  # the query's
    assert len(c.ops("BatchMatMulV2")) == 2 and len(c.ops("BatchMatMulV3")) == 2
    assert len(c.ops("BiasAdd")) == bias
    keys = c.ops("BatchMatMulV2")[0]
    assert keys.output.shape[1:3] == (1, HEADS) and keys.inputs[1].shape[3] == WIDTH
    before, after = (cost.count(g, cost.example_sizes(g, batch=2, length=50))["flops"] for g in (c.before, c.graph))
    assert after < before / 3


@pytest.mark.parametrize("blank", [True, False])
def test_masks_go_with_the_scores(blank):
    layer = Layer()
    shapes = samples((1, 1), (3, 7), (5, 2), (2, 64))
    c = check(
        lambda x, m: layer(x, m[:, None, None, :], blank=blank),
        [X, MASK],
        RULE,
        1,
        special=False,
        samples=shapes,
        generated=False,
    )
    assert len(c.ops("Sum")) == 1 + blank  # of chances that need not add up to 1


def test_a_mask_for_each_head():
    layer, whole = Layer(), tf.TensorSpec([None, HEADS, 1, None], tf.bool)
    c = check(layer, [X, whole], RULE, 1, special=False, generated=False, samples=[
        [np.random.default_rng(1).normal(size=(3, 6, WIDTH)).astype(np.float32),
         np.random.default_rng(2).random((3, HEADS, 1, 6)) < 0.6],
    ])  # fmt: skip
    assert c.ops("SelectV2")[0].inputs[0].shape[1:3] == (1, HEADS)


def test_values_of_another_size():
    layer = Layer(size=3, value_size=5)
    check(lambda x: layer(x), [X], RULE, 1, special=False)


def test_keys_and_values_of_another_sequence():
    layer = Layer()

    def crossed(x, memory):
        q = tf.transpose(layer.projected(x, 0), [0, 2, 1, 3])
        k, v = (tf.transpose(layer.projected(memory, i), [0, 2, 1, 3]) for i in (1, 2))
        return tf.matmul(tf.nn.softmax(tf.matmul(q, k, transpose_b=True)), v)

    check(crossed, [f32(3, 1, WIDTH), f32(3, None, WIDTH)], RULE, 1, special=False)


def test_what_stays():
    layer = Layer()
    check(lambda x: layer(x, rows=2), [f32(2, 5, WIDTH)], RULE, 0)

    def keys_read(x):
        q, k, v = (tf.transpose(layer.projected(y, i), [0, 2, 1, 3]) for i, y in enumerate((x[:, None, 0], x, x)))
        return tf.matmul(tf.nn.softmax(tf.matmul(q, k, transpose_b=True)), v), tf.reduce_sum(k)

    check(keys_read, [X], RULE, 0, reason="the keys are read elsewhere", special=False)

    def weight_read(x):
        return layer(x), tf.matmul(tf.reshape(x, [-1, WIDTH]), layer.weights[2])

    big = Layer(width=300, heads=4, size=64, value_size=64)  # small weights may be stored twice
    wide = f32(None, None, 300)
    check(lambda x: (big(x), tf.matmul(x[0], big.weights[1])), [wide], RULE, 0, reason="stored twice", special=False)
    check(weight_read, [X], RULE, 1, special=False)

    def given(q, k, v):
        return tf.matmul(tf.nn.softmax(tf.matmul(q, k, transpose_b=True)), v)

    check(given, [f32(2, 2, 1, 4), *[f32(2, 2, None, 4)] * 2], RULE, 0, reason="not the heads of a product")


def test_several_rows_of_a_mask():
    layer = Layer()

    def wide_mask(x, mask):  # one query, a mask of several rows: the scores are widened
        return layer(x, mask)

    check(
        wide_mask,
        [f32(2, 5, WIDTH), tf.TensorSpec([2, 1, 3, 5], tf.bool)],
        RULE,
        0,
        reason="several rows",
        special=False,
    )


def test_padding_is_still_proved_silent():
    layer = Layer()
    c = check(
        lambda x, m: layer(x, m[:, None, None, :]), [X, MASK], RULE, 1, special=False, generated=False,
        samples=samples((2, 3)),
    )  # fmt: skip
    analysis = padding.analyse(c.graph)
    assert analysis is not None and len(analysis.silenced) == 1
    x = next(v for v in c.graph.inputs.values() if v.dtype == tf.float32)
    assert any(t.axes == (0, 1) for t in analysis.demanded[x])
    reader = next(n for n in c.ops("BatchMatMulV2") if n in analysis.silenced)
    assert any(t.axes == (0, 2) for t in analysis.demanded[reader.inputs[1]])


def test_a_classifier_that_reads_position_0():
    """Through the whole pipeline: the last layer computes neither keys nor values, and the answers stay."""
    import keras_nlp

    import tfvllm

    backbone = keras_nlp.models.BertBackbone(
        vocabulary_size=50, num_layers=2, num_heads=2, hidden_dim=16, intermediate_dim=24
    )
    model = keras_nlp.models.BertTextClassifier(backbone, num_classes=3, preprocessor=None)
    fast = tfvllm.simplify(model)
    assert fast.report.rules[RULE] == 1 and fast.report.rules["PackTokens"] == 1
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 50, (4, 11)).astype(np.int32)
    lengths = np.array([[11], [1], [0], [6]])
    inputs = {"token_ids": ids, "segment_ids": 0 * ids, "padding_mask": (np.arange(11) < lengths).astype(np.int32)}
    np.testing.assert_allclose(fast(inputs), model(inputs), atol=2e-6)

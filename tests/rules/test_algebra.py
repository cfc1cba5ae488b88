import numpy as np
import pytest
import tensorflow as tf

from tests.rules.checks import check, f32, weight
from tfvllm.graph import executable, importer
from tfvllm.graph.rewriter import Rewriter
from tfvllm.rules import pipeline


def test_two_products_become_one():
    c = check(
        lambda x, y: x * 3.0 + y * 3.0,
        [f32(4, 3), f32(4, 3, name="y")],
        ["FactorOut", "MergeDuplicates"],
        {"FactorOut": 1},
    )
    assert len(c.ops("Mul")) == 1 and len(c.ops("AddV2")) == 1
    w = weight(3)
    c = check(
        lambda x: w * x - tf.exp(x) * w,
        [f32(None, 3)],
        ["FactorOut", "MergeDuplicates"],
        {"FactorOut": 1},
        special=False,
    )
    assert len(c.ops("Mul")) == 1 and len(c.ops("Sub")) == 1
    c = check(lambda x, c: x / c + tf.tanh(x) / c, [f32(None, 3), f32(3, name="c")], "FactorOut", 1, special=False)
    assert len(c.ops("RealDiv")) == 1


def test_factor_out_declines():
    def shared(x, c):
        y = x * c
        return y + tf.exp(x) * c, y

    specs = [f32(None, 3), f32(3, name="c")]
    check(shared, specs, "FactorOut", 0, reason="read elsewhere", special=False)
    check(
        lambda x, c: x * c + tf.reduce_sum(x, 0, keepdims=True) * c,
        [f32(4, 3), f32(3, name="c")],
        "FactorOut",
        0,
        reason="unlike shapes",
        special=False,
    )
    check(lambda x, c: x * c + tf.exp(x) / c, specs, "FactorOut", 0, special=False)
    ints = [tf.TensorSpec([None], tf.int32, "x"), tf.TensorSpec([None], tf.int32, "y")]
    check(lambda x, y: x * 3 + y * 3, ints, "FactorOut", 0)


def test_constant_factors_join():
    c = check(lambda x: x * 0.3 * 0.7, [f32(None, 5)], "JoinFactors", 1)
    (product,) = c.ops("Mul")
    assert product.inputs[1].node.attr("value") == pytest.approx(0.21)
    check(lambda x: x / 7.0 * tf.constant([1.0, 2.0, 3.0]), [f32(None, 3)], "JoinFactors", 1)


def test_factors_that_would_overflow_stay_apart():
    for a, b in ((1e30, 1e30), (1e-30, 1e-30), (np.inf, 0.5), (np.nan, 1.5)):
        check(lambda x, a=a, b=b: x * a * b, [f32(None, 3)], "JoinFactors", 0, reason="ordinary numbers")


def test_terms_join():
    a, b = weight(5), weight(1, 1, 5)
    c = check(lambda x: tf.nn.bias_add(x, a) + b, [f32(2, 3, 5)], "JoinTerms", 1)
    assert len(c.ops("BiasAdd")) == 1
    check(lambda x: x + 1.5 + a, [f32(None, 5)], "JoinTerms", 1)
    matrix = weight(4, 5)
    check(lambda x: x + a + matrix, [f32(4, 5)], "JoinTerms", 0, reason="more than one number")
    check(lambda x, y: x + a + y, [f32(4, 5), f32(4, 5, name="y")], "JoinTerms", 0)

    def shared(x):
        y = x + a
        return y + 1.0, y

    check(shared, [f32(None, 5)], "JoinTerms", 0, reason="read elsewhere")


def test_signs():
    specs = [f32(None, 12), f32(None, 12, name="y")]
    samples = [
        [
            [[0.0, -0.0, 0.0, -0.0, np.inf, -np.inf, np.nan, 1, 2, 3, 4, 5]],
            [[0.0, 0.0, -0.0, -0.0, np.inf, np.inf, 1, 1, 2, 3, 4, 5]],
        ]
    ]
    for function in (lambda x, y: x + -y, lambda x, y: x - -y, lambda x, y: tf.negative(-x) * y, lambda x, y: -x * -y):
        c = check(function, specs, "Signs", 1, samples=samples)
        assert not c.ops("Neg")


@pytest.mark.parametrize("power, op", [(2.0, "Square"), (3.0, "Mul")])
def test_small_powers(power, op):
    c = check(lambda x: x**power, [f32(None, 9)], "SmallPowers", 1)
    assert c.ops(op) and not c.ops("Pow")


def test_other_powers_stay():
    for power in (0.5, -1.0, 2.5, 4.0):
        check(lambda x, p=power: x**p, [f32(None, 9)], "SmallPowers", 0, reason="not 2 or 3")
    check(lambda x: tf.constant(2.0) ** x, [f32(None, 9)], "SmallPowers", 0)
    check(lambda x: x ** tf.constant([2.0, 2.0]), [f32(None, 1)], "SmallPowers", 0, reason="not 2 or 3")


def test_worked_example():
    """Additions A and B, multiplications C and D by one factor, convolution E: C and D merge into F.

    conv(A·c + B·c), A = x + a, B = y + b   becomes   conv((A + B)·c).
    """
    kernel, a, b = weight(3, 3, 4, 6), weight(4, seed=1), weight(4, seed=2)
    factor = weight(4, seed=3)

    @tf.function(input_signature=[f32(None, 8, 8, 4), f32(None, 8, 8, 4, name="y")])
    def article(x, y):
        c, d = (x + a) * factor, (y + b) * factor
        return tf.nn.conv2d(c + d, kernel, 1, "SAME")

    graph = importer.from_concrete(article.get_concrete_function())

    def count(g, op):
        return sum(n.op == op for n in g.live())

    assert (count(graph, "Mul"), count(graph, "AddV2"), count(graph, "Conv2D")) == (2, 3, 1)
    rewriter = Rewriter(graph.copy())
    rewriter.run(pipeline())
    assert rewriter.counts["FactorOut"] == 1  # C and D into F
    assert count(rewriter.graph, "Mul") == 1 and count(rewriter.graph, "Conv2D") == 1
    after = executable.to_concrete(
        rewriter.graph, article.get_concrete_function().structured_input_signature, pack=list
    )
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        x, y = (tf.constant(rng.normal(size=(batch, 8, 8, 4)), tf.float32) for _ in range(2))
        np.testing.assert_allclose(after(x, y)[0], article(x, y), rtol=0, atol=2e-5)

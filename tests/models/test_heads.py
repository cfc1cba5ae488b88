"""Whether a model gives logits or probabilities: by its operations and its values, and asked where they do not tell."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from tfvllm.errors import InputError
from tfvllm.families.heads import Head, head_of, look


def net(tail):
    inputs = keras.Input((4,))
    return keras.Model(inputs, tail(layers.Dense(8, "relu")(inputs)))


def dense(units=3, **options):
    return layers.Dense(units, kernel_initializer="glorot_normal", **options)


def by_hand(hidden):
    exponents = ops.exp(dense()(hidden))
    return exponents / ops.sum(exponents, axis=-1, keepdims=True)


def experts(hidden):
    gate, each = ops.softmax(dense(2)(hidden)), ops.softmax(layers.Reshape((2, 3))(dense(6)(hidden)))
    return ops.einsum("be,bec->bc", gate, each)


def softmaxes(count, hidden):
    return [dense(activation="softmax")(hidden) for _ in range(count)]


HEADS = {
    "no activation": (lambda h: dense()(h), "logits"),
    "an activation": (lambda h: dense(activation="softmax")(h), "softmax"),
    "a Softmax layer": (lambda h: layers.Softmax()(dense()(h)), "softmax"),
    "an operation": (lambda h: ops.softmax(dense()(h)), "softmax"),
    "behind Dropout": (lambda h: layers.Dropout(0.5)(dense(activation="softmax")(h)), "softmax"),
    "an average": (lambda h: layers.Average()(softmaxes(3, h)), "softmax"),
    "an average by hand": (lambda h: (softmaxes(1, h)[0] + softmaxes(1, h)[0]) * 0.5, "softmax"),
    "a mean of a stack": (lambda h: ops.mean(ops.stack(softmaxes(2, h), axis=1), axis=1), "softmax"),
    "another shape": (lambda h: layers.Reshape((3,))(layers.Softmax()(layers.Reshape((1, 3))(dense()(h)))), "softmax"),
    "a temperature": (lambda h: ops.softmax(dense()(h) / 2.0), "softmax"),
    "kept from zero": (lambda h: ops.clip(ops.softmax(dense()(h)), 1e-7, 1.0), "softmax"),
    "by hand": (by_hand, "softmax"),
    "mixed experts": (experts, "softmax"),
    "log of a softmax": (lambda h: ops.log(ops.softmax(dense()(h))), "logits"),
    "log_softmax": (lambda h: ops.log_softmax(dense()(h)), "logits"),
    "a soft cap": (lambda h: 30.0 * ops.tanh(dense()(h) / 30.0), "logits"),
    "a norm": (lambda h: layers.LayerNormalization()(dense()(h)), "logits"),
    "zeros": (lambda h: layers.Dense(3, kernel_initializer="zeros")(h), "logits"),
    "one logit": (lambda h: dense(1)(h), "logits"),
    "a sigmoid": (lambda h: dense(activation="sigmoid")(h), "sigmoid"),
    "one sigmoid": (lambda h: layers.Activation("sigmoid")(dense(1)(h)), "sigmoid"),
    "averaged sigmoids": (lambda h: layers.Average()([ops.sigmoid(dense()(h)), ops.sigmoid(dense()(h))]), "sigmoid"),
    "two even sigmoids": (lambda h: layers.Dense(2, "sigmoid", kernel_initializer="zeros")(h), "sigmoid"),
}


@pytest.mark.parametrize("name", HEADS)
def test_functional_models(name):
    tail, kind = HEADS[name]
    assert head_of(net(tail)).kind == kind


ASKED = {
    "a product whose rows sum to one": lambda h: layers.Dense(
        2, kernel_initializer="zeros", bias_initializer=keras.initializers.Constant(0.5)
    )(h),
    "percentages": lambda h: 100.0 * ops.softmax(dense()(h)),
    "a softmax over another axis": lambda h: layers.Softmax(axis=1)(layers.Reshape((4, 2))(h)),
    "clipped to [0, 1]": lambda h: ops.clip(dense()(h), 0.0, 1.0),
    "half of a softmax": lambda h: dense(activation="softmax")(h) * 0.5,
}


@pytest.mark.parametrize("name", ASKED)
def test_what_cannot_be_told_is_asked(name):
    model = net(ASKED[name])
    with pytest.raises(InputError, match=r"cannot tell whether .* Pass from_logits=True .* or from_logits=False"):
        head_of(model)
    assert head_of(model, from_logits=True).kind == "logits"
    if name == "percentages":
        with pytest.raises(InputError, match=r"gives no probabilities: its values leave \[0, 1\]"):
            head_of(model, from_logits=False)
    elif name == "a product whose rows sum to one":
        assert head_of(model, from_logits=False).kind == "softmax"


def test_the_callers_word_does_not_overrule_what_is_plain():
    with pytest.raises(InputError, match=r"from_logits=True, but .* ends in a softmax"):
        head_of(net(lambda h: ops.softmax(dense()(h))), from_logits=True)
    with pytest.raises(InputError, match=r"from_logits=False, but .* gives no probabilities"):
        head_of(net(lambda h: dense()(h)), from_logits=False)
    with pytest.raises(InputError, match=r"softmax over one class, which is always 1"):
        head_of(net(lambda h: dense(1, activation="softmax")(h)))
    with pytest.raises(InputError, match=r"expected from_logits=True"):
        head_of(net(lambda h: dense()(h)), from_logits="yes")


class Sub(keras.Model):
    """A model whose last attribute is not its head."""

    def __init__(self, head, **options):
        super().__init__(**options)
        self.first = dense()
        self.head = head
        self.last = dense(2, activation="softmax")

    def call(self, inputs):
        return self.head(self.first(inputs))


@pytest.mark.parametrize(
    ("head", "kind"), [(ops.softmax, "softmax"), (lambda x: x, "logits"), (ops.sigmoid, "sigmoid")]
)
def test_subclassed_models(head, kind):
    model, x = Sub(head), np.ones((2, 4), "float32")
    with pytest.raises(InputError, match=r"without an input"):
        head_of(model)
    model(x)
    assert head_of(model, x).kind == kind
    inside = keras.Sequential([keras.Input((4,)), model, layers.Identity()])
    assert head_of(inside).kind == kind


def test_nested_and_shared_models():
    inner = net(lambda h: layers.Softmax()(dense()(h)))
    inputs = keras.Input((4,))
    assert head_of(keras.Model(inputs, inner(inputs))).kind == "softmax"
    twice = keras.Model(inputs, layers.Average()([inner(inputs), inner(inputs * 2.0)]))
    assert head_of(twice).kind == "softmax"
    plain = net(lambda h: dense()(h))
    assert head_of(keras.Model(inputs, ops.softmax(plain(inputs)))).kind == "softmax"
    assert head_of(keras.Sequential([inner, dense()])).kind == "logits"


def test_inside_a_function():
    model, found = net(lambda h: layers.Softmax()(dense()(h))), []

    @tf.function
    def run(x):
        answer = model(x)
        found.append(head_of(model, x, answer=answer))
        return answer

    run(tf.ones((2, 4)))
    assert [head.kind for head in found] == ["softmax"]


@pytest.mark.parametrize("policy", ["bfloat16", pytest.param("mixed_float16", marks=pytest.mark.thorough)])
def test_coarse_dtypes(policy):
    inputs = keras.Input((4,))
    tail = layers.Dense(40, "softmax", dtype=policy)
    assert head_of(keras.Model(inputs, tail(layers.Dense(8, dtype=policy)(inputs)))).kind == "softmax"
    assert head_of(keras.Model(inputs, layers.Dense(40, dtype=policy)(inputs))).kind == "logits"


def test_logits_behind_probabilities():
    z = np.array([[2.0, -1.0, 0.5], [30.0, -30.0, 0.0]], "float32")
    p = tf.nn.softmax(z)
    assert Head("logits").logits(z) is z
    np.testing.assert_allclose(tf.nn.softmax(Head("softmax").logits(p) / 2), tf.nn.softmax(z / 2), rtol=1e-5)
    np.testing.assert_allclose(Head("sigmoid").logits(tf.sigmoid(z[0])), z[0], rtol=1e-5)
    edge = Head("sigmoid").logits(tf.constant([0.0, 1.0]))
    assert np.isfinite(edge).all() and edge[0] < -80 and edge[1] > 16
    zero = Head("softmax").logits(tf.constant([0.0, 1.0]))
    assert zero[1] == 0 and -86 < zero[0] < -85


def test_a_look():
    assert look(np.array([[0.25, 0.75], [1.0, 0.0]])) == ("simplex", True)
    assert look(np.array([[0.25, 0.7]])) == ("unit", False)
    assert look(np.array([[0.25], [0.75]])) == ("unit", True)
    assert look(np.array([[1.5, -0.5]])).range == "beyond"
    assert look(np.array([[np.nan, 1.0], [0.5, 0.5]])).range == "simplex"
    assert look(np.full((2, 2), np.nan)) is None

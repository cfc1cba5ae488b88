"""What `simplify` is traced with: sizes that a model leaves open stay open, and `inputs` come in every usual form."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfvllm
from tfvllm.errors import InputError
from tfvllm.simplifier import tracing


def specs(model, inputs=None):
    return tracing.traced(model, inputs).structured_input_signature[0][0]


def sequence_model():
    ids = keras.Input((None, 3), name="rows")
    return keras.Model(ids, layers.Dense(2)(ids))


X = np.ones((2, 5, 3), "float32")


@pytest.mark.parametrize("inputs", [None, X, (X,), [X]], ids=["none", "array", "tuple", "list"])
def test_open_sizes_stay_open(inputs):
    assert specs(sequence_model(), inputs).shape.as_list() == [None, None, 3]


def test_by_name_and_two_inputs():
    one, two = keras.Input((None,), name="one"), keras.Input((3,), name="two")
    answer = layers.Dense(2)(layers.Concatenate()([layers.Dense(4)(two), two])) + keras.ops.sum(one, -1, keepdims=True)
    x = {"one": np.ones((2, 7), "float32"), "two": np.ones((2, 3), "float32")}
    named = specs(keras.Model({"one": one, "two": two}, answer), x)
    assert {name: spec.shape.as_list() for name, spec in named.items()} == {"one": [None, None], "two": [None, 3]}
    listed = specs(keras.Model([one, two], answer), (x["one"], x["two"]))
    assert [spec.shape.as_list() for spec in listed] == [[None, None], [None, 3]]
    with pytest.raises(InputError, match=r"the model reads 2 tensors, found 1"):
        specs(keras.Model([one, two], answer), (x["one"],))


class Sub(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, rows):
        return self.dense(rows)


def test_a_built_subclassed_model_is_told_what_to_pass():
    model = Sub()
    model(X)
    with pytest.raises(
        InputError, match=r"Sub is built, but a subclassed model does not say what it reads. Pass inputs="
    ):
        tfvllm.simplify(model)
    assert specs(model, X).shape.as_list() == [None, 5, 3]
    assert specs(model, (X,)).shape.as_list() == [None, 5, 3]
    assert specs(model, tf.TensorSpec([None, None, 3])).shape.as_list() == [None, None, 3]
    with pytest.raises(InputError, match=r"build the model, or pass inputs"):
        tfvllm.simplify(Sub())


def test_the_answer_for_other_lengths():
    model = Sub()
    model(X)
    fast = tfvllm.simplify(model, inputs=tf.TensorSpec([None, None, 3]))
    longer = np.random.default_rng(0).normal(size=(3, 9, 3)).astype("float32")
    np.testing.assert_allclose(np.asarray(tf.nest.flatten(fast(longer))[0]), model(longer), rtol=1e-5, atol=1e-6)

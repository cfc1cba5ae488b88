"""Keras's preprocessing layers inside a model: captured strings, tables, files; by the exact values they give."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tfvllm.graph import importer
from tfvllm.savedmodel import read

TEXTS = np.array(["the cat", "", "a dog ran fast, and far"], object)
WORDS = np.array([["a", "zz"], ["c", ""]], object)
L = keras.layers


def vectorizer(**options):
    layer = L.TextVectorization(max_tokens=20, **options)
    layer.adapt(["the cat sat", "the dog ran fast"])
    return layer


def normalization():
    layer = L.Normalization()
    layer.adapt(np.float32([[1, 2], [3, 6], [8, 4]]))
    return layer


def own_vocabulary(folder):
    file = folder / "words.txt"
    file.write_text("a\nb\nc\n")
    return L.StringLookup(vocabulary=str(file))


# name -> (the layer, the shape of its input, values)
LAYERS = {
    "ids": (lambda _: vectorizer(output_mode="int", output_sequence_length=6), [], TEXTS),
    "ids of the longest": (lambda _: vectorizer(output_mode="int"), [], TEXTS),
    "several hot": (lambda _: vectorizer(output_mode="multi_hot"), [], TEXTS),
    "counts of pairs": (lambda _: vectorizer(output_mode="count", ngrams=2), [], TEXTS),
    "lookup": (lambda _: L.StringLookup(vocabulary=["a", "b", "c"]), [2], WORDS),
    "lookup in a file": (own_vocabulary, [2], WORDS),
    "lookup of strings": (
        lambda _: L.StringLookup(vocabulary=["a", "b"], invert=True),
        [2],
        np.int64([[1, 2], [0, 1]]),
    ),
    "integer lookup": (lambda _: L.IntegerLookup(vocabulary=[5, 7]), [2], np.int64([[5, 2], [7, 7]])),
    "hashing": (lambda _: L.Hashing(num_bins=7), [2], WORDS),
    "categories": (
        lambda _: L.CategoryEncoding(num_tokens=4, output_mode="multi_hot"),
        [2],
        np.int64([[1, 2], [3, 0]]),
    ),
    "bins": (lambda _: L.Discretization(bin_boundaries=[0.0, 1.0, 2.0]), [2], np.float32([[-1, 0.5], [1, 9]])),
    "normalization": (lambda _: normalization(), [2], np.float32([[-1, 0.5], [1, 9], [0, 0]])),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, tmp_path):
    make, shape, x = LAYERS[name]
    dtype = "string" if x.dtype == object else x.dtype.name
    inputs = keras.Input(shape, dtype=dtype)
    model = keras.Model(inputs, make(tmp_path)(inputs))
    want = tf.convert_to_tensor(model(tf.constant(x))).numpy()
    fast = tfvllm.simplify(model)
    found = fast(x).numpy()
    assert found.dtype == want.dtype
    if want.dtype == np.float32:
        np.testing.assert_allclose(found, want, rtol=1e-6)
    else:
        np.testing.assert_array_equal(found, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_saved(name, tmp_path):
    make, shape, x = LAYERS[name]
    inputs = keras.Input(shape, dtype="string" if x.dtype == object else x.dtype.name)
    model = keras.Model(inputs, make(tmp_path)(inputs))
    want = tf.convert_to_tensor(model(tf.constant(x))).numpy()
    model.export(str(tmp_path / "1"), verbose=False)
    tfvllm.simplify_saved_model(tmp_path / "1", tmp_path / "2")
    (tmp_path / "words.txt").unlink(missing_ok=True)  # the vocabulary travels as an asset
    (found,) = read.load(tmp_path / "2").signatures["serving_default"](tf.constant(x)).values()
    if want.dtype == np.float32:
        np.testing.assert_allclose(found, want, rtol=1e-6)
    else:
        np.testing.assert_array_equal(found, want)


STRINGS = {"scalar": b"and", "empty": b"", "vector": [b"a", b"", b"\xff\x00z"], "none at all": []}


@pytest.mark.parametrize("name", STRINGS)
def test_captured_strings(name):
    held = tf.constant(STRINGS[name], tf.string)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def join(text):
        return tf.concat([text, tf.reshape(held, [-1])], 0)

    texts = tf.constant(["x", "", "y z"])
    np.testing.assert_array_equal(tfvllm.simplify(join)(texts), join(texts))


def test_a_captured_scalar_is_a_constant():
    held = tf.constant("and")
    function = tf.function(lambda text: text + held, input_signature=[tf.TensorSpec([None], tf.string)])
    graph = importer.from_concrete(function.get_concrete_function())
    assert not graph.captures
    assert [n.attr("value") for n in graph.nodes.values() if n.op == "Const"] == [b"and"]

"""Classifiers whose probabilities are made anywhere: what is served is what the model says, never a second softmax."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfvllm
from tests import tiny_models
from tests.models.test_heads import Sub, dense, net
from tests.tiny_models import TEXTS, keras_scores
from tfvllm.errors import InputError, VerificationError
from tfvllm.export import classify
from tfvllm.families.heads import Head
from tfvllm.savedmodel import parity

X = np.random.default_rng(3).normal(0, 2, (5, 4)).astype("float32")


def wrapped(model):
    inputs = keras.Input((4,))
    return keras.Model(inputs, model(inputs))


HEADS = {
    "a Softmax layer": lambda: net(lambda h: layers.Softmax()(dense()(h))),
    "an operation in a nested model": lambda: keras.Sequential(
        [net(lambda h: ops.softmax(dense()(h))), layers.Identity()]
    ),
    "a subclass": lambda: wrapped(Sub(ops.softmax)),
    "labels that exclude nothing": lambda: net(lambda h: ops.sigmoid(dense()(h))),
    "Dropout behind": lambda: net(lambda h: layers.Dropout(0.5)(layers.Softmax()(dense()(h)))),
    "an average": lambda: net(lambda h: layers.Average()([ops.softmax(dense()(h)), ops.softmax(dense()(h))])),
    "one sigmoid by operation": lambda: net(lambda h: ops.sigmoid(dense(1)(h))),
}
QUICK = ("a Softmax layer", "a subclass")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in HEADS]
)
def test_probabilities_are_served_as_they_are(tmp_path, name):
    model = HEADS[name]()
    path = tfvllm.export(model, tmp_path / "1", "classify", warmup=False)
    run = tf.saved_model.load(str(path)).signatures["serving_default"]
    scores = run(**{key: tf.constant(X) for key in run.structured_input_signature[1]})["scores"]
    expected = np.asarray(model(X))
    expected = np.concatenate([1 - expected, expected], axis=1) if expected.shape[1] == 1 else expected
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert expected.max() > 0.7  # a second softmax of three classes gives 0.58 at most


def test_a_subclass_with_logits_and_a_softmax_aside(tmp_path):
    model = wrapped(Sub(lambda x: x))
    path = tfvllm.export(model, tmp_path / "1", "classify", warmup=False)
    run = tf.saved_model.load(str(path)).signatures["serving_default"]
    scores = run(**{key: tf.constant(X) for key in run.structured_input_signature[1]})["scores"]
    np.testing.assert_allclose(scores, tf.nn.softmax(model(X)), atol=1e-6)


@pytest.mark.thorough
def test_a_text_classifier_with_its_softmax_behind(tmp_path):
    plain = tiny_models.bert_classifier(num_classes=3)
    softmax = keras.Model(plain.input, layers.Softmax()(plain.output))
    softmax.preprocessor = plain.preprocessor
    path = tfvllm.export(softmax, tmp_path / "1", "classify", warmup=False)
    texts = np.array([text.encode() for text in TEXTS], object)
    outputs = parity.run_here(path, [("serving_default", {"text": texts})])[0]
    np.testing.assert_allclose(outputs["scores"], keras_scores(plain, TEXTS), atol=1e-5)


def test_the_parity_check_sees_a_second_softmax(tmp_path, monkeypatch):
    model = net(lambda h: layers.Softmax()(dense()(h)))
    monkeypatch.setattr(classify, "head_of", lambda *args, **options: Head("logits"))
    with pytest.raises(VerificationError, match=r"scores differs from the model"):
        tfvllm.export(model, tmp_path / "1", "classify", warmup=False)
    monkeypatch.setattr(classify, "head_of", lambda *args, **options: Head("softmax"))
    with pytest.raises(VerificationError, match=r"scores differs from the model"):
        tfvllm.export(net(lambda h: dense()(h)), tmp_path / "1", "classify", warmup=False)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_told_is_asked(tmp_path):
    model = net(lambda h: ops.clip(dense()(h), 0.0, 1.0))
    with pytest.raises(InputError, match=r"cannot tell whether .* Pass from_logits=True"):
        tfvllm.export(model, tmp_path / "1", "classify")
    path = tfvllm.export(model, tmp_path / "1", "classify", from_logits=False, warmup=False)
    run = tf.saved_model.load(str(path)).signatures["serving_default"]
    scores = run(**{key: tf.constant(X) for key in run.structured_input_signature[1]})["scores"]
    np.testing.assert_allclose(scores, model(X), atol=1e-6)
    with pytest.raises(InputError, match=r"from_logits=True, but .* ends in a softmax"):
        tfvllm.export(HEADS["an average"](), tmp_path / "2", "classify", from_logits=True)


def test_a_subclassed_model_is_told_to_be_wrapped(tmp_path):
    model = Sub(ops.softmax)
    model(X)
    with pytest.raises(InputError, match=r"Wrap a model class of your own: .* keras.Model\(x, your_model\(x\)\)"):
        tfvllm.export(model, tmp_path / "1", "classify")

"""A shrunk model goes on down the road: simplified, exported, served the same answers."""

import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.models import zoo

pytestmark = pytest.mark.slow


def test_shrunk_classifier_simplifies():
    small = tfvllm.shrink(zoo.build("bert"), heads=[1, 2, 3], ffn=[10, 11, 12], layers=None)
    found = zoo.inputs("bert")
    fast = tfvllm.simplify(small, target="portable")
    answers = fast({key: tf.constant(value) for key, value in found.items()})
    (answers,) = tf.nest.flatten(answers)
    np.testing.assert_allclose(np.asarray(answers), np.asarray(small(found)), rtol=1e-4, atol=1e-4)


def test_shrunk_causal_lm_exports_and_generates_the_same_tokens(tmp_path):
    small = tfvllm.shrink(zoo.build("gpt2"), heads=[1, 2, 3], ffn=[10, 11, 12])
    found = zoo.prompts("gpt2", rows=1)
    expected = zoo.generated(small, found)
    tfvllm.export(small, tmp_path / "lm" / "1", task="generate", max_length=zoo.LENGTH)
    start = int(found["padding_mask"].sum())
    serve = tf.saved_model.load(str(tmp_path / "lm" / "1")).signatures["serving_default"]
    answer = serve(
        token_ids=tf.constant(found["token_ids"][:, :start]),
        padding_mask=tf.ones((1, start), tf.int32),
        max_new_tokens=tf.constant(zoo.LENGTH - start),
    )
    np.testing.assert_array_equal(answer["token_ids"].numpy()[0], expected[0, start:])


def test_shrunk_classifier_with_a_smaller_vocabulary_exports_strings(tmp_path):
    from tests.pruning.test_vocabulary import TEXTS, answers, bert

    small = tfvllm.shrink(bert(), vocabulary="seen", data=np.asarray(TEXTS), heads=1)
    assert isinstance(small, keras_nlp.models.BertTextClassifier)
    tfvllm.export(small, tmp_path / "c" / "1", task="classify", labels=["bad", "good"])
    serve = tf.saved_model.load(str(tmp_path / "c" / "1")).signatures["serving_default"]
    scores = serve(text=tf.constant(TEXTS))["scores"].numpy()
    np.testing.assert_allclose(scores, tf.nn.softmax(answers(small, np.asarray(TEXTS))).numpy(), rtol=1e-4, atol=1e-5)

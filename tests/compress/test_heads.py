"""Teachers with a softmax at their end go down the road as their twins with logits do."""

import json

import keras
import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

from tests import tiny_models
from tests.compress.conftest import RECIPE
from tests.tiny_models import TEXTS
from tfvllm.compress import artifacts, batches, training
from tfvllm.compress.tasks import classifiers
from tfvllm.data import Split
from tfvllm.errors import InputError


@pytest.fixture(scope="module")
def twins():
    """The same classifier with logits, with a softmax, and with a sigmoid."""
    plain = tiny_models.bert_classifier(num_classes=3)
    made = [tiny_models.bert_classifier(num_classes=3, activation=name) for name in ("softmax", "sigmoid")]
    for model in made:
        model.set_weights(plain.get_weights())
    return plain, *made


def test_logits_are_logits_whatever_the_head(twins):
    tokens = batches.tokenize(Split(list(TEXTS), [0] * len(TEXTS)), twins[0].preprocessor)
    plain, softmax = (training.predict_logits(model, tokens) for model in twins[:2])
    assert np.ptp(plain) > 1
    np.testing.assert_allclose(tf.nn.softmax(softmax), tf.nn.softmax(plain), rtol=1e-4)
    np.testing.assert_allclose(tf.nn.softmax(softmax / 3.0), tf.nn.softmax(plain / 3.0), rtol=1e-4)


def test_the_loss_is_that_of_the_head(twins):
    x = twins[0].preprocessor(TEXTS)
    y = np.arange(len(TEXTS)) % 3
    plain, softmax = (float(training.cross_entropy(model)(y, model(x))) for model in twins[:2])
    assert softmax == pytest.approx(plain, rel=1e-5)
    with pytest.raises(InputError, match=r"a probability for each by itself"):
        training.cross_entropy(twins[2])


def test_a_sigmoid_teacher_is_refused_by_name(twins, tmp_path):
    twins[2].save(tmp_path / "teacher.keras")
    with pytest.raises(InputError, match=r"expected a classifier with logits or one softmax"):
        classifiers.from_file(tmp_path / "teacher.keras", 3, 48)


@pytest.mark.slow
def test_the_student_of_a_softmax_is_as_good(tmp_path, small_data):
    from tfvllm import compress
    from tfvllm.compress.recipe import read_recipe

    def run(name, text):
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        compress.run(read_recipe(tmp_path / f"{name}.yaml"), tmp_path / name)
        return {stage["stage"]: stage for stage in json.loads((tmp_path / name / "report.json").read_text())["stages"]}

    whole = RECIPE.format(data=small_data)
    head, rest = whole.split("teacher:")[0], whole[whole.index("student:") :]
    rest = rest[: rest.index("prune:")] + "shrink: {ffn: 0.5, epochs: 1, batch_size: 32, calibration: 64}\n"
    run("first", whole[: whole.index("prune:")])
    plain = artifacts.load_model(tmp_path / "first" / "steps" / "teacher" / "model.keras")
    softmax = keras_nlp.models.BertTextClassifier(
        backbone=plain.backbone, num_classes=2, preprocessor=plain.preprocessor, activation="softmax"
    )
    softmax.output_dense.set_weights(plain.output_dense.get_weights())
    softmax.pooled_dense.set_weights(plain.pooled_dense.get_weights()) if hasattr(softmax, "pooled_dense") else None
    plain.save(tmp_path / "logits.keras"), softmax.save(tmp_path / "softmax.keras")
    found = [run(name, f"{head}teacher: {{model: {tmp_path / name}.keras}}\n{rest}") for name in ("logits", "softmax")]
    for stage in ("teacher", "distill", "shrink"):
        one, two = (stages[stage]["dev_accuracy"] for stages in found)
        assert one == pytest.approx(two, abs=0.02) and two > 0.9
    again = artifacts.load_model(tmp_path / "softmax" / "steps" / "shrink" / "model.keras")
    assert again.activation is keras.activations.softmax

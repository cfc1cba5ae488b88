"""A teacher's preset from where it is: a new head on what was trained for other classes."""

import keras
import keras_nlp
import numpy as np
import pytest

from tfvllm.compress.tasks import classifiers
from tfvllm.errors import InputError


def test_the_keras_file_of_a_classifier_gets_a_new_head(tmp_path):
    preprocessor = classifiers.bert_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"], 8)
    shape = {"layers": 1, "heads": 2, "hidden": 8, "ffn": 8, "dropout": 0.0}
    trained = classifiers.bert_classifier(preprocessor, classes=2, **shape)
    trained.save(tmp_path / "trained.keras")
    model = classifiers.from_preset(str(tmp_path / "trained.keras"), 3, 6)
    assert model.num_classes == 3 and model.preprocessor.sequence_length == 6
    for old, new in zip(trained.backbone.weights, model.backbone.weights, strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_file_that_holds_no_classifier_is_refused(tmp_path):
    backbone = keras_nlp.models.BertBackbone(10, 1, 1, 4, 4)
    backbone.save(tmp_path / "backbone.keras")
    keras.Sequential([keras.Input([2]), keras.layers.Dense(2)]).save(tmp_path / "dense.keras")
    for name, found in (("backbone", "BertBackbone"), ("dense", "Sequential")):
        with pytest.raises(InputError, match=rf"teacher\.preset: expected a keras_nlp TextClassifier .* {found}"):
            classifiers.from_preset(str(tmp_path / f"{name}.keras"), 2, 8)

"""Small models as SavedModels, made once for all tests of the simplifier."""

import keras
import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

from tfvllm.simplifier.dispatch import driver


def tiny_bert(layers=2, width=32, heads=4, inner=64, vocabulary=50, classes=2):
    keras.utils.set_random_seed(1)
    backbone = keras_nlp.models.BertBackbone(
        vocabulary_size=vocabulary,
        num_layers=layers,
        num_heads=heads,
        hidden_dim=width,
        intermediate_dim=inner,
        max_sequence_length=64,
    )
    model = keras_nlp.models.BertTextClassifier(backbone, num_classes=classes, preprocessor=None)
    for variable in model.variables:  # biases and norms start at 0 and 1, where mistakes hide
        variable.assign(variable + 0.05 * keras.random.normal(variable.shape))
    return model


def bert_inputs(batch=3, length=9, vocabulary=50, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, length), np.int32)
    for row in range(1, batch):
        mask[row, length - row :] = 0
    return {
        "token_ids": rng.integers(0, vocabulary, (batch, length)).astype(np.int32),
        "padding_mask": mask,
        "segment_ids": np.zeros((batch, length), np.int32),
    }


@pytest.fixture(scope="session")
def bert():
    return tiny_bert()


@pytest.fixture(scope="session")
def bert_saved(bert, tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "1"
    bert.export(str(path), verbose=False)
    return path


def run_saved(path, inputs, signature="serving_default"):
    loaded = tf.saved_model.load(str(path))
    result = loaded.signatures[signature](**{k: tf.constant(v) for k, v in inputs.items()})
    return {k: v.numpy() for k, v in result.items()}


@pytest.fixture
def clock(monkeypatch):
    """Measured are made-up times: packing costs 5 and 0.1 a token, padding 0.2 a position, the original twice that."""

    def measure(points, ways, specs, seconds):
        for p in points:
            for w in ways:
                rows = p.batch * (p.length or 1)
                ms = 5 + 0.1 * p.tokens if "packed" in w.name else 0.2 * rows
                ms = 0.4 * rows if w.name == "the original" else ms
                p.rounds[w.name] = [min(5 + 0.1 * p.tokens, 0.2 * rows) if w.name == driver.CHOOSING else ms] * 9

    monkeypatch.setattr(driver, "measure", measure)

"""The TensorBoard curves of a distillation."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.distillation.pairs import batch
from tfvllm.errors import InputError


def curves_of(folder):
    (path,) = folder.iterdir()
    curves = {}
    for record in tf.data.TFRecordDataset(str(path)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            curves.setdefault(value.tag, {})[event.step] = float(tf.make_ndarray(value.tensor))
    return curves


@pytest.mark.thorough
def test_parts_weights_and_validation_are_written(duo, tmp_path):
    x, y = batch()
    halving = keras.optimizers.schedules.PiecewiseConstantDecay([2], [1.0, 0.5])
    distiller = tfvllm.Distiller(*duo, loss_weights={"logits": halving}, task_weight=0.25)
    distiller.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
    summaries = tfvllm.callbacks.DistillationSummaries(tmp_path)
    whole = {"batch_size": len(y), "verbose": 0, "callbacks": [summaries]}
    history = distiller.fit(x, y, validation_data=(x, y), epochs=4, **whole).history
    train, validation = curves_of(tmp_path / "train"), curves_of(tmp_path / "validation")
    for name in ("loss", "logits_loss", "task_loss"):
        assert list(train[f"epoch_{name}"].values()) == pytest.approx(history[name])
        assert list(validation[f"epoch_{name}"].values()) == pytest.approx(history[f"val_{name}"])
    assert train["weight/logits"] == {0: 1.0, 1: 1.0, 2: 0.5, 3: 0.5}
    assert set(train["weight/task"].values()) == {0.25}
    assert train["weighted/logits"][3] == pytest.approx(0.5 * history["logits_loss"][3])
    assert not [name for name in validation if name.startswith("weight")]


def test_anything_but_a_distiller_is_refused(tmp_path):
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(InputError, match=r"follows a tfvllm\.Distiller, found Sequential"):
        model.fit(np.ones([2, 2]), np.ones([2, 1]), callbacks=[tfvllm.callbacks.DistillationSummaries(tmp_path)])
    with pytest.raises(InputError, match="non-empty path"):
        tfvllm.callbacks.DistillationSummaries("")

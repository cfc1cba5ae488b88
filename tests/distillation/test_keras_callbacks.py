"""Keras's own callbacks beside a Distiller: the best weights, checkpoints, averages, rates, and what is written."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfvllm
from tests.distillation.test_heads import kl

losses = tfvllm.losses
RNG = np.random.default_rng(2)
X = RNG.normal(size=(24, 4)).astype("float32")
Y = RNG.integers(0, 3, 24)


def net(width, head=None, seed=0):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4,))
    hidden = layers.Dense(width, "relu", name="hidden")(inputs)
    outputs = layers.Dense(3)(hidden)
    return keras.Model(inputs, layers.Softmax()(outputs) if head else outputs)


def distilled(rate=0.05, head=None, hidden=True, optimizer=None, **options):
    made = {"logits": losses.ForwardKL(2.0)}
    if hidden:
        made["hidden"] = losses.HiddenStates(layers=[("hidden", "hidden")])  # through a projection: 8 to 4
    distiller = tfvllm.Distiller(net(8, head), net(4, head, seed=1), losses=made)
    distiller.compile(optimizer or keras.optimizers.SGD(rate), "sparse_categorical_crossentropy", **options)
    return distiller


FIT = {"epochs": 4, "batch_size": 8, "shuffle": False, "verbose": 0, "validation_data": (X[:8], Y[:8])}


class Worsening(keras.callbacks.Callback):
    """From epoch 2 on, training goes wrong; keeps the weights at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def on_epoch_begin(self, epoch, logs=None):
        if epoch >= 2:
            self.model.optimizer.learning_rate = 50.0

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append([np.array(weight) for weight in self.model.get_weights()])


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A fit that is best after its second epoch, with early stopping and two checkpoints beside it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    distiller, watch = distilled(), Worsening()
    best = {"monitor": "val_loss", "save_best_only": True, "mode": "min"}
    history = distiller.fit(
        X,
        Y,
        callbacks=[
            watch,
            keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True, mode="min"),
            keras.callbacks.ModelCheckpoint(folder / "best.weights.h5", save_weights_only=True, **best),
            keras.callbacks.ModelCheckpoint(folder / "best.keras", **best),
        ],
        **FIT,
    ).history
    return distiller, watch, history, folder


def test_early_stopping_brings_back_the_best_student_and_projection(spoilt):
    distiller, watch, history, _ = spoilt
    best = int(np.nanargmin(history["val_loss"]))
    assert best == 1 and len(history["loss"]) == 4
    assert len(distiller.get_weights()) == 5  # two layers of the student, and the projection
    for one, two in zip(distiller.get_weights(), watch.weights[best]):
        np.testing.assert_array_equal(one, two)


def test_checkpoints_hold_the_best_and_train_on(spoilt):
    distiller, watch, _, folder = spoilt
    again = distilled()
    again.load_weights(folder / "best.weights.h5")
    whole = keras.saving.load_model(folder / "best.keras")
    assert whole.teacher is None
    for one, two, best in zip(again.get_weights(), whole.get_weights(), watch.weights[1]):
        np.testing.assert_array_equal(one, best)
        np.testing.assert_array_equal(two, best)
    whole.teacher = distiller.teacher
    assert int(whole.optimizer.iterations) == 6  # two epochs of three steps
    np.testing.assert_allclose(
        whole.evaluate(X[:8], Y[:8], verbose=0), distiller.evaluate(X[:8], Y[:8], verbose=0), rtol=1e-5
    )
    assert np.isfinite(whole.fit(X, Y, verbose=0).history["loss"]).all()


@pytest.mark.thorough
def test_interrupted_training_goes_on_where_it_was(tmp_path):
    whole = distilled(optimizer=keras.optimizers.Adam(0.01))
    whole.fit(X, Y, **FIT)

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first = distilled(optimizer=keras.optimizers.Adam(0.01))
        first.fit(X, Y, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "b"), Stop()], **FIT)
    second = distilled(optimizer=keras.optimizers.Adam(0.01))
    second.fit(X, Y, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "b")], **FIT)
    assert int(second.optimizer.iterations) == 12
    for one, two in zip(whole.get_weights(), second.get_weights()):
        np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.thorough
def test_averaged_weights_stand_in_for_evaluation_and_come_back():
    seen = {}
    distiller = distilled(optimizer=keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5))

    class Look(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            seen["tested"] = [np.array(weight) for weight in self.model.get_weights()]

        def on_epoch_end(self, epoch, logs=None):
            seen["after"] = [np.array(weight) for weight in self.model.get_weights()]

    average: list = []

    class Average(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            now = [np.array(weight) for weight in self.model.get_weights()]
            # Keras's average of the first step is what that step made.
            average[:] = [0.5 * a + 0.5 * w for a, w in zip(average, now)] if average else now

    callbacks = [Average(), keras.callbacks.SwapEMAWeights(), Look()]
    distiller.fit(X, Y, callbacks=callbacks, **{**FIT, "epochs": 1})
    for tested, expected, after in zip(seen["tested"], average, seen["after"], strict=True):
        np.testing.assert_allclose(tested, expected, rtol=1e-4, atol=1e-6)
        assert np.abs(tested - after).max() > 1e-6


@pytest.mark.thorough
def test_rates_fall_and_logs_are_written(tmp_path):
    distiller = distilled(rate=0.4)
    rate = keras.callbacks.ReduceLROnPlateau("val_logits_loss", factor=0.5, patience=0, min_delta=10.0, mode="min")
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    distiller.fit(X, Y, callbacks=[rate, log], **FIT)
    assert float(distiller.optimizer.learning_rate) == pytest.approx(0.4 * 0.5**3)
    names = (tmp_path / "log.csv").read_text().splitlines()[0].split(",")
    assert {"loss", "task_loss", "logits_loss", "hidden_loss", "val_logits_loss"} <= set(names)


@pytest.mark.thorough
def test_tensorboard_gets_every_part(tmp_path):
    pytest.importorskip("tensorboard")
    distiller = distilled()
    distiller.fit(X, Y, callbacks=[keras.callbacks.TensorBoard(tmp_path)], **FIT)
    tags = set()
    for file in tmp_path.rglob("*tfevents*"):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            tags |= {value.tag for value in event.summary.value}
    assert {"epoch_loss", "epoch_task_loss", "epoch_logits_loss", "epoch_hidden_loss"} <= tags


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("head", [None, "softmax"])
def test_mixed_precision(policy, head):
    keras.config.set_dtype_policy(policy)
    try:
        distiller = distilled(head=head)
    finally:
        keras.config.set_dtype_policy("float32")
    t, s = (np.asarray(model(X), "float32") for model in (distiller.teacher, distiller.student))
    t, s = (np.log(z) for z in (t, s)) if head else (t, s)
    logs = distiller.evaluate(X, Y, batch_size=24, return_dict=True, verbose=0)
    coarse = 2e-2 if policy == "mixed_bfloat16" else 3e-3
    assert logs["logits_loss"] == pytest.approx(4 * kl(t, s, 2.0).mean(), rel=5 * coarse)
    assert isinstance(distiller.optimizer, keras.optimizers.LossScaleOptimizer) is (policy == "mixed_float16")
    history = distiller.fit(X, Y, **{**FIT, "epochs": 8}).history
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.thorough
@pytest.mark.parametrize("head", [None, "softmax"])
def test_compiled_by_xla(head):
    plain, compiled = distilled(head=head), distilled(head=head, jit_compile=True)
    compiled.set_weights(plain.get_weights())
    for distiller in (plain, compiled):
        distiller.fit(X, Y, **FIT)
    for one, two in zip(plain.get_weights(), compiled.get_weights()):
        np.testing.assert_allclose(one, two, atol=1e-5)

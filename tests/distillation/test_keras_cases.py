"""keras.distillation's own tests (keras 3.15, keras/src/distillation/distiller_test.py and distillation_loss_test.py),
retold for `tfvllm.Distiller`: one test for each of theirs, with values where theirs look at shapes.

What differs on purpose is in docs/distillation.md.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfvllm
from tests.distillation.test_heads import kl
from tfvllm.errors import InputError

losses = tfvllm.losses
X = np.random.default_rng(0).random((20, 5)).astype("float32")
Y = np.random.default_rng(1).integers(0, 10, 20)


class Small(keras.Model):
    """A subclassed model, not built."""

    def __init__(self, width):
        super().__init__()
        self.dense1 = layers.Dense(width, activation="relu")
        self.dense2 = layers.Dense(10)

    def call(self, inputs, training=None):
        return self.dense2(self.dense1(inputs))


def stack(name, *widths):
    """A Sequential that is built by its first call."""
    inner = [layers.Dense(width, activation="relu", name=f"{name}_{i}") for i, width in enumerate(widths)]
    model = keras.Sequential([*inner, layers.Dense(10, name=f"{name}_output")])
    model(X[:2])
    return model


def distilled(teacher=None, student=None, eager=True, **options):
    options.setdefault("losses", {"logits": losses.ForwardKL(temperature=2.0)})
    distiller = tfvllm.Distiller(teacher or Small(32), student or Small(16), **options)
    distiller.compile(
        keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"], run_eagerly=eager
    )
    return distiller


def test_initialization_and_freezing():
    teacher, student = Small(32), Small(16)
    assert teacher.trainable
    distiller = distilled(teacher, student, task_weight=0.5)
    assert not teacher.trainable and student.trainable
    assert distiller.task_weight == 0.5 and distiller.optimizer is not None
    assert [type(loss) for loss in distiller.distillation_losses.values()] == [losses.ForwardKL]
    assert distiller.distillation_losses["logits"].temperature == 2.0


def test_call_gives_the_students_outputs():
    distiller = distilled()
    outputs = distiller(X)
    assert outputs.shape == (20, 10)
    np.testing.assert_allclose(outputs, distiller.student(X))
    np.testing.assert_allclose(distiller.predict(X, verbose=0), distiller.student(X), rtol=1e-5, atol=1e-6)
    assert not isinstance(distiller.student, tfvllm.Distiller)


def test_models_are_checked():
    with pytest.raises(ValueError, match=r"teacher must be a keras.Model"):
        tfvllm.Distiller("not a model", Small(4))
    with pytest.raises(ValueError, match=r"student must be a keras.Model"):
        tfvllm.Distiller(Small(4), "not a model")


def test_several_losses_and_their_weights():
    two = {"warm": losses.ForwardKL(temperature=3.0), "cool": losses.ForwardKL(temperature=2.0)}
    distiller = distilled(losses=two, loss_weights={"cool": 0.5}, task_weight=0.0)
    assert distiller.loss_weights == {"warm": 1.0, "cool": 0.5}
    logs = distiller.evaluate(X, Y, batch_size=20, return_dict=True, verbose=0)
    t, s = distiller.teacher(X), distiller.student(X)
    assert logs["warm_loss"] == pytest.approx(9 * kl(t, s, 3.0).mean(), rel=1e-3)
    assert logs["cool_loss"] == pytest.approx(4 * kl(t, s, 2.0).mean(), rel=1e-3)
    assert logs["loss"] == pytest.approx(logs["warm_loss"] + 0.5 * logs["cool_loss"], rel=1e-5)
    with pytest.raises(ValueError, match=r"names \['hot'\], but the losses are \['cool', 'warm'\]"):
        distilled(losses=two, loss_weights={"hot": 1.0})
    with pytest.raises(ValueError, match=r"losses must be"):
        distilled(losses={})


@pytest.mark.parametrize("task_weight", [0.0, 1.0])
def test_the_weight_of_the_students_own_loss(task_weight):
    distiller = distilled(task_weight=task_weight, loss_weights={"logits": 1.0 - task_weight})
    logs = distiller.fit(X[:5], Y[:5], verbose=0).history
    assert logs["loss"][0] == pytest.approx(logs["task_loss" if task_weight else "logits_loss"][0], rel=1e-5)


def test_the_whole_training():
    distiller = distilled(eager=False, task_weight=0.5)
    history = distiller.fit(X, Y, validation_data=(X[:8], Y[:8]), epochs=6, batch_size=10, verbose=0).history
    for name in ("loss", "task_loss", "logits_loss", "accuracy"):
        assert len(history[name]) == len(history[f"val_{name}"]) == 6 and np.isfinite(history[name]).all()
    assert history["loss"][-1] < history["loss"][0]
    before = [weight.copy() for weight in distiller.student.get_weights()]
    frozen = [weight.copy() for weight in distiller.teacher.get_weights()]
    distiller.fit(X[:10], Y[:10], verbose=0)
    assert any(np.abs(one - two).max() > 1e-6 for one, two in zip(before, distiller.student.get_weights()))
    assert all((one == two).all() for one, two in zip(frozen, distiller.teacher.get_weights()))


def test_evaluation_without_training():
    distiller = distilled(task_weight=0.25)
    logs = distiller.evaluate(X, Y, batch_size=20, verbose=0, return_dict=True)
    task = np.mean(tf.nn.sparse_softmax_cross_entropy_with_logits(Y, distiller.student(X)))
    assert logs["task_loss"] == pytest.approx(task, rel=1e-5)
    assert logs["loss"] == pytest.approx(0.25 * task + logs["logits_loss"], rel=1e-5)
    assert isinstance(distiller.evaluate(X, Y, verbose=0), list)


def test_configuration_saving_and_loading(tmp_path):
    distiller = distilled(stack("t", 32, 16), stack("s", 16, 8), task_weight=0.7)
    outputs = distiller(X[:2])
    again = tfvllm.Distiller.from_config(distiller.get_config())
    assert again.task_weight == 0.7 and again.distillation_losses["logits"].temperature == 2.0
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.saving.load_model(tmp_path / "distiller.keras")
    np.testing.assert_allclose(loaded(X[:2]), outputs, rtol=1e-5, atol=1e-6)
    assert loaded.teacher is None and loaded.task_weight == 0.7  # on purpose: the teacher is no part of the file
    loaded.teacher = distiller.teacher
    assert np.isfinite(loaded.fit(X, Y, verbose=0).history["loss"]).all()


def test_outputs_of_unlike_structure_are_refused():
    one = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "float32")
    assert losses.ForwardKL(temperature=3.0)(one, one[:, ::-1]).shape == (2,)
    with pytest.raises(ValueError):
        losses.ForwardKL()(one, {"output": one})
    inputs = keras.Input((5,))
    hidden = layers.Dense(10)(inputs)
    with pytest.raises(InputError, match=r"returns 2 tensors; expected one"):
        distilled(keras.Model(inputs, [hidden, hidden]), stack("s", 4)).evaluate(X, Y, verbose=0)
    named = keras.Model(inputs, {"other": hidden})
    with pytest.raises(InputError, match=r"returns \['other'\]; expected one tensor of logits, or one named 'logits'"):
        distilled(named, stack("s2", 4)).evaluate(X, verbose=0)
    assert np.isfinite(distilled(keras.Model(inputs, {"logits": hidden}), stack("s3", 4)).evaluate(X, verbose=0)).all()


def test_features_are_compared_by_the_names_of_layers():
    teacher, student = stack("teacher", 32, 16), stack("student", 32, 16)
    pair = {"first": losses.HiddenStates(layers=[("teacher_0", "student_0")])}
    distiller = distilled(teacher, student, losses=pair, task_weight=0.5)
    logs = distiller.evaluate(X, Y, batch_size=20, return_dict=True, verbose=0)
    expected = np.square(np.asarray(teacher.layers[0](X)) - np.asarray(student.layers[0](X))).mean()
    assert logs["first_loss"] == pytest.approx(expected, rel=1e-5)
    assert distiller.projections == {}  # the widths are the same
    with pytest.raises(InputError, match="states of the same examples"):
        pair["first"]([X], [[X, X]])
    with pytest.raises(InputError, match="found 1 of the teacher and 2 of the student"):
        pair["first"]([X], [X, X])


def test_logits_and_features_together():
    three = {
        "logits": losses.ForwardKL(temperature=3.0),
        "first": losses.HiddenStates(layers=[("teacher_0", "student_0")]),
        "second": losses.HiddenStates(layers=[("teacher_1", "student_1")]),
    }
    weights = {"first": 0.5, "second": 0.3}
    distiller = distilled(
        stack("teacher", 32, 16), stack("student", 32, 16), eager=False, losses=three, loss_weights=weights
    )
    history = distiller.fit(X, Y, epochs=8, verbose=0).history
    total = sum({"logits": 1.0, **weights}[key] * np.array(history[f"{key}_loss"]) for key in three)
    np.testing.assert_allclose(history["loss"], total + 0.2 * np.array(history["task_loss"]), rtol=1e-5)
    assert history["loss"][-1] < history["loss"][0]

"""Masks beside Keras's own callbacks, before and behind them; and numbers of 16 bits."""

import json
import warnings

import keras
import numpy as np
import pytest

import tfvllm
from tfvllm.callbacks import MagnitudePruning, MovementPruning, UpdatePruningStep
from tfvllm.pruning import scores
from tfvllm.pruning.masks import MaskState
from tfvllm.pruning.prunable import prunable_weights
from tfvllm.schedules import ConstantSparsity, PolynomialDecay

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(32, 16)).astype("float32"), RNG.normal(size=(32, 4)).astype("float32")


def net(kind="functional", dtype=None):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(32, "relu", dtype=dtype), keras.layers.Dense(4, dtype=dtype)]
    inputs = keras.Input((16,))
    if kind == "sequential":
        return keras.Sequential([inputs, *layers])
    return keras.Model(inputs, layers[1](layers[0](inputs)))


def schedule():
    return PolynomialDecay(0.0, 0.75, 0, 8, frequency=1)  # two epochs of four steps


class FirstEpochIsBest(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        logs["score"] = float(epoch)


class Remember(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 0:
            self.weights = [np.asarray(v) for v in self.model.trainable_variables]


def zeros(variables):
    kernels = [np.asarray(v) for v in variables if len(v.shape) == 2]
    return sum(int((k == 0).sum()) for k in kernels) / sum(k.size for k in kernels)


def fit(model, pruning, others, before, epochs=3, optimizer=None, y=Y):
    model.compile(optimizer or keras.optimizers.Adam(1e-2), "mse")
    callbacks = [FirstEpochIsBest(), *(others if before else []), pruning, *([] if before else others)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = model.fit(X, y, batch_size=8, epochs=epochs, verbose=0, callbacks=callbacks, validation_data=(X, y))
    assert "on_train_end" not in vars(history)
    return [str(w.message) for w in caught if "pruning step" in str(w.message)]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("form", ["functional", "sequential", "wrapper"])
def test_a_restored_epoch_has_its_own_sparsity_and_that_is_said(form, before):
    model = net("functional" if form == "wrapper" else form)
    if form == "wrapper":
        model = tfvllm.prune_low_magnitude(model, schedule())
    pruning = UpdatePruningStep() if form == "wrapper" else MagnitudePruning(model, schedule())
    first = Remember()
    best = keras.callbacks.EarlyStopping("score", mode="min", patience=5, restore_best_weights=True)
    said = fit(model, pruning, [first, best], before)
    for variable, value in zip(model.trainable_variables, first.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(variable), value)  # the best epoch, unharmed
    reached = 0.75 - 0.75 * 0.5**3
    assert zeros(model.trainable_variables) == pytest.approx(reached, abs=0.01)
    assert pruning.restored_step == 4
    assert len(said) == 1 and "step 4 of 12" in said[0] and "65.6%" in said[0] and "start_from_epoch" in said[0]
    if form != "wrapper":
        assert pruning.sparsity == pytest.approx(reached, abs=0.01)
        assert len(model.weights) == 4
        # Trained on, it reaches what was asked for.
        assert fit(model, pruning, [], before) == [] and pruning.sparsity == 0.75 and pruning.restored_step is None


@pytest.mark.parametrize("before", [True, False])
def test_epochs_after_the_schedule_may_be_best(before):
    model = net()
    pruning = MagnitudePruning(model, schedule())
    best = keras.callbacks.EarlyStopping("score", mode="min", patience=5, restore_best_weights=True, start_from_epoch=2)
    assert fit(model, pruning, [best], before, epochs=4) == []
    assert pruning.sparsity == 0.75 and pruning.restored_step == 12


@pytest.mark.parametrize("before", [True, False])
def test_checkpoints_carry_the_masks_of_their_epoch(before, tmp_path):
    model = net()
    pruning = MagnitudePruning(model, schedule())
    saver = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", "score", save_best_only=True, mode="max")
    assert fit(model, pruning, [saver], before) == []
    assert pruning.sparsity == zeros(model.trainable_variables) == 0.75
    again = keras.models.load_model(tmp_path / "best.keras")
    np.testing.assert_array_equal(np.asarray(again(X)), np.asarray(model(X)))
    assert zeros(again.trainable_variables) == 0.75


@pytest.mark.thorough
@pytest.mark.parametrize("before", [True, False])
def test_goes_on_from_a_backup(before, tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    results = []
    for interrupted in (False, True):
        for attempt in range(1 + interrupted):
            model = net()
            pruning = MagnitudePruning(model, schedule(), keep_masks=True)
            backup = keras.callbacks.BackupAndRestore(tmp_path / f"{interrupted}", delete_checkpoint=False)
            stop = [Stop()] if interrupted and attempt == 0 else []
            try:
                fit(model, pruning, [backup, *stop], before)
            except KeyboardInterrupt:
                assert json.loads((tmp_path / "True" / "training_metadata.json").read_text())["epoch"] == 2
        results.append((pruning.state.pruning_step, pruning.sparsity))
    assert results == [(12, 0.75), (12, 0.75)]


@pytest.mark.thorough
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("each_epoch", [True, False])
def test_averages_of_the_optimizer_are_as_sparse(before, each_epoch, tmp_path):
    model = net()
    pruning = MagnitudePruning(model, schedule())
    saver = keras.callbacks.ModelCheckpoint(tmp_path / "last.keras")
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=each_epoch)
    optimizer = keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.9)
    assert fit(model, pruning, [swap, saver], before, epochs=4, optimizer=optimizer) == []
    assert pruning.sparsity == zeros(model.trainable_variables) == 0.75
    assert zeros(keras.models.load_model(tmp_path / "last.keras").trainable_variables) == 0.75


def test_an_optimizer_that_puts_its_averages_into_the_model_itself():
    model = net()
    pruning = MagnitudePruning(model, schedule())
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3)
    assert fit(model, pruning, [], True, optimizer=optimizer) == [] and pruning.sparsity == 0.75


@pytest.mark.thorough
@pytest.mark.parametrize("before", [True, False])
def test_inside_a_distiller(before):
    teacher, student = net(), net()
    student.layers[1].kernel.assign(RNG.normal(size=(16, 32)))
    distiller = tfvllm.Distiller(teacher, student, losses={"logits": tfvllm.losses.ForwardKL()}, task_weight=0.5)
    pruning = MagnitudePruning(student, schedule())
    best = keras.callbacks.EarlyStopping("score", mode="min", patience=5, restore_best_weights=True)
    distiller.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.warns(UserWarning, match="step 4 of 12"):
        distiller.fit(
            X,
            np.arange(32) % 4,
            batch_size=8,
            epochs=3,
            verbose=0,
            callbacks=[FirstEpochIsBest(), *([best, pruning] if before else [pruning, best])],
        )
    assert pruning.sparsity == pytest.approx(0.75 - 0.75 * 0.5**3, abs=0.01) and pruning.restored_step == 4


def test_two_prunings_in_one_fit():
    inputs = keras.Input((16,))
    parts = [net(), net()]
    model = keras.Model(inputs, parts[0](inputs) + parts[1](inputs))
    prunings = [
        MagnitudePruning(part, ConstantSparsity(share, 0, frequency=1)) for part, share in zip(parts, (0.25, 0.5))
    ]
    assert fit(model, prunings[0], [prunings[1]], True) == []
    assert [pruning.sparsity for pruning in prunings] == [0.25, 0.5]
    assert all(len(part.weights) == 4 for part in parts)


def test_a_loop_of_ones_own_after_a_fit():
    """The model still has the history of the fit before; the end is the callback's own."""
    model = net()
    fit(model, keras.callbacks.Callback(), [], True)
    pruning = MagnitudePruning(model, ConstantSparsity(0.5, 0, frequency=1))
    pruning.set_model(model)
    pruning.on_train_begin()
    pruning.on_train_batch_begin(batch=-1)
    model.train_on_batch(X, Y)
    pruning.on_epoch_end(batch=-1)  # as TFMOT's guide writes it
    pruning.on_train_end()
    assert zeros(model.trainable_variables) == 0.5 and len(model.weights) == 4


# ---------------------------------------------------------------- numbers of 16 bits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed_bfloat16"])
@pytest.mark.parametrize("callback", [MovementPruning, MagnitudePruning])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_reaches_its_share_in_every_dtype(callback, dtype, scope):
    model = net(dtype=dtype)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    # One turn: a weight that a later one lets live again may stay at the zero that it was given.
    pruning = callback(model, ConstantSparsity(0.5, 2, frequency=100), scope=scope)
    dead = np.where(np.arange(16) < 12, 0, X)  # most inputs give no gradient at all: their scores are equal
    model.fit(dead, Y, batch_size=8, epochs=1, verbose=0, callbacks=[pruning])
    assert pruning.sparsity == pytest.approx(0.5, abs=0.005)


def test_movement_removes_what_moved_towards_zero_in_bfloat16():
    layer = keras.layers.Dense(1, use_bias=False, dtype="bfloat16")
    layer.build((None, 4))
    layer.kernel.assign([[1.0], [1.0], [-1.0], [-1.0]])
    state = MaskState(list(prunable_weights(layer)), ConstantSparsity(0.5, 0, frequency=1), scored=True)
    state.start()
    # Scores that bfloat16 cannot tell apart: 300.0 and 300.5 are one number there.
    state.score_variables[0].assign([[300.5], [300.0], [300.25], [300.75]])
    state.advance()
    np.testing.assert_array_equal(np.asarray(layer.kernel, "float32")[:, 0], [1, 0, 0, -1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_of_16_bits_do_not_vanish(dtype):
    weight, gradient = keras.ops.convert_to_tensor([[1e-3, -2e-3]], dtype), [[1e-3, 1e-3]]
    assert np.asarray(scores.taylor(weight, gradient)).dtype == np.float32
    assert np.all(np.asarray(scores.taylor(weight, gradient)) > 0)  # 1e-12 is 0 in float16
    wide = np.asarray(weight, "float32")
    np.testing.assert_allclose(np.asarray(scores.taylor(weight, gradient)), (wide * 1e-3) ** 2, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(scores.movement(weight, gradient)), -wide * 1e-3, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(scores.wanda(weight, [3e5])), abs(wide) * 3e5, rtol=1e-5)  # no infinity
    assert np.all(np.isfinite(np.asarray(scores.activation([1e6], weight))))


@pytest.mark.parametrize("options", [{"block_size": (2, 2)}, {"sparsity_m_by_n": (2, 4)}])
def test_blocks_and_groups_of_16_bits(options):
    wide = RNG.normal(size=(16, 8))
    found = {}
    for dtype in ("float32", "bfloat16"):
        layer = keras.layers.Dense(8, use_bias=False, dtype=dtype)
        layer.build((None, 16))
        layer.kernel.assign(keras.ops.cast(keras.ops.cast(wide, "bfloat16"), dtype))
        state = MaskState(list(prunable_weights(layer)), ConstantSparsity(0.5, 0, frequency=1), **options)
        state.start()
        state.advance()
        found[dtype] = np.asarray(layer.kernel, "float32") == 0
    np.testing.assert_array_equal(found["bfloat16"], found["float32"])
    assert found["float32"].mean() == 0.5

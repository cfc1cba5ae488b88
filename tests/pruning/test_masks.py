"""Masks: TFMOT's own numbers, on Keras 3, through training, checkpoints, XLA and mixed precision."""

import contextlib
import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.models import zoo
from tfvllm.errors import InputError
from tfvllm.pruning._tfmot import tfmot
from tfvllm.pruning.masks import MaskState, find_own, find_states
from tfvllm.pruning.prunable import PruneKernels, matrix_view, prunable_weights
from tfvllm.schedules import ConstantSparsity, PolynomialDecay


def mlp(inputs=16, seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((inputs,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(4)])


def regression(rows=64, inputs=16):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, inputs)).astype("float32"), rng.normal(size=(rows, 4)).astype("float32")


def zeros(variable):
    return float(np.mean(np.asarray(variable) == 0))


# ---------------------------------------------------------------- the same numbers as TFMOT


@pytest.mark.thorough
def test_keras_and_tf_keras_stay_what_they_were():
    code = """
        import os
        os.environ.pop("TF_USE_LEGACY_KERAS", None)
        import tfvllm
        from tfvllm.pruning._tfmot import tfmot
        tfmot()
        import keras, tensorflow as tf, tfvllm.schedules
        assert "TF_USE_LEGACY_KERAS" not in os.environ
        assert tf.keras.__version__ == keras.__version__ and keras.__version__.startswith("3."), tf.keras.__version__
        assert tf.keras.layers.Dense is keras.layers.Dense
        print("unchanged")
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "unchanged", result.stderr[-2000:]


SHAPES = {"dense": (24, 16), "odd": (7, 5), "conv": (3, 3, 4, 8)}


@pytest.mark.parametrize(
    ("shape", "sparsity", "block", "pooling", "m_by_n"),
    [
        ("dense", 0.5, (1, 1), "AVG", None),
        ("dense", 0.9, (1, 1), "AVG", None),
        ("odd", 0.37, (1, 1), "AVG", None),
        ("conv", 0.7, (1, 1), "AVG", None),
        ("dense", 0.5, (2, 2), "AVG", None),
        ("dense", 0.5, (4, 1), "MAX", None),
        ("odd", 0.5, (2, 3), "AVG", None),
        ("dense", 0.5, (1, 1), "AVG", (2, 4)),
        ("conv", 0.5, (1, 1), "AVG", (1, 2)),
    ],
)
def test_masks_and_thresholds_are_bit_equal_to_tfmot(shape, sparsity, block, pooling, m_by_n):
    """The same weights through TFMOT's wrapper on a tf_keras layer and through ours on a Keras 3 layer."""
    tfmot()
    import tensorflow_model_optimization as original
    import tf_keras

    size = SHAPES[shape]
    weights = np.random.default_rng(3).normal(size=size).astype("float32")
    weights.reshape(-1)[:4] = weights.reshape(-1)[4:8]  # ties

    def layer(module):
        if len(size) == 4:
            return module.layers.Conv2D(size[3], size[:2], use_bias=False), (None, 8, 8, size[2])
        return module.layers.Dense(size[1], use_bias=False), (None, size[0])

    theirs, input_shape = layer(tf_keras)
    options = {"block_size": block, "block_pooling_type": pooling, "sparsity_m_by_n": m_by_n}
    wrapped = original.sparsity.keras.prune_low_magnitude(
        theirs, original.sparsity.keras.PolynomialDecay(0.0, sparsity, 0, 8, frequency=1), **options
    )
    wrapped.build(input_shape)
    theirs.kernel.assign(weights)

    ours, _ = layer(keras)
    ours.build(input_shape)
    ours.kernel.assign(weights)
    state = MaskState(
        list(prunable_weights(ours)), PolynomialDecay(0.0, sparsity, 0, 8, frequency=1), renew_m_by_n=False, **options
    )
    state.start()
    wrapped.pruning_step.assign(0)
    for _ in range(8):
        wrapped.pruning_step.assign_add(1)
        wrapped.pruning_obj.conditional_mask_update()
        wrapped.pruning_obj.weight_mask_op()
        state.advance()
        ((_, mask, threshold),) = wrapped.pruning_vars
        np.testing.assert_array_equal(mask.numpy(), state.pruning_vars[0][1].numpy())
        np.testing.assert_array_equal(theirs.kernel.numpy(), np.asarray(ours.kernel))
        if m_by_n is None:
            assert threshold.numpy() == state.pruning_vars[0][2].numpy()
    assert 0 < zeros(ours.kernel) < 1


def test_whole_training_is_bit_equal_to_tfmot():
    """The same model, data and schedule: TFMOT on tf_keras, our wrapper and our callback on Keras 3, Adam, 4 epochs."""
    tfmot()
    import tensorflow_model_optimization as original
    import tf_keras

    rng = np.random.default_rng(0)
    x, y = regression()
    kernels = [rng.normal(0, 0.3, shape).astype("float32") for shape in ((16, 32), (32, 4))]

    def run(module, schedules, prune, callbacks):
        layers = [module.layers.Dense(32, activation="relu"), module.layers.Dense(4)]
        model = module.Sequential([module.layers.Input((16,)), *layers])
        for layer, kernel in zip(layers, kernels):
            layer.set_weights([kernel, np.zeros(kernel.shape[1])])
        schedule = schedules.PolynomialDecay(0.0, 0.8, 0, 24, frequency=4)
        model = prune(model, schedule) if prune else model
        model.compile(module.optimizers.Adam(1e-2), "mse")
        options = {"epochs": 4, "batch_size": 8, "shuffle": False, "verbose": 0}
        model.fit(x, y, callbacks=callbacks(model, schedule), **options)
        return [np.asarray(layer.kernel) for layer in layers]

    theirs = original.sparsity.keras
    expected = run(tf_keras, theirs, theirs.prune_low_magnitude, lambda *_: [theirs.UpdatePruningStep()])
    wrapped = run(
        keras, tfvllm.schedules, tfvllm.prune_low_magnitude, lambda *_: [tfvllm.callbacks.UpdatePruningStep()]
    )
    called = run(keras, tfvllm.schedules, None, lambda m, s: [tfvllm.callbacks.MagnitudePruning(m, s)])
    for a, b, c in zip(expected, wrapped, called):
        assert 0.79 < zeros(a) < 0.81
        np.testing.assert_array_equal(a == 0, b == 0)
        np.testing.assert_array_equal(a == 0, c == 0)
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(c, a, rtol=1e-5, atol=1e-6)


def test_schedules_are_tfmots_and_load_again():
    import tensorflow_model_optimization as original

    for ours, theirs in (
        (
            PolynomialDecay(0.1, 0.8, 2, 20, power=2, frequency=3),
            original.sparsity.keras.PolynomialDecay(0.1, 0.8, 2, 20, power=2, frequency=3),
        ),
        (ConstantSparsity(0.6, 4, 12, 2), original.sparsity.keras.ConstantSparsity(0.6, 4, 12, 2)),
    ):
        assert isinstance(ours, type(theirs))
        again = type(ours).from_config(ours.get_config())
        stored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(ours))
        assert ours.get_config() == theirs.get_config()
        for step in range(25):
            expected = [part.numpy() for part in theirs(tf.constant(step, tf.int64))]
            for schedule in (ours, again, stored):
                assert [part.numpy() for part in schedule(tf.constant(step, tf.int64))] == expected


# ---------------------------------------------------------------- training


def test_sparsity_follows_the_schedule_and_momentum_revives_nothing():
    model = mlp()
    x, y = regression()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.fit(x, y, epochs=2, batch_size=8, verbose=0)  # momentum is running
    pruning = tfvllm.callbacks.MagnitudePruning(model, schedule=PolynomialDecay(0.0, 0.8, 0, 16, frequency=2))
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            kernel, mask = pruning.state.pruning_vars[0][:2]
            assert not np.any(kernel.numpy()[mask.numpy() == 0])
            seen.append(1 - mask.numpy().mean())

    model.fit(x, y, epochs=3, batch_size=8, verbose=0, callbacks=[pruning, Watch()])
    expected = [0.8 - 0.8 * (1 - min(step - step % 2, 16) / 16) ** 3 for step in range(1, 25)]
    np.testing.assert_allclose(seen, expected, atol=1 / 512 + 1e-6)
    assert abs(pruning.sparsity - 0.8) < 0.005
    assert find_own(model) is None and len(model.weights) == 4  # an ordinary model again
    assert all(v.constraint is None for v in model.trainable_variables)
    model.fit(x, y, epochs=1, verbose=0)  # and it trains freely
    assert zeros(model.layers[0].kernel) < 0.5


def test_keeps_an_existing_constraint():
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(4, kernel_constraint=keras.constraints.NonNeg())])
    x, y = regression()
    model.compile(keras.optimizers.SGD(0.5), "mse")
    pruning = tfvllm.callbacks.MagnitudePruning(model, ConstantSparsity(0.25, 0, frequency=1))
    model.fit(x, y, verbose=0, callbacks=[pruning])
    assert np.asarray(model.layers[0].kernel).min() >= 0
    assert zeros(model.layers[0].kernel) >= 0.25
    assert isinstance(model.layers[0].kernel.constraint, keras.constraints.NonNeg)


@pytest.mark.parametrize("case", ["jit", "mixed_bfloat16", "mixed_float16", "steps_per_execution"])
def test_trains_under(case):
    policy = case if case.startswith("mixed") else "float32"
    with_policy = keras.dtype_policies.DTypePolicy(policy)
    model = keras.Sequential(
        [keras.Input((16,)), keras.layers.Dense(8, dtype=with_policy), keras.layers.Dense(4, dtype=with_policy)]
    )
    x, y = regression()
    optimizer = keras.optimizers.Adam(1e-2)
    if case == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=16.0)
    model.compile(
        optimizer, "mse", jit_compile=case == "jit", steps_per_execution=4 if case == "steps_per_execution" else 1
    )
    pruning = tfvllm.callbacks.MagnitudePruning(model, PolynomialDecay(0.0, 0.75, 0, 8, frequency=2))
    model.fit(x, y, epochs=2, batch_size=8, verbose=0, callbacks=[pruning])
    assert [zeros(layer.kernel) for layer in model.layers] == [0.75, 0.75]
    assert pruning.state.pruning_step == 16


def test_resumes_from_a_checkpoint(tmp_path):
    """Stopped after 6 steps and built anew, training ends where the uninterrupted one ends."""
    x, y = regression()

    def make():
        model = mlp(seed=1)
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
        return model, tfvllm.callbacks.MagnitudePruning(
            model, PolynomialDecay(0.0, 0.8, 0, 12, frequency=1), keep_masks=True
        )

    def fit(model, pruning, epochs, first=0):
        model.fit(
            x, y, epochs=epochs, initial_epoch=first, batch_size=16, shuffle=False, verbose=0, callbacks=[pruning]
        )

    whole, pruning = make()
    fit(whole, pruning, 4)
    half, pruning = make()
    fit(half, pruning, 2)
    half.save(tmp_path / "plain.keras")
    half.save_weights(tmp_path / "half.weights.h5")
    momenta = [np.asarray(v) for v in half.optimizer.variables]
    masks = [np.asarray(m) for m in pruning.state.mask_variables]

    again, pruning = make()
    again.load_weights(tmp_path / "half.weights.h5")
    assert pruning.state.pruning_step == 8
    for mask, saved in zip(pruning.state.mask_variables, masks):
        np.testing.assert_array_equal(np.asarray(mask), saved)
    again.optimizer.build(again.trainable_variables)
    for variable, value in zip(again.optimizer.variables, momenta):
        variable.assign(value)
    fit(again, pruning, 4, first=2)
    assert pruning.state.pruning_step == 16
    for a, b in zip(whole.trainable_variables, again.trainable_variables):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert len(keras.models.load_model(tmp_path / "plain.keras").weights) == 4  # masks do not get in the way


def test_backup_and_restore_carries_masks(tmp_path):
    x, y = regression()

    def run(stop):
        model = mlp(seed=1)
        model.compile(keras.optimizers.SGD(0.05), "mse")
        pruning = tfvllm.callbacks.MagnitudePruning(model, PolynomialDecay(0.0, 0.8, 0, 12, frequency=1))

        class Stop(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if stop and epoch == 2:
                    raise KeyboardInterrupt

        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
        with contextlib.suppress(KeyboardInterrupt):
            model.fit(x, y, epochs=4, batch_size=16, shuffle=False, verbose=0, callbacks=[backup, pruning, Stop()])
        return pruning

    assert run(stop=True).state.pruning_step == 8
    assert run(stop=False).state.pruning_step == 16


def test_inside_another_model():
    student = mlp()

    class Trainer(keras.Model):
        def __init__(self):
            super().__init__()
            self.student = student

        def call(self, x):
            return self.student(x)

    trainer = Trainer()
    x, y = regression()
    trainer.compile(keras.optimizers.Adam(1e-2), "mse")
    trainer.fit(x, y, verbose=0)
    pruning = tfvllm.callbacks.MagnitudePruning(student, ConstantSparsity(0.5, 0, frequency=1))
    trainer.fit(x, y, epochs=2, batch_size=16, verbose=0, callbacks=[pruning])
    assert zeros(student.layers[0].kernel) == 0.5
    assert find_states(trainer) == []


@pytest.mark.slow
def test_inside_a_distiller():
    teacher, student = zoo.build("bert"), zoo.build("bert")
    found = zoo.inputs("bert", 8)
    distiller = tfvllm.Distiller(
        teacher, student, losses={"logits": tfvllm.losses.ForwardKL(temperature=2.0)}, task_weight=0.5
    )
    distiller.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    pruning = tfvllm.callbacks.MagnitudePruning(student, PolynomialDecay(0.0, 0.5, 0, 4, frequency=1))
    distiller.fit(found, np.arange(8) % 3, epochs=2, batch_size=2, verbose=0, callbacks=[pruning])
    kernels = [t.variable for t in prunable_weights(student, PruneKernels())]
    assert all(abs(zeros(kernel) - 0.5) < 0.02 for kernel in kernels)
    assert all(zeros(t.variable) == 0 for t in prunable_weights(teacher))
    assert find_states(distiller) == []


def test_in_a_loop_of_ones_own():
    """TFMOT's recipe for custom training loops, word for word."""
    pruned = tfvllm.prune_low_magnitude(mlp(), ConstantSparsity(0.5, 0, frequency=2))
    x, y = regression()
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    step_callback = tfvllm.callbacks.UpdatePruningStep()
    step_callback.set_model(pruned)
    step_callback.on_train_begin()
    for _ in range(4):
        step_callback.on_train_batch_begin(batch=-1)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((pruned(x, training=True) - y) ** 2)
        variables = pruned.trainable_variables
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
    step_callback.on_epoch_end(epoch=0)
    assert [zeros(layer.kernel) for layer in tfvllm.strip_pruning(pruned).layers] == [0.5, 0.5]


def test_global_scope_and_per_layer_targets():
    model = mlp()
    model.layers[1].kernel.assign(np.asarray(model.layers[1].kernel) * 10)
    x, y = regression()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    together = tfvllm.callbacks.MagnitudePruning(model, ConstantSparsity(0.6, 0, frequency=1), scope="global")
    model.fit(x, y, verbose=0, callbacks=[together])
    first, second = (zeros(layer.kernel) for layer in model.layers)
    assert abs(together.sparsity - 0.6) < 0.003 and first > 0.65 > 0.5 > second

    model = mlp()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    names = [t.name for t in prunable_weights(model)]
    targets = {names[1]: None, "*": ConstantSparsity(0.25, 0, frequency=1)}
    model.fit(x, y, verbose=0, callbacks=[tfvllm.callbacks.MagnitudePruning(model, targets)])
    assert [zeros(layer.kernel) for layer in model.layers] == [0.25, 0.0]


def test_m_by_n_is_renewed_during_training():
    layer = keras.layers.Dense(4, use_bias=False)
    layer.build((None, 8))
    rng = np.random.default_rng(0)
    state = MaskState(list(prunable_weights(layer)), ConstantSparsity(0.5, 0, frequency=2), sparsity_m_by_n=(2, 4))
    state.start()
    for step in range(1, 5):
        layer.kernel.assign(rng.normal(size=(8, 4)))
        renewed = state.advance()
        assert renewed == (step == 1 or step % 2 == 0)
        if renewed:
            kept = (np.asarray(layer.kernel) != 0).reshape(2, 4, 4).sum(axis=1)
            assert (kept == 2).all()


def test_einsum_kernels_prune_through_a_matrix():
    attention = keras.layers.MultiHeadAttention(2, 4)
    attention.build((None, 5, 8), (None, 5, 8))
    names = {t.name.split("/")[-2]: t for t in prunable_weights(attention)}
    assert set(names) == {"query", "key", "value", "attention_output"}
    assert names["query"].view.matrix_shape == (8, 8) and names["attention_output"].view.matrix_shape == (8, 8)
    state = MaskState(list(names.values()), ConstantSparsity(0.5, 0, frequency=1), sparsity_m_by_n=(2, 4))
    state.start()
    state.advance()
    for target in names.values():
        matrix = target.view.to_matrix(np.asarray(target.variable))
        assert ((matrix != 0).reshape(2, 4, 8).sum(axis=1) == 2).all()
    gemma = keras.layers.EinsumDense("btd,ndh->btnh", (None, 2, 4))
    gemma.build((None, 3, 6))
    view = matrix_view(gemma, gemma.kernel)
    value = np.asarray(gemma.kernel)
    x = np.random.default_rng(0).normal(size=(1, 3, 6)).astype("float32")
    np.testing.assert_allclose(
        (x[0] @ view.to_matrix(value)).reshape(1, 3, 2, 4), np.asarray(gemma(x)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(view.from_matrix(view.to_matrix(value)), value)
    np.testing.assert_array_equal(np.asarray(view.from_matrix(view.to_matrix(tf.constant(value)))), value)


def test_backbone_and_task_prune_blocks_not_embeddings():
    task = zoo.build("bert")
    found = zoo.inputs("bert", 8)
    pruning = tfvllm.callbacks.MagnitudePruning(task, ConstantSparsity(0.5, 0, frequency=1), block_size=(2, 2))
    pruning.set_model(task)
    pruning.on_train_begin()
    pruning.on_train_batch_begin(0)
    assert abs(pruning.sparsity - 0.5) < 0.01
    assert zeros(task.backbone.token_embedding.embeddings) == 0
    assert np.isfinite(np.asarray(task(found))).all()
    pruning.on_train_end()


def test_movement_prunes_what_shrinks_not_what_is_small():
    """Large useless weights go, small useful ones stay: magnitude would do the opposite."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 8)).astype("float32")
    y = x[:, :4].sum(axis=1, keepdims=True)
    start = np.asarray([0.1] * 4 + [0.5] * 4, "float32")[:, None]
    kept = {}
    for cls in (tfvllm.callbacks.MovementPruning, tfvllm.callbacks.MagnitudePruning):
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1, use_bias=False)])
        model.layers[0].kernel.assign(start)
        model.compile(keras.optimizers.SGD(0.005), "mse")
        pruning = cls(model, ConstantSparsity(0.5, 16, frequency=16))
        model.fit(x, y, batch_size=16, verbose=0, callbacks=[pruning])
        kept[cls.__name__] = np.flatnonzero(np.asarray(model.layers[0].kernel))
    np.testing.assert_array_equal(kept["MovementPruning"], [0, 1, 2, 3])
    assert set(kept["MagnitudePruning"]) & {4, 5, 6, 7}


# ---------------------------------------------------------------- the wrapper form


def test_wrapper_form_trains_saves_and_strips(tmp_path):
    model = mlp()
    x, y = regression()
    pruned = tfvllm.prune_low_magnitude(model, pruning_schedule=PolynomialDecay(0.0, 0.5, 0, 8, frequency=1))
    assert [layer.name for layer in pruned.layers] == [f"prune_low_magnitude_{layer.name}" for layer in model.layers]
    assert pruned.layers[0].layer.kernel is model.layers[0].kernel
    pruned.compile(keras.optimizers.Adam(1e-2), "mse")
    with pytest.raises(tf.errors.InvalidArgumentError, match="UpdatePruningStep"):
        pruned.fit(x, y, verbose=0)
    pruned.fit(x, y, epochs=2, batch_size=8, verbose=0, callbacks=[tfvllm.callbacks.UpdatePruningStep()])
    expected = pruned.predict(x, verbose=0)
    pruned.save(tmp_path / "pruned.keras")
    loaded = keras.models.load_model(tmp_path / "pruned.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    assert int(loaded.layers[0].pruning_step.numpy()) == 16
    assert loaded.layers[0].pruning_schedule.get_config() == pruned.layers[0].pruning_schedule.get_config()
    stripped = tfvllm.strip_pruning(loaded)
    assert [type(layer).__name__ for layer in stripped.layers] == ["Dense", "Dense"]
    assert [zeros(layer.kernel) for layer in stripped.layers] == [0.5, 0.5]
    np.testing.assert_allclose(stripped.predict(x, verbose=0), expected, rtol=1e-6)


def test_functional_composite_and_policy():
    class ConvOnly(tfvllm.PruningPolicy):
        def allow_pruning(self, layer):
            return isinstance(layer, keras.layers.Conv2D)

        def ensure_model_supports_pruning(self, model):
            pass

    image = keras.Input((8, 8, 2))
    x = keras.layers.Conv2D(4, 3, name="conv")(image)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(3, name="out")(x)
    model = keras.Model(image, x)
    pruned = tfvllm.prune_low_magnitude(model, ConstantSparsity(0.5, 0, frequency=1), pruning_policy=ConvOnly())
    assert [layer.name for layer in pruned.layers if "prune" in layer.name] == ["prune_low_magnitude_conv"]

    sequence = keras.Input((5, 8))
    attended = keras.layers.MultiHeadAttention(2, 4, name="mha")(sequence, sequence)
    model = keras.Model(sequence, keras.layers.Dense(1, name="d")(attended))
    pruned = tfvllm.prune_low_magnitude(model, ConstantSparsity(0.5, 0, frequency=1))
    data = np.random.default_rng(0).normal(size=(4, 5, 8)).astype("float32")
    np.testing.assert_allclose(pruned.predict(data, verbose=0), model.predict(data, verbose=0), rtol=1e-6)
    pruned.compile("sgd", "mse")
    pruned.fit(data, np.zeros((4, 5, 1)), verbose=0, callbacks=[tfvllm.callbacks.UpdatePruningStep()])
    stripped = tfvllm.strip_pruning(pruned)
    assert all(zeros(t.variable) == 0.5 for t in prunable_weights(stripped))
    layers = tfvllm.prune_low_magnitude([keras.layers.Dense(2), keras.layers.Dense(3)], ConstantSparsity(0.5, 0))
    assert [layer.name.startswith("prune_low_magnitude") for layer in layers] == [True, True]


def test_subclassed_models_keep_their_class():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = keras.layers.Dense(8)
            self.table = keras.layers.Embedding(6, 16)

        def call(self, ids):
            return self.first(self.table(ids))

    model = Net()
    ids = np.arange(6).reshape(2, 3)
    model(ids)
    pruned = tfvllm.prune_low_magnitude(model, ConstantSparsity(0.5, 0, frequency=1))
    assert pruned is model
    model.compile("sgd", "mse")
    model.fit(ids, np.zeros((2, 3, 8)), verbose=0, callbacks=[tfvllm.callbacks.UpdatePruningStep()])
    assert zeros(model.first.kernel) == zeros(model.table.embeddings) == 0.5
    assert tfvllm.strip_pruning(model) is model and find_states(model) == []


def test_summaries_are_written(tmp_path):
    model = mlp()
    x, y = regression()
    model.compile("sgd", "mse")
    pruning = tfvllm.callbacks.MagnitudePruning(model, ConstantSparsity(0.5, 0, frequency=1), keep_masks=True)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[pruning, tfvllm.callbacks.PruningSummaries(str(tmp_path))])
    (path,) = (tmp_path / "metrics").iterdir()
    values = {}
    for record in tf.data.TFRecordDataset(str(path)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            values.setdefault(value.tag, []).append(float(tf.make_ndarray(value.tensor)))
    sparsities = {tag: v for tag, v in values.items() if tag.endswith("sparsity")}
    assert len(sparsities) == 2 and all(v[0] == 0.0 and v[-1] == 0.5 for v in sparsities.values())


MIRRORED = """
    import tensorflow as tf
    cpus = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
    import keras, numpy as np, tfvllm
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8), keras.layers.Dense(4)])
        model.compile(keras.optimizers.Adam(1e-2), "mse")
    pruning = tfvllm.callbacks.MagnitudePruning(model, tfvllm.PolynomialDecay(0.0, 0.75, 0, 8, frequency=2))
    rng = np.random.default_rng(0)
    model.fit(rng.normal(size=(64, 16)), rng.normal(size=(64, 4)), epochs=2, batch_size=8, verbose=0,
              callbacks=[pruning])
    for layer in model.layers:
        copies = [np.asarray(v) for v in layer.kernel.value.values]
        assert len(copies) == 2 and np.array_equal(*copies)
        assert np.mean(copies[0] == 0) == 0.75, np.mean(copies[0] == 0)
    print("mirrored")
"""


@pytest.mark.slow
def test_under_mirrored_strategy():
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MIRRORED)], capture_output=True, text=True, check=False, env=environment
    )
    assert result.stdout.strip().endswith("mirrored"), result.stderr[-3000:]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PolynomialDecay(0.0, 0.5, 10, 5), "begin_step <= end_step"),
        (lambda: PolynomialDecay(0.0, 1.0, 0, 5), r"shares in \[0, 1\)"),
        (lambda: ConstantSparsity(1.2, 0), r"shares in \[0, 1\)"),
        (lambda: ConstantSparsity(0.5, 0, frequency=0), "frequency >= 1"),
        (lambda: tfvllm.callbacks.MagnitudePruning(mlp(), 0.5), "expected one such as"),
        (lambda: tfvllm.callbacks.MagnitudePruning(mlp(), {"nothing*": ConstantSparsity(0.5, 0)}), "no weight matches"),
        (
            lambda: tfvllm.callbacks.MagnitudePruning(mlp(), ConstantSparsity(0.5, 0), sparsity_m_by_n=(4, 4)),
            "0 < m < n",
        ),
        (lambda: tfvllm.callbacks.MagnitudePruning(mlp(), ConstantSparsity(0.5, 0), block_size=(2, 0)), ">= 1"),
        (lambda: tfvllm.callbacks.MagnitudePruning(mlp(), ConstantSparsity(0.5, 0), block_size=3), "two integers"),
        (lambda: tfvllm.callbacks.MagnitudePruning(mlp(), ConstantSparsity(0.5, 0), block_pooling_type="SUM"), "AVG"),
        (lambda: tfvllm.callbacks.MagnitudePruning(mlp(), ConstantSparsity(0.5, 0), scope="all"), "'global'"),
        (
            lambda: tfvllm.callbacks.MagnitudePruning(
                keras.Sequential([keras.layers.Dense(2)]), ConstantSparsity(0.5, 0)
            ),
            "not built",
        ),
        (lambda: tfvllm.prune_low_magnitude("model"), "got str"),
        (lambda: tfvllm.strip_pruning(3), "got int"),
        (
            lambda: PruneKernels().ensure_model_supports_pruning(
                keras.Sequential([keras.Input((4,)), keras.layers.ReLU()])
            ),
            "no kernel",
        ),
        (lambda: tfvllm.callbacks.PruningSummaries(""), "non-empty"),
    ],
)
def test_one_clear_error(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_pruning_twice_is_refused():
    model = mlp()
    tfvllm.callbacks.MagnitudePruning(model, ConstantSparsity(0.5, 0))
    with pytest.raises(InputError, match="pruned already"):
        tfvllm.callbacks.MagnitudePruning(model, ConstantSparsity(0.5, 0))
    tfvllm.strip_pruning(model)
    tfvllm.callbacks.MagnitudePruning(model, ConstantSparsity(0.5, 0))

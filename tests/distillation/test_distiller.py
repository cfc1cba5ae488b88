"""The Distiller as a Keras model: what it trains, what it leaves alone, what changes nothing."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.distillation.pairs import WORDS, batch, causal_lm, classifier, lm_batch, seq2seq, seq2seq_batch
from tfvllm.distillation import distiller as module
from tfvllm.errors import InputError

losses = tfvllm.losses

EVERYTHING = {
    "logits": losses.ForwardKL(temperature=2.0),
    "reverse": losses.ReverseKL(),
    "hidden": losses.HiddenStates(),
    "cosine": losses.HiddenStates(layers="last", distance="cosine"),
    "maps": losses.AttentionMaps(),
    "relations": losses.Relations(),
}


def make(teacher, student, which=EVERYTHING, **options):
    distiller = tfvllm.Distiller(teacher, student, losses=dict(which), **options)
    distiller.compile(optimizer=keras.optimizers.Adam(0.01), metrics=["accuracy"])
    return distiller


def gradients(distiller, x, y, sample_weight=None):
    with tf.GradientTape() as tape:
        loss = distiller.compute_loss(x, y, sample_weight=sample_weight, training=True)
    return loss.numpy(), tape.gradient(loss, distiller.trainable_variables)


FAMILIES = {
    "classifier": (lambda: (classifier(4), classifier(2, heads=4, width=8)), batch),
    "causal_lm": (lambda: (causal_lm(4), causal_lm(2, heads=4, width=8)), lm_batch),
    "seq2seq": (lambda: (seq2seq(2), seq2seq(1, heads=4, width=8)), seq2seq_batch),
}


@pytest.fixture(
    params=[
        "classifier",
        pytest.param("causal_lm", marks=pytest.mark.slow),
        pytest.param("seq2seq", marks=pytest.mark.thorough),
    ]
)
def family(request):
    models, data = FAMILIES[request.param]
    return (*models(), data)


# ---------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_training_brings_the_student_to_the_teacher(name):
    models, data = FAMILIES[name]
    teacher, student = models()
    before = [w.copy() for w in teacher.get_weights()]
    distiller = make(teacher, student, task_weight=0.0)
    x, y, *weight = data(rows=8)
    history = distiller.fit(
        x, y, sample_weight=weight[0] if weight else None, epochs=12, batch_size=4, verbose=0
    ).history
    assert history["loss"][-1] < 0.6 * history["loss"][0]
    for key in ("logits", "hidden", "maps", "relations"):
        assert history[f"{key}_loss"][-1] < history[f"{key}_loss"][0]
    for old, new in zip(before, teacher.get_weights()):
        np.testing.assert_array_equal(old, new)
    assert not teacher.trainable


def test_metrics_add_up_to_the_loss(duo):
    weights = {"logits": 0.7, "hidden": 0.1}
    distiller = make(*duo, loss_weights=weights, task_weight=0.2)
    distiller.run_eagerly = True
    x, y = batch(8)
    logs = distiller.evaluate(x, y, batch_size=4, return_dict=True, verbose=0)
    total = 0.2 * logs["task_loss"] + sum(weights.get(key, 1.0) * logs[f"{key}_loss"] for key in EVERYTHING)
    assert logs["loss"] == pytest.approx(total, rel=1e-5)
    assert {"accuracy", "task_loss", *(f"{key}_loss" for key in EVERYTHING)} <= set(logs)


def test_each_model_runs_once_a_batch(duo, monkeypatch):
    runs = []
    monkeypatch.setattr(
        module,
        "run",
        lambda model, *a, _run=module.run, **k: runs.append((model.name, k["training"])) or _run(model, *a, **k),
    )
    distiller = make(*duo)
    distiller.run_eagerly = True
    x, y = batch(4)
    distiller.train_on_batch(x, y)
    assert runs == [(duo[1].name, True), (duo[0].name, False)]


def test_the_teacher_is_no_part_of_the_distiller(pair):
    teacher, student = pair
    distiller = make(teacher, student, {"logits": losses.ForwardKL()})
    of_teacher = {id(v) for v in teacher.variables}
    assert not of_teacher & {id(v) for v in distiller.variables}
    assert len(distiller.weights) == len(student.weights)
    assert distiller.teacher is teacher and distiller.student is student


def test_projections_belong_to_the_distiller_alone(pair):
    teacher, student = pair
    count = len(student.weights)
    distiller = make(teacher, student, {"hidden": losses.HiddenStates()})
    assert len(student.weights) == count
    extra = [v for v in distiller.trainable_variables if not any(v is w for w in student.weights)]
    assert [tuple(v.shape) for v in extra] == [(8, 16), (8, 16)]
    x, y = batch()
    _, found = gradients(distiller, x, y)
    assert all(np.abs(g).sum() > 0 for v, g in zip(distiller.trainable_variables, found) if any(v is e for e in extra))


@pytest.mark.thorough
def test_taps_leave_the_models_as_they_were(duo):
    distiller = make(*duo)
    x, y = batch()
    before = duo[1](x)
    distiller.test_on_batch(x, y)
    for model in duo:
        for layer in model._flatten_layers():
            assert not {"call", "quantized_call", "_compute_attention"} & set(vars(layer))
    np.testing.assert_array_equal(before, duo[1](x))


@pytest.mark.slow
def test_raw_strings_equal_preprocessed_batches(duo):
    distiller = make(*duo)
    texts = ["the film was good", "a very BAD film", "", "很好", "not dull", "zebra"]
    y = np.array([0, 1, 2, 0, 1, 2])
    x = duo[1].preprocessor(texts)
    expected = distiller.evaluate(x, y, return_dict=True, verbose=0)
    for told in (texts, np.array(texts), tf.constant(texts)):
        found = distiller.evaluate(told, y, return_dict=True, verbose=0)
        assert found == pytest.approx(expected, rel=1e-5)
    dataset = tf.data.Dataset.from_tensor_slices((texts, y)).batch(6)
    assert distiller.evaluate(dataset, return_dict=True, verbose=0) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(distiller.predict(texts, verbose=0), duo[1].predict(texts, verbose=0), rtol=1e-6)
    history = distiller.fit(texts, y, batch_size=2, validation_split=0.34, epochs=2, verbose=0).history
    assert len(history["val_loss"]) == 2
    assert np.isfinite(distiller.train_on_batch(texts[:2], y[:2], return_dict=True)["loss"])
    history = distiller.fit(texts, batch_size=3, verbose=0).history  # no labels: the teacher alone
    assert "task_loss" in history and np.isfinite(history["loss"][0])


@pytest.mark.thorough
def test_raw_strings_go_through_the_students_preprocessor(duo):
    distiller = make(*duo, {"logits": losses.ForwardKL()})
    texts, y = ["the film was good", "a very BAD film", "", "很好"], np.array([0, 1, 2, 0])
    x = duo[1].preprocessor(texts)
    assert distiller.test_on_batch(texts, y, return_dict=True) == pytest.approx(
        distiller.test_on_batch(x, y, return_dict=True), rel=1e-6
    )
    np.testing.assert_allclose(distiller.predict(texts, verbose=0), duo[1](x), rtol=1e-5, atol=1e-6)


def test_unlabelled_batches_train_on_the_teacher_alone(duo):
    distiller = make(*duo, {"logits": losses.ForwardKL()})
    x, _ = batch(8)
    logs = distiller.evaluate(tf.data.Dataset.from_tensors((x,)), return_dict=True, verbose=0)
    assert logs["loss"] == pytest.approx(logs["logits_loss"]) and logs["loss"] > 0


@pytest.mark.thorough
def test_student_regularization_is_kept(pair):
    teacher, student = pair
    distiller = make(teacher, student, {"logits": losses.ForwardKL()})
    x, y = batch()
    plain, _ = gradients(distiller, x, y)
    student.output_dense.kernel_regularizer = keras.regularizers.L2(0.1)
    student.output_dense.kernel.regularizer = keras.regularizers.L2(0.1)
    regularized, _ = gradients(distiller, x, y)
    assert regularized - plain == pytest.approx(0.1 * np.square(student.output_dense.kernel.numpy()).sum(), rel=1e-4)


@pytest.mark.slow
def test_the_student_is_pruned_while_it_learns(duo):
    teacher, student = duo
    distiller = make(teacher, student, {"logits": losses.ForwardKL(), "hidden": losses.HiddenStates()})
    schedule = tfvllm.schedules.PolynomialDecay(0.0, 0.5, 0, 4, frequency=1)
    pruning = tfvllm.callbacks.MagnitudePruning(student, schedule=schedule)
    x, y = batch(8)
    distiller.fit(x, y, batch_size=2, epochs=2, callbacks=[pruning], verbose=0)
    kernel = student.backbone.transformer_layers[0]._feedforward_intermediate_dense.kernel.numpy()
    assert (kernel == 0).mean() == pytest.approx(0.5, abs=0.02)
    for layers in distiller.projections.values():
        assert all((layer.kernel.numpy() != 0).all() for layer in layers)
    assert all((v.numpy() != 0).mean() > 0.9 for v in teacher.trainable_variables if "kernel" in v.path)


# ---------------------------------------------------------------- what changes nothing


def test_what_is_under_the_padding_changes_nothing(family):
    teacher, student, data = family
    distiller = make(teacher, student)
    x, y, *weight = data()
    loss, grads = gradients(distiller, x, y, *weight)
    other = dict(x)
    for name in [n for n in x if n.endswith("token_ids")]:
        mask = x[name.replace("token_ids", "padding_mask")]
        other[name] = np.where(mask == 1, x[name], 7)
    assert any((other[n] != x[n]).any() for n in x)
    changed, changed_grads = gradients(distiller, other, y, *weight)
    assert changed == pytest.approx(loss, rel=1e-5)
    for one, two in zip(grads, changed_grads):
        if one is not None and not isinstance(one, tf.IndexedSlices):
            np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)


def test_masked_equals_sliced(family):
    teacher, student, data = family
    distiller = make(teacher, student, task_weight=0.0)  # Keras's own loss counts padded positions in its mean
    x, y, *weight = data()

    def padded(a):
        return np.pad(a, [(0, 0), (0, 3)]) if a.ndim == 2 else a

    loss, _ = gradients(distiller, x, y, *weight)
    longer, _ = gradients(distiller, {k: padded(v) for k, v in x.items()}, padded(y), *map(padded, weight))
    assert longer == pytest.approx(loss, rel=1e-5)


def test_sample_weight_zero_gives_zero_gradient(family):
    teacher, student, data = family
    distiller = make(teacher, student)
    x, y, *_ = data()
    _, grads = gradients(distiller, x, y, np.zeros(y.shape, "float32"))
    for gradient in grads:
        if gradient is not None:
            assert np.abs(tf.convert_to_tensor(gradient)).max() == 0.0


@pytest.mark.thorough
def test_sample_weight_zero_equals_leaving_out(pair):
    distiller = make(*pair)
    x, y = batch(6)
    weight = np.array([1, 1, 1, 1, 0, 0], "float32")
    loss, _ = gradients(distiller, x, y, weight)
    per_example = {**EVERYTHING}
    per_example = {k: v for k, v in per_example.items() if v.reads == "logits"}
    distiller = make(*pair, per_example)
    loss, _ = gradients(distiller, x, y, weight)
    short, _ = gradients(distiller, {k: v[:4] for k, v in x.items()}, y[:4])
    assert loss == pytest.approx(short * 4 / 6, rel=1e-5)  # as in Keras, the mean is over all examples
    doubled, _ = gradients(distiller, x, y, 2 * weight)
    assert doubled == pytest.approx(2 * loss, rel=1e-5)


def test_weights_of_one_change_nothing(family):
    teacher, student, data = family
    distiller = make(teacher, student)
    x, y, *_ = data()
    one, _ = gradients(distiller, x, y)
    two, _ = gradients(distiller, x, y, np.ones((len(y), 1), "float32") if y.ndim == 1 else np.ones_like(y, "float32"))
    assert one == pytest.approx(two, rel=1e-6)


@pytest.mark.slow
def test_gradient_accumulation_gives_the_step_of_the_whole_batch(duo):
    teacher, student = duo
    x, y = batch(8)
    start = student.get_weights()
    steps = []
    for size, accumulate in ((8, None), (4, 2)):
        student.set_weights(start)
        distiller = tfvllm.Distiller(teacher, student, losses={"logits": losses.ForwardKL(2.0)})
        distiller.compile(keras.optimizers.SGD(0.5, gradient_accumulation_steps=accumulate))
        distiller.fit(x, y, batch_size=size, shuffle=False, verbose=0)
        steps.append(student.get_weights())
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(start, steps[0]))
    for one, two in zip(*steps):
        np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.slow
def test_jit_compile_gives_the_same_step(duo):
    teacher, student = duo
    x, y = batch(4)
    start, results = student.get_weights(), []
    for jit in (False, True):
        student.set_weights(start)
        distiller = tfvllm.Distiller(teacher, student, losses={k: EVERYTHING[k] for k in ("logits", "hidden", "maps")})
        for layers in distiller.projections.values():
            for layer in layers:
                layer.kernel.assign(np.full(layer.kernel.shape, 0.1))
        distiller.compile(keras.optimizers.SGD(0.1), jit_compile=jit)
        assert distiller.jit_compile is jit
        distiller.train_on_batch(x, y)
        results.append(student.get_weights())
    for one, two in zip(*results):
        np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "policies", [("bfloat16", "float32"), ("float32", "mixed_bfloat16"), ("float32", "mixed_float16")]
)
def test_unlike_precisions(policies):
    models = []
    for policy, layers in zip(policies, (4, 2)):
        keras.config.set_dtype_policy(policy)
        models.append(classifier(layers))
    keras.config.set_dtype_policy("float32")
    distiller = make(*models)
    x, y = batch(8)
    history = distiller.fit(x, y, epochs=4, batch_size=8, verbose=0).history
    assert np.isfinite(history["loss"]).all() and history["loss"][-1] < history["loss"][0]
    assert isinstance(distiller.optimizer, keras.optimizers.LossScaleOptimizer) is (policies[1] == "mixed_float16")


# ---------------------------------------------------------------- schedules, several teachers


def test_scheduled_weights_and_temperature(pair):
    ramp = keras.optimizers.schedules.PolynomialDecay(1.0, 4, 3.0)  # 1 at step 0, 3 from step 4 on
    distiller = make(
        *pair, {"logits": losses.ForwardKL(temperature=ramp)}, loss_weights={"logits": ramp}, task_weight=0.0
    )
    x, y = batch()
    teacher, student = (model(x) for model in pair)
    for step, value in ((0, 1.0), (2, 2.0), (4, 3.0), (9, 3.0)):
        distiller.optimizer.iterations.assign(step)
        expected = value * np.mean(losses.ForwardKL(value)(teacher, student))
        assert gradients(distiller, x, y)[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.thorough
def test_several_teachers_are_averaged(pair):
    first, student = pair
    second = classifier(3, heads=2, width=16)
    second.set_weights([w * 0.7 for w in second.get_weights()])
    x, y = batch()
    one, two = (
        gradients(tfvllm.Distiller(t, student, losses={"logits": losses.ForwardKL()}, task_weight=0.0), x, y)[0]
        for t in (first, second)
    )
    both = {"losses": {"logits": losses.ForwardKL()}, "task_weight": 0.0}
    assert gradients(tfvllm.Distiller([first, second], student, **both), x, y)[0] == pytest.approx(
        (one + two) / 2, rel=1e-5
    )
    weighted = tfvllm.Distiller({"a": first, "b": second}, student, teacher_weights={"a": 3.0}, **both)
    assert gradients(weighted, x, y)[0] == pytest.approx((3 * one + two) / 4, rel=1e-5)
    assert weighted.teacher == {"a": first, "b": second}
    with pytest.raises(InputError, match=r"names \['c'\], but the teachers are \['a', 'b'\]"):
        tfvllm.Distiller({"a": first, "b": second}, student, teacher_weights={"c": 1.0})
    unlike = tfvllm.Distiller([first, classifier(2, width=8)], student, losses={"hidden": losses.HiddenStates()})
    assert list(unlike.projections) == ["hidden_teacher_0"]  # the second teacher has the student's width


def test_layers_of_any_keras_model_by_name():
    def mlp(width):
        inputs = keras.Input((5,))
        x = keras.layers.Dense(width, "relu", name="inner")(inputs)
        return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))

    distiller = make(
        mlp(7), mlp(4), {"hidden": losses.HiddenStates(layers=[("inner", "inner")]), "logits": losses.Logits()}
    )
    x = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
    history = distiller.fit(x, np.zeros(6, int), epochs=5, verbose=0).history
    assert history["hidden_loss"][-1] < history["hidden_loss"][0]
    with pytest.raises(InputError, match=r"has no layer 'outer'; valid names are .*inner.*head"):
        make(mlp(7), mlp(4), {"hidden": losses.HiddenStates(layers=[("outer", "inner")])})


# ---------------------------------------------------------------- saving


def test_save_without_the_teacher_and_go_on(duo, tmp_path):
    teacher, student = duo
    x, y = batch(8)
    ramp = keras.optimizers.schedules.PolynomialDecay(1.0, 6, 0.0)

    distiller = make(teacher, student, loss_weights={"logits": ramp})
    distiller.run_eagerly = True  # tracing each of them takes longer than all steps
    distiller.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    distiller.save(tmp_path / "half.keras")
    distiller.fit(x, y, batch_size=4, shuffle=False, verbose=0)

    again = keras.models.load_model(tmp_path / "half.keras")
    again.run_eagerly = True
    assert again.teacher is None
    assert len(again.weights) == len(distiller.weights)
    assert "accuracy" in again.evaluate(x, y, return_dict=True, verbose=0)
    with pytest.raises(InputError, match="no teacher"):
        again.fit(x, y, verbose=0)
    again.teacher = teacher
    assert int(again.optimizer.iterations) == 2
    again.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    for one, two in zip(distiller.get_weights(), again.get_weights()):
        np.testing.assert_allclose(one, two, atol=1e-6)
    again.student.save(tmp_path / "student.keras")
    alone = keras.models.load_model(tmp_path / "student.keras")
    np.testing.assert_allclose(alone(x), distiller.student(x), atol=1e-6)


@pytest.mark.slow
def test_backup_and_restore(duo, tmp_path):
    teacher, student = duo
    x, y = batch(8)
    start = student.get_weights()
    options = {"batch_size": 4, "shuffle": False, "verbose": 0}

    def fresh():
        student.set_weights(start)
        return make(teacher, student, {"logits": losses.ForwardKL(2.0)})

    whole = fresh()
    whole.fit(x, y, epochs=3, **options)
    expected = student.get_weights()

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        fresh().fit(x, y, epochs=3, callbacks=[backup, Stop()], **options)
    resumed = fresh()
    resumed.fit(x, y, epochs=3, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup")], **options)
    assert int(resumed.optimizer.iterations) == 6
    for one, two in zip(expected, student.get_weights()):
        np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.thorough
def test_cross_entropy_by_name_takes_logits(duo):
    distiller = tfvllm.Distiller(*duo)
    distiller.compile("sgd", loss="sparse_categorical_crossentropy")
    x, y = batch()
    logs = distiller.evaluate(x, y, return_dict=True, verbose=0)
    expected = tf.nn.sparse_softmax_cross_entropy_with_logits(y, duo[1](x))
    assert logs["task_loss"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_softmax_heads_are_read_before_the_softmax(duo):
    teacher = classifier(2, width=8, activation="softmax")
    teacher.set_weights(duo[0].get_weights())
    x, y = batch()
    one, _ = gradients(make(duo[0], duo[1], {"logits": losses.ForwardKL(2.0)}), x, y)
    two, _ = gradients(make(teacher, duo[1], {"logits": losses.ForwardKL(2.0)}), x, y)
    assert one == pytest.approx(two, rel=1e-4)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "build, told",
    [
        (
            lambda t, s: tfvllm.Distiller(t, s, losses={"logits": "kl"}),
            r"losses\['logits'\] must be a loss of tfvllm.losses",
        ),
        (lambda t, s: tfvllm.Distiller(t, s, losses={}), "losses must be"),
        (
            lambda t, s: tfvllm.Distiller(t, s, loss_weights={"logit": 1.0}),
            r"names \['logit'\], but the losses are \['logits'\]",
        ),
        (lambda t, s: tfvllm.Distiller(t, s, task_weight=-1.0), "zero or above"),
        (lambda t, s: tfvllm.Distiller(t, None), "student must be a keras.Model"),
        (lambda t, s: tfvllm.Distiller("teacher", s), "teacher must be a keras.Model"),
        (lambda t, s: tfvllm.Distiller(t, t), "share"),
        (lambda t, s: tfvllm.Distiller(t, classifier(1, classes=5)), "teacher has 3 and the student 5"),
        (
            lambda t, s: tfvllm.Distiller(t, classifier(1, words=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])),
            "teacher's vocabulary has 18 entries and the student's 6",
        ),
        (
            lambda t, s: tfvllm.Distiller(t, classifier(1, words=[*WORDS[:-2], "hao", "bu"])),
            "id 16 is '好' to the teacher's tokenizer and 'hao' to the student's",
        ),
        (lambda t, s: tfvllm.Distiller({"student": t}, s), "cannot name a teacher"),
        (
            lambda t, s: tfvllm.Distiller(t, s, losses={"h": losses.HiddenStates(layers=[(4, 0)])}),
            "teacher has no layer 4; valid are 0 to 3",
        ),
        (
            lambda t, s: tfvllm.Distiller(t, s, losses={"h": losses.HiddenStates(layers=[(0, -3)])}),
            "student has no layer -3; valid are 0 to 1",
        ),
        (
            lambda t, s: tfvllm.Distiller(t, s, losses={"h": losses.HiddenStates(layers={"decoder": "last"})}),
            "4 encoder blocks",
        ),
        (lambda t, s: tfvllm.Distiller(s, t, losses={"h": losses.HiddenStates()}), "at least as deep"),
    ],
)
def test_one_clear_error(pair, build, told):
    with pytest.raises(InputError, match=told):
        build(*pair)


def test_missing_masks_and_inputs():
    ids = keras.Input((None,), dtype="int32", name="token_ids")

    def lm(width):
        return keras.Model(ids, keras.layers.Dense(9)(keras.layers.Embedding(9, width)(ids)))

    x = np.ones((2, 4), "int32")
    distiller = tfvllm.Distiller(lm(4), lm(3))
    with pytest.raises(InputError, match=r"nothing says which are padding.*padding_mask.*mask="):
        distiller.compute_loss(x, None)
    assert np.isfinite(tfvllm.Distiller(lm(4), lm(3), mask=None).compute_loss(x, None))
    by_function = tfvllm.Distiller(lm(4), lm(3), mask=lambda x: x != 0)
    longer = np.pad(x, [(0, 0), (0, 2)])
    assert float(by_function.compute_loss(longer, None)) == pytest.approx(
        float(by_function.compute_loss(x, None)), rel=1e-6
    )
    teacher, student = classifier(2), classifier(1)
    with pytest.raises(InputError, match=r"\['segment_ids'\] missing"):
        tfvllm.Distiller(teacher, student).compute_loss({k: v for k, v in batch()[0].items() if k != "segment_ids"})
    frozen = tfvllm.Distiller(teacher, student)
    frozen.compile()
    student.trainable = False
    with pytest.raises(InputError, match=r"frozen.*student.trainable = True"):
        frozen.fit(batch()[0], verbose=0)
    bare = tfvllm.Distiller(teacher, classifier(1, preprocessor=False))
    bare.compile()
    with pytest.raises(InputError, match="no preprocessor"):
        bare.fit(["a film"], np.array([1]), verbose=0)


# ---------------------------------------------------------------- the tests, tested


class Unmasked(tfvllm.Distiller):
    """Wrong on purpose: counts padded positions."""

    def _mask_for(self, *args):
        return None


def test_a_distiller_that_forgets_its_masks_is_caught():
    distiller = Unmasked(causal_lm(4), causal_lm(2), losses={"logits": losses.ForwardKL()}, task_weight=0.0)
    x, y, _ = lm_batch()
    other = {**x, "token_ids": np.where(x["padding_mask"] == 1, x["token_ids"], 7)}
    assert abs(float(distiller.compute_loss(x, y)) - float(distiller.compute_loss(other, y))) > 1e-4

"""Training that can be stopped: batches, state after each epoch, the best weights."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfvllm.compress import batches, optimizer, training
from tfvllm.compress.batches import Batches, Tokens
from tfvllm.compress.console import Console
from tfvllm.compress.training import EpochState


def tokens(count=37, width=16, seed=0) -> Tokens:
    """Sentences of ids 5..24 between [CLS]=2 and [SEP]=3; the label is whether id 7 occurs."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, width + 1, count)
    ids = np.zeros((count, width), "int32")
    labels = np.arange(count) % 2
    for row, length in enumerate(lengths):
        body = rng.integers(8, 25, length - 2)
        if labels[row]:
            body[rng.integers(len(body))] = 7
        ids[row, :length] = [2, *body, 3]
    mask = np.arange(width) < lengths[:, None]
    return Tokens({"token_ids": ids, "padding_mask": mask}, lengths, labels.astype("int32"))


def model(width=16):
    ids = keras.Input((None,), dtype="int32", name="token_ids")
    mask = keras.Input((None,), dtype="bool", name="padding_mask")
    embedded = keras.layers.Embedding(32, 16)(ids)
    kept = embedded * keras.ops.expand_dims(keras.ops.cast(mask, "float32"), -1)
    hidden = keras.layers.Dropout(0.1)(keras.layers.Dense(16, activation="relu")(keras.ops.max(kept, axis=1)))
    return keras.Model({"token_ids": ids, "padding_mask": mask}, keras.layers.Dense(2)(hidden))


def compiled(seed=1, steps=30):
    keras.utils.set_random_seed(seed)
    made = model()
    made.compile(
        optimizer=optimizer.adamw(0.01, steps, 0.1, 0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return made


def judged(scores=(0.5,)) -> training.Score:
    """Scores one after the other, the last of them for ever."""
    left = list(scores)
    return training.Score("dev_accuracy", lambda: left.pop(0) if len(left) > 1 else left[0], str)


def fit(made, state, epochs=4, callbacks=(), data=None):
    score = training.dev_accuracy(made, tokens(30, seed=9))
    return training.fit(
        made, made, data or tokens(64), score, epochs=epochs, batch_size=8, seed=3, state=state,
        console=Console(quiet=True), title="t", callbacks=callbacks,
    )  # fmt: skip


def test_every_example_comes_once_an_epoch_in_batches_of_like_length():
    data = tokens(203)
    batches = Batches(data, 8, seed=1, shuffle=True)
    orders = []
    for epoch in (0, 1):
        batches.epoch = epoch
        rows = np.concatenate(list(batches.rows()))
        assert sorted(rows) == list(range(203))
        orders.append(list(rows))
        spread = [np.ptp(data.lengths[batch]) for batch in batches.rows()]
        assert np.mean(spread) < 2  # shuffled blindly it is about 10
    assert orders[0] != orders[1]
    batches.epoch = 0
    assert list(np.concatenate(list(batches.rows()))) == orders[0]
    assert len(batches) == 26 == len(list(batches))


def test_batches_are_trimmed_to_their_longest_row_and_keep_every_token():
    data = tokens(50)
    seen = 0
    for features, labels in Batches(data, 4, shuffle=True):
        length = features["token_ids"].shape[1]
        assert length in (8, 16) and len(labels) <= 4
        seen += int(features["padding_mask"].sum())
        assert (features["token_ids"][features["padding_mask"]] != 0).all()
    assert seen == data.lengths.sum()


def test_extra_features_follow_their_examples():
    data = tokens(20)
    data = Tokens(data.features, data.lengths, data.labels, {"teacher_logits": np.arange(40.0).reshape(20, 2)})
    for features, labels in Batches(data, 3, shuffle=True).dataset():
        rows = features["teacher_logits"].numpy()[:, 0] / 2
        np.testing.assert_array_equal(labels.numpy(), data.labels[rows.astype(int)])


def test_logits_come_back_in_the_order_of_the_examples():
    data, made = tokens(23), compiled()
    expected = made.predict(data.features, verbose=0)
    np.testing.assert_allclose(training.predict_logits(made, data, batch_size=4), expected, atol=1e-5)
    share = (expected.argmax(-1) == data.labels).mean()
    assert training.accuracy(made, data) == pytest.approx(share)


def test_augmentation_leaves_special_tokens_padding_and_half_of_the_sentences_alone():
    data = tokens(400)
    change = batches.random_words(0.3, special=[2, 3], mask_id=4)
    new = change((dict(data.features), data.labels), np.random.default_rng(0))[0]["token_ids"]
    old, mask = data.features["token_ids"], data.features["padding_mask"]
    assert new.dtype == old.dtype
    changed = new != old
    assert not changed[~mask].any() and not changed[np.isin(old, (2, 3))].any()
    assert 0.4 < (~changed.any(axis=1)).mean() < 0.65
    assert 0.10 < changed[mask & ~np.isin(old, (2, 3))].mean() < 0.16  # half of 0.3, less a few equal draws
    assert 0.3 < (new[changed] == 4).mean() < 0.7
    assert set(np.unique(new)) <= set(np.unique(old)) | {4}


def test_the_rate_rises_then_falls_to_zero():
    rate = optimizer.adamw(0.1, 100, 0.2, 0.0)._learning_rate
    rates = [float(rate(step)) for step in (0, 10, 20, 60, 100)]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.05, 0.0], abs=1e-6)


def test_the_compiled_update_is_that_of_keras():
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape).astype("float32") for shape in ((7, 3), (5,), (4, 3))]
    grads = [[rng.normal(size=value.shape).astype("float32") for value in values] for _ in range(3)]
    left, right = ([keras.Variable(v, name=n) for v, n in zip(values, ("kernel", "bias", "table"))] for _ in range(2))
    assert type(optimizer.adamw(0.1, 10, 0.2, 0.1)) is keras.optimizers.AdamW
    ours = optimizer.adamw(0.1, optimizer.COMPILED_FROM, 0.01, 0.1)
    assert type(ours) is optimizer.CompiledAdamW
    keras_own = keras.optimizers.AdamW.from_config(ours.get_config())
    keras_own.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    compiled = tf.function(lambda grads: ours.apply(grads, left))  # as in a training step
    rows = tf.constant([1, 1, 3])  # an embedding's gradient: only some rows, one of them twice
    for step in grads:
        few = tf.IndexedSlices(tf.constant(step[2][:3]), rows, tf.constant([4, 3]))
        compiled([*map(tf.constant, step[:2]), few])
        keras_own.apply([*map(tf.constant, step[:2]), tf.convert_to_tensor(few)], right)
    assert int(ours.iterations) == 3
    for a, b, before in zip(left, right, values):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert np.abs(a - before).max() > 0.01
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(ours))
    assert type(again) is type(ours) and again.clipnorm is None and again.global_clipnorm == 1.0


class _Stop(keras.callbacks.Callback):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch, self.now = epoch, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.now == self.epoch and batch == 3:
            raise KeyboardInterrupt


@pytest.mark.thorough
def test_an_interrupted_training_ends_as_if_it_had_not_been(tmp_path):
    whole = compiled(steps=32)
    expected = fit(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(compiled(steps=32), tmp_path / "cut", callbacks=[_Stop(2)])
    assert len(json.loads((tmp_path / "cut" / "meta.json").read_text())["history"]) == 2  # at most one epoch is lost
    resumed = compiled(seed=99, steps=32)  # other first weights and dropout seeds: all must come from the state
    found = fit(resumed, tmp_path / "cut")
    assert [entry["dev_accuracy"] for entry in found["history"]] == [
        entry["dev_accuracy"] for entry in expected["history"]
    ]
    for a, b in zip(whole.get_weights(), resumed.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert int(resumed.optimizer.iterations) == 32


def test_a_finished_training_is_not_repeated(tmp_path):
    first = compiled(steps=16)
    told = fit(first, tmp_path / "s", epochs=2)
    again = compiled(seed=5, steps=16)
    assert fit(again, tmp_path / "s", epochs=2) == told
    for a, b in zip(first.get_weights(), again.get_weights()):
        np.testing.assert_array_equal(a, b)


def test_the_best_epoch_is_kept_and_early_epochs_can_be_barred(tmp_path):
    made = model()
    made.compile(optimizer="adam", loss="mse")
    keeper = EpochState(tmp_path / "s", made, judged(), best_from=1)
    keeper.set_model(made)
    for epoch, score in enumerate((0.99, 0.7, 0.9, 0.8)):
        made.layers[-1].bias.assign([epoch, epoch])
        keeper.record(epoch, {"dev_accuracy": score})
    keeper.keep_best()
    assert keeper.best == (0.9, 3)
    np.testing.assert_array_equal(made.layers[-1].bias, [2, 2])


def test_the_smallest_score_can_be_the_best(tmp_path):
    made = model()
    made.compile(optimizer="adam", loss="mse")
    keeper = EpochState(tmp_path / "s", made, training.Score("dev_perplexity", float, str, larger_is_better=False))
    keeper.set_model(made)
    for epoch, score in enumerate((9.0, 7.0, 8.0)):
        keeper.record(epoch, {"dev_perplexity": score})
    assert keeper.best == (7.0, 2)


def test_the_mean_of_the_last_epochs_is_kept_only_where_it_is_no_worse(tmp_path):
    made = model()
    made.compile(optimizer="adam", loss="mse")
    made.optimizer.build(made.trainable_variables)
    keeper = EpochState(tmp_path / "s", made, judged((0.95, 0.85)), average=2)
    keeper.set_model(made)
    bias = made.layers[-1].bias
    for epoch, score in enumerate((0.5, 0.9, 0.8)):
        bias.assign([epoch, 3 * epoch])
        keeper.record(epoch, {"dev_accuracy": score})
    resumed = EpochState(tmp_path / "s", made, judged((0.95, 0.85)), average=2)
    resumed.set_model(made)
    resumed.on_train_begin()
    for state in (keeper, resumed):
        assert state.keep_average() == 0.95
        np.testing.assert_allclose(bias, [1.5, 4.5])  # of epochs 1 and 2, not 0
        assert state.keep_average() is None
        np.testing.assert_allclose(bias, [1, 3])  # the best epoch


def test_a_full_disk_keeps_the_last_whole_state(tmp_path, monkeypatch):
    made = compiled()
    keeper = EpochState(tmp_path / "s", made, judged())
    keeper.set_model(made)
    keeper.record(0, {"dev_accuracy": 0.5})
    monkeypatch.setattr(training, "_save", _full_disk)
    from tfvllm.errors import TfvllmError

    with pytest.raises(TfvllmError, match="No space left on device"):
        keeper.record(1, {"dev_accuracy": 0.6})
    assert len(json.loads((tmp_path / "s" / "meta.json").read_text())["history"]) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def _full_disk(path, variables):
    raise OSError(28, "No space left on device")

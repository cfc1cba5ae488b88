"""The student writes a share of the batches, and is compared with its teacher on them."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.distillation.pairs import causal_lm, lm_batch, seq2seq, seq2seq_batch
from tests.generation import small_tokenizers
from tests.generation.models import build, gpt2
from tfvllm.distillation import OnPolicy
from tfvllm.errors import InputError
from tfvllm.rollouts import Rollouts

losses = tfvllm.losses


def sevens(features, seed):
    """In place of a student: writes 7, 8, 9, and so on, but only 7 in the last row."""
    (mask,) = [np.asarray(v, bool) for name, v in features.items() if name in ("padding_mask", "decoder_padding_mask")]
    (ids,) = [v for name, v in features.items() if name in ("token_ids", "decoder_token_ids")]
    lengths, places = mask.sum(1)[:, None], np.arange(mask.shape[1])
    known = np.where(np.arange(len(ids))[:, None] == len(ids) - 1, places <= lengths, True)
    return np.where(mask, ids, np.where(known, 7 + places - lengths, 0)), known


class Recorder:
    """`write`, remembering what it wrote."""

    def __init__(self, write):
        self.write, self.model, self.written = write, write.model, []

    def __call__(self, features, seed):
        self.written.append(self.write(features, seed))
        return self.written[-1]


def rows():
    ids = np.array([[1, 2, 3, 4, 5], [1, 2, 3, 0, 0], [1, 2, 0, 0, 0]], "int32")
    mask = (ids > 0).astype("int32")
    y = np.array([[2, 3, 4, 5, 6], [2, 3, 0, 0, 0], [2, 0, 0, 0, 0]], "int32")
    weight = np.array([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], "int32")
    return {"token_ids": ids, "padding_mask": mask}, y, weight


def test_what_is_given_stays_and_what_is_written_counts():
    x, y, weight = rows()
    new, labels, weights = OnPolicy(sevens, 1.0, prompt=3).change(x, y, weight, (0, 0))
    expected = [[1, 2, 3, 7, 8], [1, 2, 3, 7, 8], [1, 2, 7, 0, 0]]  # of the last row two tokens are all there is
    np.testing.assert_array_equal(new["token_ids"], expected)
    np.testing.assert_array_equal(new["padding_mask"], np.array(expected) > 0)
    np.testing.assert_array_equal(labels, [[2, 3, 7, 8, 0], [2, 3, 7, 8, 0], [2, 7, 0, 0, 0]])
    np.testing.assert_array_equal(weights["divergence"], [[0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(weights["task"], np.zeros([3, 5]))
    assert {part.dtype for part in new.values()} == {np.dtype("int32")}

    # The first label that counts tells the prompt of each row; without weights only the first token is given.
    new, _, _ = OnPolicy(sevens, 1.0).change(x, y, weight, (0, 0))
    np.testing.assert_array_equal(new["token_ids"], [[1, 2, 7, 8, 9], [1, 7, 8, 9, 10], [1, 7, 0, 0, 0]])
    new, _, _ = OnPolicy(sevens, 1.0).change(x, y, None, (0, 0))
    np.testing.assert_array_equal(new["token_ids"], [[1, 7, 8, 9, 10], [1, 7, 8, 9, 10], [1, 7, 0, 0, 0]])
    new, _, _ = OnPolicy(sevens, 1.0, prompt=lambda x, y, w: [4, 2, 9]).change(x, y, weight, (0, 0))
    np.testing.assert_array_equal(new["token_ids"], [[1, 2, 3, 4, 7], [1, 2, 7, 8, 9], [1, 2, 7, 0, 0]])


def test_other_batches_stay_as_they_are():
    x, y, weight = rows()
    new, labels, weights = OnPolicy(sevens, 0.0, prompt=1).change(x, y, weight, (0, 0))
    for part, own in ((new["token_ids"], x["token_ids"]), (labels, y), *((weights[part], weight) for part in weights)):
        np.testing.assert_array_equal(part, own)
    _, labels, weights = OnPolicy(sevens, 0.0).change(x, None, None, (0, 0))  # without labels: no task
    np.testing.assert_array_equal(labels[0], [2, 3, 4, 5, 0])
    assert weights["task"].sum() == 0
    np.testing.assert_array_equal(weights["divergence"], x["padding_mask"])
    _, _, weights = OnPolicy(sevens, 0.0).change(x, y, np.array([1.0, 0.5, 2.0]), (0, 0))
    np.testing.assert_array_equal(weights["task"][:, 0], [1.0, 0.5, 2.0])


def test_the_place_tells_what_is_drawn():
    x, y, weight = rows()

    def drawn(seed, share=0.25):
        seeds = []
        policy = OnPolicy(lambda f, s: (seeds.append(s), sevens(f, s))[1], share, seed=seed)
        return [policy.change(x, y, weight, (e, s))[2]["task"].sum() == 0 for e in (0, 1) for s in range(200)], seeds

    first, seeds = drawn(1)
    assert 70 < sum(first) < 130 and len(set(seeds)) == len(seeds) == sum(first)
    assert (first, seeds) == drawn(1) and first != drawn(2)[0] and first[:200] != first[200:]
    assert all(drawn(1, 1.0)[0]) and not any(drawn(1, 0.0)[0])


def test_of_two_stacks_the_decoder_writes():
    x, y, weight = seq2seq_batch()
    new, _, weights = OnPolicy(sevens, 1.0, prompt=2).change(x, y, weight, (0,))
    for name in ("encoder_token_ids", "encoder_padding_mask"):
        np.testing.assert_array_equal(new[name], x[name])
    np.testing.assert_array_equal(new["decoder_token_ids"][0], [*x["decoder_token_ids"][0, :2], 7, 8, 9, 10])
    np.testing.assert_array_equal(weights["divergence"][0], [0, 1, 1, 1, 1, 0])


def test_on_policy_tells_what_is_wrong():
    teacher, student = causal_lm(1), causal_lm(1)
    x, y, weight = lm_batch()
    for options, message in (
        ({"share": 1.5}, "between 0 and 1"),
        ({"prompt": 0}, "at least 1 token"),
        ({"write": None}, "write must be a function"),
    ):
        with pytest.raises(InputError, match=message):
            OnPolicy(**{"write": sevens, **options})
    with pytest.raises(InputError, match="padded on the right"):
        OnPolicy(sevens, 1.0).change({k: v[:, ::-1] for k, v in x.items()}, y, weight, (0,))
    with pytest.raises(InputError, match="expected token_ids and padding_mask"):
        OnPolicy(sevens, 1.0).change(x["token_ids"], y, weight, (0,))
    data = tf.data.Dataset.from_tensors((x, y, weight))
    distiller = tfvllm.Distiller(teacher, student)
    with pytest.raises(InputError, match="compile it first"):
        OnPolicy(sevens).dataset(data, distiller)
    distiller.compile("adam", steps_per_execution=2)
    with pytest.raises(InputError, match="the Distiller trains"):
        OnPolicy(Rollouts(teacher)).dataset(data, distiller)
    with pytest.raises(InputError, match="leaves nothing to write in rows of 8"):
        OnPolicy(sevens, prompt=8).dataset(data, distiller)
    with pytest.raises(InputError, match="Batch the rows first"):
        OnPolicy(sevens).dataset(data.unbatch(), distiller)
    with pytest.raises(tf.errors.OpError, match="steps_per_execution is 2"):
        next(iter(OnPolicy(sevens).dataset(data, distiller)))
    with pytest.raises(InputError, match="vocabulary has 40 entries and the student's 30"):
        tfvllm.Distiller(teacher, causal_lm(1, vocabulary=30))


def fitted(student, write, data, *, share=1.0, start=None, optimizer=None, seed=4, loss="auto", **options):
    """A Distiller after `fit`, and its history."""
    if start is not None:
        student.set_weights(start)
    distiller = tfvllm.Distiller(causal_lm(2), student, losses={"logits": losses.ReverseKL()}, task_weight=0.5)
    distiller.compile(optimizer or keras.optimizers.AdamW(0.01), loss=loss, weighted_metrics=["accuracy"])
    policy = OnPolicy(write, share, prompt=2, seed=seed)
    return policy, distiller.fit(policy.dataset(data, distiller), verbose=0, **options).history


def test_the_task_does_not_see_what_the_student_wrote():
    student = causal_lm(1)
    student.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y, weight = lm_batch(6)
    data = tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(3)
    policy, found = fitted(student, sevens, data, share=0.5, seed=1, optimizer=keras.optimizers.SGD(0.0))
    # Of the two batches the second is written. Both parts by hand, as means over batches:
    changed = [policy.change(*batch, at=(i, 0)) for i, batch in enumerate(data.as_numpy_iterator())]
    of_task = [weights["task"].sum() > 0 for *_, weights in changed]
    assert sorted(of_task) == [False, True]
    task, divergence, total = [], [], []
    for (features, labels, weights), seen in zip(changed, of_task):
        logits = student(features), causal_lm(2)(features)
        real = features["padding_mask"].sum()
        divergence.append(np.sum(losses.ReverseKL()(logits[1], logits[0]) * weights["divergence"]) / real)
        own = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, logits[0], weights["task"])
        task += [float(own)] if seen else []
        total.append(divergence[-1] + (0.5 * float(own) if seen else 0.0))
    np.testing.assert_allclose(found["task_loss"], task, rtol=1e-4)
    np.testing.assert_allclose(found["logits_loss"], [np.mean(divergence)], rtol=1e-4)
    np.testing.assert_allclose(found["loss"], [np.mean(total)], rtol=1e-4)
    ((features, labels, weights),) = [batch for batch, seen in zip(changed, of_task) if seen]
    right = (np.argmax(student(features), -1) == labels) * weights["task"]
    np.testing.assert_allclose(found["accuracy"], [right.sum() / weights["task"].sum()], rtol=1e-4)


def test_parts_of_the_weights_are_named():
    distiller = tfvllm.Distiller(causal_lm(1), causal_lm(1))
    distiller.compile("adam")
    x, y, weight = lm_batch()
    with pytest.raises(InputError, match="expected one tensor, or 'task' and 'divergence'"):
        distiller.fit(tf.data.Dataset.from_tensors((x, y, {"labels": weight})), verbose=0)


@pytest.mark.thorough
def test_each_step_sees_the_weights_that_the_last_one_left(tmp_path):
    """And the very rollouts come again after a resume."""
    student = causal_lm(1)
    start = student.get_weights()
    data = tf.data.Dataset.from_tensor_slices(lm_batch(9, 12)).batch(3)
    write = Recorder(Rollouts(student))
    after = []
    keep = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: after.append(student.get_weights()))
    fitted(student, write, data, epochs=3, callbacks=[keep])
    written, write.written = write.written[-9:], []  # Keras may look at a batch before it begins
    assert write.write._run.experimental_get_tracing_count() == 1

    # What was written at step 4 is what the weights after step 3 write.
    student.set_weights(after[3])
    policy = OnPolicy(write, 1.0, prompt=2, seed=4)
    (batch,) = data.skip(1).take(1).as_numpy_iterator()
    again = policy.change(*batch, at=(4, 0))[0]["token_ids"]
    np.testing.assert_array_equal(again, written[4][0])
    student.set_weights(start)
    assert (policy.change(*batch, at=(4, 0))[0]["token_ids"] != again).any()

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "b", delete_checkpoint=False)

    write.written = []
    fitted(student, write, data, start=start, epochs=1, callbacks=[backup()])
    first, write.written = write.written[-3:], []
    fitted(student, write, data, start=start, epochs=3, callbacks=[backup()])
    rest = write.written[-6:]
    for (one, _), (two, _) in zip(written, [*first, *rest], strict=True):
        np.testing.assert_array_equal(one, two)
    assert (written[0][0] != written[3][0]).any()  # other epochs, other texts


@pytest.mark.slow
def test_raw_strings_beside_the_usual_callbacks(tmp_path):
    """A share of 0 is plain `fit`; with 1 each row ends as the student ends it."""
    options = small_tokenizers.text_options("gpt2", 12)
    teacher, student = build(gpt2, **options), build(gpt2, seed=2, layers=1, **options)
    for layer in student._flatten_layers():
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    start = student.get_weights()
    texts = tf.data.Dataset.from_tensor_slices(["the fox", "a lazy dog is quick", "", "quick"] * 2).batch(4)
    found = {}
    for share in (None, 0.0, 1.0):
        student.set_weights(start)
        distiller = tfvllm.Distiller(teacher, student, losses={"logits": losses.JensenShannon()})
        distiller.compile(keras.optimizers.SGD(0.1), loss="sparse_categorical_crossentropy")
        write = Recorder(Rollouts(student))
        data = texts if share is None else OnPolicy(write, share, prompt=3).dataset(texts, distiller)
        kept = tmp_path / f"{share}.weights.h5"
        callbacks = [
            keras.callbacks.EarlyStopping("val_loss", patience=3),
            keras.callbacks.ModelCheckpoint(kept, monitor="val_loss", save_weights_only=True, save_best_only=True),
        ]
        found[share] = distiller.fit(data, validation_data=texts, epochs=2, verbose=0, callbacks=callbacks).history
        assert kept.exists() and len(write.written) in ((4, 5) if share == 1.0 else (0,))
    for name, values in found[None].items():
        np.testing.assert_allclose(found[0.0][name], values, rtol=1e-4)
    assert found[1.0]["task_loss"] == [0.0] * 2 and found[1.0]["val_task_loss"][0] > 0.0


def own_divergence(teacher, student, x, seed=99):
    """Reverse KL on what the student writes, in nats for each token."""
    rows, _, weights = OnPolicy(Rollouts(student), 1.0, prompt=2, seed=seed).change(x, None, None, (0,))
    values = losses.ReverseKL()(teacher(rows), student(rows)).numpy()
    return float((values * weights["divergence"]).sum() / weights["divergence"].sum())


@pytest.mark.thorough
@pytest.mark.parametrize("loss", [losses.ReverseKL(), losses.JensenShannon(beta=0.5)], ids=["reverse", "jensen"])
def test_a_student_learns_from_what_it_writes(loss):
    teacher, student = causal_lm(2), causal_lm(1)
    x, y, weight = lm_batch(32, 12)
    before = own_divergence(teacher, student, x)
    distiller = tfvllm.Distiller(teacher, student, losses={"logits": loss}, task_weight=0.0)
    distiller.compile(keras.optimizers.Adam(0.01))
    data = tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(16)
    policy = OnPolicy(Rollouts(student), 1.0, prompt=2)
    distiller.fit(policy.dataset(data, distiller), epochs=30, verbose=0)
    assert own_divergence(teacher, student, x) < 0.5 * before


@pytest.mark.slow
def test_a_translator_writes_its_own_translations():
    teacher, student = seq2seq(2), seq2seq(1)
    data = tf.data.Dataset.from_tensor_slices(seq2seq_batch(8)).batch(4)
    distiller = tfvllm.Distiller(teacher, student, losses={"logits": losses.JensenShannon()})
    distiller.compile("adam", loss="sparse_categorical_crossentropy")
    write = Recorder(Rollouts(student))
    history = distiller.fit(OnPolicy(write, 1.0).dataset(data, distiller), epochs=3, verbose=0).history
    assert history["logits_loss"][-1] < history["logits_loss"][0] and history["task_loss"] == [0.0] * 3
    assert (write.written[-1][0] != write.written[-2][0]).any()

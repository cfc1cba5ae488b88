"""Comparing, iterating, and targets that the teacher writes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.distillation.pairs import WORDS, batch, causal_lm, classifier, lm_batch
from tfvllm.distillation import compare, iterate, read_targets, rounds, student_from, write_targets
from tfvllm.errors import InputError

losses = tfvllm.losses
TEXTS = ["the film was good", "a very bad film", "", "很好", "not dull", "a bright film", "the bad", "very very good"]


@pytest.mark.thorough
def test_compare_by_hand(pair):
    teacher, student = pair
    x, y = batch(7)
    found = compare(teacher, student, x, y, batch_size=3, worst=2)
    of_teacher, of_student = teacher(x), student(x)
    divergences = losses.ForwardKL()(of_teacher, of_student).numpy()
    chosen = [np.argmax(part, -1) for part in (of_teacher, of_student)]
    np.testing.assert_allclose(found.divergences, divergences, rtol=1e-4, atol=1e-6)
    assert found.divergence == pytest.approx(divergences.mean(), rel=1e-4)
    assert found.agreement == pytest.approx((chosen[0] == chosen[1]).mean())
    assert found.teacher_accuracy == pytest.approx((chosen[0] == y).mean())
    assert found.student_accuracy == pytest.approx((chosen[1] == y).mean())
    assert [d.index for d in found.worst] == list(np.argsort(-divergences)[:2])
    assert found.worst[0].label == y[found.worst[0].index] and found.worst[0].text is None
    assert json.loads(json.dumps(found.to_dict()))["worst"][0]["divergence"] == pytest.approx(
        divergences.max(), rel=1e-4
    )


def test_compare_counts_real_positions_only():
    teacher, student = causal_lm(2), causal_lm(1)
    x, *_ = lm_batch()
    found = compare(teacher, student, x)
    values = losses.ForwardKL()(teacher(x), student(x)).numpy()
    real = x["padding_mask"] == 1
    assert found.divergence == pytest.approx(values[real].mean(), rel=1e-4)
    assert found.agreement == pytest.approx((np.argmax(teacher(x), -1) == np.argmax(student(x), -1))[real].mean())


@pytest.mark.slow
def test_rounds_stop_when_they_stop_paying_and_keep_the_best(duo, tmp_path):
    teacher, student = duo
    distiller = tfvllm.Distiller(teacher, student, losses={"logits": losses.ForwardKL()}, task_weight=0.0)
    distiller.compile(keras.optimizers.Adam(0.02))
    y = np.arange(8) % 3
    done = iterate(
        distiller,
        (TEXTS, y),
        (TEXTS, y),
        rounds=3,
        epochs=2,
        batch_size=4,
        worst=3,
        report=tmp_path / "r.json",
        verbose=0,
    )
    divergences = [r.dev.divergence for r in done.rounds]
    assert done.rounds[0].number == 0 and divergences[done.best] == min(divergences) < divergences[0]
    assert compare(teacher, student, TEXTS).divergence == pytest.approx(min(divergences), rel=1e-4, abs=1e-7)
    assert {d.text for d in done.rounds[-1].dev.worst} <= set(TEXTS)
    assert json.loads((tmp_path / "r.json").read_text())["stopped"] == done.stopped != ""

    before = student.get_weights()
    distiller.compile(keras.optimizers.SGD(0.0))  # nothing is learned: it stops after `patience` rounds
    done = iterate(distiller, (TEXTS, y), (TEXTS, y), rounds=5, patience=1, verbose=0)
    assert len(done.rounds) == 2 and "lowered the divergence by less" in done.stopped
    for one, two in zip(before, student.get_weights()):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_interrupted_rounds_go_on(duo, tmp_path):
    """Interrupted in round 2 and called again: the very rounds of an uninterrupted run (no shuffling, no dropout)."""
    teacher, student = duo
    start = student.get_weights()
    y = np.arange(8) % 3
    options = {"rounds": 3, "batch_size": 8, "patience": 3, "worst": 2, "verbose": 0}

    class Interrupt(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            raise KeyboardInterrupt

    def fresh():
        student.set_weights(start)
        distiller = tfvllm.Distiller(teacher, student, losses={"logits": losses.ForwardKL()}, task_weight=0.0)
        distiller.compile(keras.optimizers.Adam(0.01))
        return distiller

    whole = iterate(fresh(), (TEXTS, y), (TEXTS, y), **options)
    expected = student.get_weights()

    iterate(fresh(), (TEXTS, y), (TEXTS, y), backup=tmp_path / "b", **{**options, "rounds": 1})
    state = np.load(tmp_path / "b" / "rounds.npz")
    with pytest.raises(KeyboardInterrupt):
        iterate(fresh(), (TEXTS, y), (TEXTS, y), backup=tmp_path / "b", callbacks=[Interrupt()], **options)
    assert state["told"].tobytes() == np.load(tmp_path / "b" / "rounds.npz")["told"].tobytes()
    found = iterate(fresh(), (TEXTS, y), (TEXTS, y), backup=tmp_path / "b", **options)
    assert [r.number for r in found.rounds] == [r.number for r in whole.rounds] == [0, 1, 2, 3]
    np.testing.assert_allclose(
        [r.dev.divergence for r in found.rounds], [r.dev.divergence for r in whole.rounds], rtol=1e-3
    )
    assert found.best == whole.best and found.stopped == whole.stopped
    for one, two in zip(expected, student.get_weights()):
        np.testing.assert_allclose(one, two, atol=1e-4)
    again = iterate(fresh(), (TEXTS, y), (TEXTS, y), backup=tmp_path / "b", **options)  # done before: nothing is run
    assert again.to_dict() == found.to_dict()
    with pytest.raises(InputError, match="same settings"):
        iterate(fresh(), (TEXTS, y), (TEXTS, y), backup=tmp_path / "b", **{**options, "batch_size": 4})


@pytest.mark.thorough
def test_rounds_over_rows_of_a_language_model():
    """(x, y, sample_weight) of a causal LM: positions of weight 0 teach nothing."""
    rows = lm_batch(8)
    for weight, learns in ((0 * rows[2], False), (rows[2], True)):
        distiller = tfvllm.Distiller(causal_lm(1), causal_lm(1, heads=4), losses={"logits": losses.ForwardKL()})
        distiller.compile(keras.optimizers.SGD(0.1), loss="sparse_categorical_crossentropy")
        before = distiller.student.get_weights()
        done = iterate(distiller, (*rows[:2], weight), (*rows[:2], weight), rounds=2, batch_size=4, verbose=0)
        assert len(done.rounds) == (3 if learns else 2) and len(done.rounds[0].dev.divergences) == 8
        changed = [not np.array_equal(*pair) for pair in zip(before, distiller.student.get_weights())]
        assert any(changed) is learns


def test_hard_examples_are_drawn_more_often():
    divergences = np.array([0.0, 1.0, 3.0], "float32")
    np.testing.assert_allclose(rounds._chances(divergences, 0.0), [1 / 3] * 3)
    np.testing.assert_allclose(rounds._chances(divergences, 1.0), [0.0, 0.25, 0.75])
    np.testing.assert_allclose(rounds._chances(divergences, 0.5), [1 / 6, 1 / 6 + 1 / 8, 1 / 6 + 3 / 8])
    np.testing.assert_allclose(rounds._chances(np.zeros(4), 0.5), [0.25] * 4)


def test_iterate_refuses_what_it_cannot_draw_from(pair):
    distiller = tfvllm.Distiller([pair[0], pair[0]], pair[1])
    x, y = batch()
    with pytest.raises(InputError, match="one teacher"):
        iterate(distiller, (x, y), (x, y))
    with pytest.raises(InputError, match="found a dataset"):
        iterate(tfvllm.Distiller(*pair), (tf.data.Dataset.from_tensors(x),), (x, y))


# ---------------------------------------------------------------- students from teachers


def test_student_from_copies_what_it_keeps(pair):
    teacher, _ = pair
    student = student_from(teacher, layers=2)
    assert type(student) is type(teacher) and student.backbone.num_layers == 2
    for index, origin in enumerate((1, 3)):
        for a, b in zip(
            student.backbone.transformer_layers[index].get_weights(),
            teacher.backbone.transformer_layers[origin].get_weights(),
        ):
            np.testing.assert_array_equal(a, b)
    assert not {id(v) for v in student.variables} & {id(v) for v in teacher.variables}
    np.testing.assert_array_equal(student.output_dense.kernel, teacher.output_dense.kernel)
    np.testing.assert_array_equal(student.predict(TEXTS, verbose=0).shape, (8, 3))


@pytest.mark.thorough
def test_a_student_with_all_layers_is_the_teacher(pair):
    teacher, _ = pair
    x, _ = batch()
    np.testing.assert_allclose(student_from(teacher, layers=4)(x), teacher(x), atol=1e-6)
    np.testing.assert_allclose(student_from(teacher, layers=[0, 1, -2, -1])(x), teacher(x), atol=1e-6)
    lm, (x, *_) = causal_lm(3), lm_batch()
    np.testing.assert_allclose(student_from(lm, layers=3)(x), lm(x), atol=1e-6)
    backbone = student_from(teacher.backbone, layers=1)
    assert backbone.num_layers == 1 and type(backbone) is type(teacher.backbone)


def test_a_frozen_teacher_has_students_that_learn(duo):
    teacher, _ = duo
    teacher.trainable = False
    student = student_from(teacher, 1)
    assert len(student.trainable_variables) == len([v for v in student.variables if "seed" not in v.path]) > 10
    assert not teacher.trainable_variables


def test_student_from_tells_what_is_wrong(pair):
    with pytest.raises(InputError, match="cannot choose 5 of 4"):
        student_from(pair[0], layers=5)
    with pytest.raises(InputError, match="no layer 4; valid are 0 to 3"):
        student_from(pair[0], layers=[4])
    with pytest.raises(InputError, match="no adapter for Sequential"):
        student_from(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]))


@pytest.mark.parametrize(
    "layers, teacher, student, pairs",
    [
        ("uniform", 6, 3, [(1, 0), (3, 1), (5, 2)]),
        ("uniform", 12, 5, [(2, 0), (4, 1), (7, 2), (9, 3), (11, 4)]),
        ("uniform", 3, 3, [(0, 0), (1, 1), (2, 2)]),
        ("last", 6, 2, [(4, 0), (5, 1)]),
        ("skip", 12, 6, [(1, 0), (3, 1), (5, 2), (7, 3), (9, 4)]),  # PKD's own example: 2, 4, 6, 8, 10, from 1
        ([(-1, -1), (0, 0)], 6, 2, [(5, 1), (0, 0)]),
    ],
)
def test_layer_pairs(layers, teacher, student, pairs):
    assert tfvllm.distillation.layer_pairs(layers, teacher, student) == pairs


# ---------------------------------------------------------------- sequence-level targets


def speller():
    import keras_nlp

    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, **{c: i for i, c in enumerate("abcdefghĠ", 3)}, "ab": 12, "cd": 13}
    tokenizer = keras_nlp.models.BartTokenizer(vocabulary=vocabulary, merges=["a b", "c d"])
    preprocessor = keras_nlp.models.BartSeq2SeqLMPreprocessor(
        tokenizer, encoder_sequence_length=8, decoder_sequence_length=8
    )
    backbone = keras_nlp.models.BartBackbone(
        vocabulary_size=14,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        dropout=0.0,
        max_sequence_length=16,
    )
    model = keras_nlp.models.BartSeq2SeqLM(backbone, preprocessor)
    rng = np.random.default_rng(3)
    for variable in model.trainable_variables:
        if "kernel" in variable.path or "embedding" in variable.path:
            variable.assign(rng.normal(0, 0.6, variable.shape))
    return model


@pytest.mark.slow
def test_targets_are_what_the_teacher_writes(tmp_path):
    teacher = speller()
    texts = ["ab cd", "a", "", "hh gg ff", "cdab"]
    sampler = teacher.sampler
    path = write_targets(teacher, texts, tmp_path / "targets.jsonl", batch_size=2, max_length=6)
    assert teacher.sampler is sampler
    teacher.compile(sampler="greedy")
    expected = teacher.generate(texts, max_length=6)
    rows = list(read_targets(path).as_numpy_iterator())
    assert [row["encoder_text"].decode() for row in rows] == texts
    assert [row["decoder_text"].decode() for row in rows] == expected
    student = student_from(teacher, 1)
    distiller = tfvllm.Distiller(teacher, student, losses={"logits": losses.ForwardKL()})
    distiller.compile(keras.optimizers.SGD(0.0))
    logs = distiller.fit(read_targets(path).batch(2), verbose=0).history
    assert logs["task_loss"][0] > 0 and logs["logits_loss"][0] < 1e-5


def test_targets_that_were_cut_off_anywhere_go_on(tmp_path):
    """As after kill -9: the settings cut off, a batch half written, a line that ends amid a character."""
    teacher, asked = speller(), []
    texts = [f"text {i} 很" for i in range(5)]

    def generate(batch):
        asked.append(batch)
        return [f"{len(batch)}: {text}" for text in batch]

    def write(path):
        return write_targets(teacher, texts, path, batch_size=2, generate=generate).read_bytes()

    whole = write(tmp_path / "whole.jsonl")
    lines = whole.splitlines(keepends=True)
    for cut, left in ((10, 3), (len(lines[0]), 3), (sum(map(len, lines[:2])), 3), (sum(map(len, lines[:4])) - 4, 2)):
        path = tmp_path / f"{cut}.jsonl"
        path.with_name(f"{path.name}.partial").write_bytes(whole[:cut])
        asked.clear()
        assert write(path) == whole and len(asked) == left
        assert not path.with_name(f"{path.name}.partial").exists()


@pytest.mark.slow
def test_targets_whose_process_was_killed_go_on(tmp_path):
    code = """
import os, signal, sys
from tests.distillation.test_rounds import speller
from tfvllm.distillation import write_targets

batches = []

def generate(texts):
    batches.append(texts)
    if len(batches) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return [text.upper() for text in texts]

write_targets(speller(), [f"text {i}" for i in range(9)], sys.argv[1], batch_size=2, generate=generate)
"""
    path, asked = tmp_path / "t.jsonl", []
    ended = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == -signal.SIGKILL and not path.exists()

    def generate(texts):
        asked.extend(texts)
        return [text.upper() for text in texts]

    write_targets(speller(), [f"text {i}" for i in range(9)], path, batch_size=2, generate=generate)
    assert asked == [f"text {i}" for i in range(4, 9)]
    rows = read_targets(path).as_numpy_iterator()
    assert [row["decoder_text"].decode() for row in rows] == [f"TEXT {i}" for i in range(9)]


def test_interrupted_targets_go_on(tmp_path):
    teacher, path, asked = speller(), tmp_path / "t.jsonl", []

    def answers(limit):
        def generate(batch):
            if len(asked) + len(batch) > limit:
                raise KeyboardInterrupt
            asked.extend(batch)
            return [text.upper() for text in batch]

        return generate

    texts = [f"text {i}\nline 中" for i in range(7)]
    with pytest.raises(KeyboardInterrupt):
        write_targets(teacher, texts, path, batch_size=2, generate=answers(5))
    assert not path.exists()
    assert write_targets(teacher, texts, path, batch_size=2, generate=answers(99)) == path
    assert asked == texts  # none twice
    assert [r["decoder_text"].decode() for r in read_targets(path).as_numpy_iterator()] == [t.upper() for t in texts]
    assert write_targets(teacher, texts, path, generate=answers(0)) == path  # finished: nothing to do
    with pytest.raises(InputError, match="beams was 1, now 4"):
        write_targets(teacher, texts, path, beams=4)
    with pytest.raises(InputError, match="text 0 was"):
        write_targets(teacher, ["other", *texts[1:]], path)
    with pytest.raises(InputError, match="found BertTextClassifier"):
        write_targets(classifier(1, words=WORDS, preprocessor=False), texts, tmp_path / "u.jsonl")

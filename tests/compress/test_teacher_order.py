"""A trained teacher's classes may stand in another order than the labels: given, stated beside it, or measured."""

import json
import shutil

import numpy as np
import pytest

from tests.compress.conftest import sentences
from tfvllm import data
from tfvllm.compress.recipe import parse_recipe, read_recipe
from tfvllm.compress.tasks import classifiers
from tfvllm.compress.tasks.classifiers import best_order, stated_labels
from tfvllm.errors import InputError


def three_labels(tmp_path):
    rows = [("one", "c"), ("two", "a"), ("three", "b"), ("four", "a")]
    for name in ("train", "dev"):
        data.write_tsv(tmp_path / f"{name}.tsv", rows)
    return data.load(tmp_path, names={"a": "Angry", "b": "Bored"})


def test_labels_are_renumbered(tmp_path):
    text = three_labels(tmp_path)
    assert (text.labels, text.train.labels) == (["Angry", "Bored", "c"], [2, 0, 1, 0])
    for order in (["c", "Angry", "Bored"], ["c", "a", "b"], ["C", "ANGRY", "bored"], ["C", "A", "B"]):
        found = text.in_order(order)
        assert found.labels == ["c", "Angry", "Bored"]
        assert found.train.labels == found.dev.labels == [0, 1, 2, 1]
    assert found.digest() != text.digest()
    assert found.in_order(["a", "b", "c"]).digest() == text.digest()


@pytest.mark.parametrize(
    "order", [["c", "a"], ["c", "a", "a"], ["c", "a", "x"], ["c", "a", "b", "b"], ["c", "a", "Bored"]]
)
def test_an_order_names_each_label_once(tmp_path, order):
    with pytest.raises(InputError, match=r"expected every label of the data once \(Angry, Bored, c\), found c, a"):
        three_labels(tmp_path).in_order(order)


def test_numbers_may_be_written_as_numbers():
    assert parse_recipe({"teacher": {"labels": [1, 0]}}).teacher.labels == ["1", "0"]
    with pytest.raises(InputError, match=r"teacher.labels"):
        parse_recipe({"teacher": {"labels": [1, None]}})


def test_a_swapped_binary_teacher_is_seen():
    labels = np.arange(200) % 2
    predicted = np.where(np.arange(200) < 70, labels, 1 - labels)  # 35 % right
    found = best_order(predicted, labels, 2)
    assert (found.accuracy, found.best, found.best_accuracy, found.better) == (0.35, (1, 0), 0.65, True)
    good = best_order(1 - predicted, labels, 2)
    assert (good.accuracy, good.best, good.better) == (0.65, (0, 1), False)


@pytest.mark.parametrize("classes", [4, 9])  # all orders; surest first
def test_a_rotated_teacher_is_seen(classes):
    random = np.random.default_rng(1)
    labels = random.integers(0, classes, 400)
    predicted = np.where(random.random(400) < 0.8, (labels + 1) % classes, random.integers(0, classes, 400))
    found = best_order(predicted, labels, classes)
    assert found.best == tuple((output - 1) % classes for output in range(classes))
    assert found.better and found.best_accuracy > 0.8 > 0.1 > found.accuracy


def test_chance_is_not_taken_for_another_order():
    random = np.random.default_rng(2)
    labels = random.integers(0, 2, 100)
    assert not best_order(np.zeros(100, int), labels, 2).better  # says the same to everything
    weak = np.where(np.arange(100) < 47, labels, 1 - labels)  # 47 % right: six more the other way round
    assert best_order(weak, labels, 2).best == (1, 0) and not best_order(weak, labels, 2).better


@pytest.mark.parametrize(
    ("name", "content", "labels"),
    [
        ("result.json", {"labels": ["positive", "negative"]}, ["positive", "negative"]),
        ("config.json", {"id2label": {"1": "negative", "0": "positive"}}, ["positive", "negative"]),
        ("config.json", {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None),
        ("config.json", {"id2label": {"0": "a", "2": "b"}}, None),
        ("config.json", [1], None),
        ("other.json", {"labels": ["a", "b"]}, None),
    ],
)
def test_what_stands_beside_a_model_is_read(tmp_path, name, content, labels):
    (tmp_path / name).write_text(json.dumps(content))
    assert stated_labels(tmp_path) == stated_labels(tmp_path / "model.keras") == labels


@pytest.mark.thorough
def test_a_trained_classifier_reads_as_many_tokens_as_the_data_ask(text_classifier, tmp_path):
    text_classifier.save(tmp_path / "t.keras")
    text_classifier.save_to_preset(str(tmp_path / "preset"))
    for path in (tmp_path / "t.keras", tmp_path / "preset"):
        model = classifiers.from_file(path, 2, 20)
        assert model.preprocessor(["the film is fine " * 30])["token_ids"].shape[1] == 20
        np.testing.assert_array_equal(model.layers[-1].kernel, text_classifier.layers[-1].kernel)  # its own head
    with pytest.raises(InputError, match=r"data\.max_length: expected at most 48 tokens, .* found 64"):
        classifiers.from_file(tmp_path / "t.keras", 2, 64)
    (tmp_path / "preset" / "task.json").unlink()
    with pytest.raises(InputError, match=r"teacher.model: expected .* \(task.json, .*\), found neither"):
        classifiers.from_file(tmp_path / "preset", 2, 20)


# --- the whole road ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(recipe_file, tmp_path_factory):
    """The .keras file of a teacher with outputs negative, positive, in its run's folder."""
    from tfvllm import compress

    out = tmp_path_factory.mktemp("trained") / "run"
    steps = ("student", "distill", "prune", "shrink", "export", "simplify", "benchmark")
    compress.run(read_recipe(recipe_file, overrides=[f"{step}=null" for step in steps]), out)
    return next((out / "steps").glob("teacher-*/model.keras"))


def scored(teacher, out, tmp_path, **keys):
    """The teacher's accuracy on the same sentences under labels that sort the other way round: good, terrible."""
    from tfvllm import compress

    folder = tmp_path / "data"
    if not folder.exists():
        folder.mkdir()
        for name, count, seed in (("train", 320, 1), ("dev", 60, 2)):
            rows = [(text, "good" if label else "terrible") for text, label in sentences(count, seed)]
            data.write_tsv(folder / f"{name}.tsv", rows)
    names = {"good": "positive", "terrible": "negative"}
    block = {"path": str(folder), "labels": names, "max_length": 12}
    report = compress.run(parse_recipe({"data": block, "teacher": {"model": str(teacher), **keys}}), out)
    return report["stages"][0]["dev_accuracy"], report["data"]["labels"]


@pytest.mark.thorough
def test_a_trained_teacher_is_scored_in_its_own_order(trained, tmp_path):
    moved = shutil.copy(trained, tmp_path / "teacher.keras")
    with pytest.raises(InputError, match=r"teacher.labels: \[negative, positive\]") as caught:
        scored(moved, tmp_path / "a", tmp_path)
    assert "much better as negative, positive" in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "a" / "steps").glob("teacher-*/model.keras"))
    accuracy, labels = scored(moved, tmp_path / "b", tmp_path, labels=["terrible", "good"])
    assert accuracy > 0.95 and labels == ["negative", "positive"]
    assert scored(trained, tmp_path / "c", tmp_path) == (accuracy, labels)  # its run says so
    wrong, _ = scored(moved, tmp_path / "d", tmp_path, labels=["good", "terrible"])
    assert wrong == pytest.approx(1 - accuracy)  # given: kept, with a warning
    with pytest.raises(InputError, match=r"teacher.labels: expected every label of the data once"):
        scored(moved, tmp_path / "e", tmp_path, labels=["good", "bad"])

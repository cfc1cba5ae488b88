"""The command in a manifest asks for every option that was used, and makes the same model again."""

import functools
import json
import shlex

import click
import keras
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

import tfvllm
from tests import tiny_models
from tfvllm.cli import export as export_command
from tfvllm.cli import simplify as simplify_command
from tfvllm.cli.export import labels_of
from tfvllm.compress.recipe import parse_recipe
from tfvllm.compress.report import again
from tfvllm.export.exporter import again as export_again
from tfvllm.savedmodel import manifest
from tfvllm.savedmodel.manifest import command_line
from tfvllm.serving import kit

# What shapes no model: where it comes from and goes to, and what is told on the way.
TELLS = {"source", "destination", "model", "overwrite", "html", "diagram", "as_json", "publish"}


def options_of(command: click.Command) -> set[str]:
    return {parameter.name for parameter in command.params} - TELLS


def run(command, line: str, **places):
    """Runs a command line, or what `again` says, with real places for its stand-ins."""
    words = shlex.split(line, comments=True)
    words = [str(places.get(word, word)) for word in words[2 if words[0] == "tfvllm" else 0 :]]
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 0, (words, result.output, result.exception)


def last_step(folder) -> dict:
    return manifest.read(folder)["steps"][-1]


def answers(folder, **inputs):
    served = tf.saved_model.load(str(folder)).signatures["serving_default"]
    return served(**{name: tf.constant(value) for name, value in inputs.items()})


# --- simplify ---------------------------------------------------------------------------------------------------------

# option -> (how it is given, how `again` says it); the runs that use them
SIMPLIFY = {
    "target": ("--target onednn", "--target onednn"),
    "precision": ("--precision int8", "--precision int8"),
    "signature": ("--signature serving_default", "--signature serving_default"),
    "rules": ("--rules -FoldScale --rules -heads", "--rules -FoldScale --rules -heads"),
    "calibration": ("--calibration CALIBRATION", "--calibration CALIBRATION"),
    "max_error": ("--max-error 0.2", "--max-error 0.2"),
    "percentile": ("--percentile 99.5", "--percentile 99.5"),
    "activations": ("--activations bfloat16", "--activations bfloat16"),
    "measure": ("--measure", ""),  # its outcome is named: --rules -RULE for each that was left out
    "profile": ("--profile REQUESTS.jsonl", "--profile REQUESTS.jsonl"),
    "memory_limit": ("--memory-limit 3", "--memory-limit 3.0"),
    "rtol": ("--rtol 0.5", "--rtol 0.5"),
    "atol": ("--atol 0.25", "--atol 0.25"),
}
RUNS = [
    pytest.param({"signature", "rules", "calibration", "rtol", "atol"}, id="float32"),
    pytest.param(
        {"target", "precision", "calibration", "max_error", "percentile", "activations"},
        id="int8",
        marks=pytest.mark.thorough,
    ),
    pytest.param({"profile", "memory_limit", "measure"}, id="measured", marks=pytest.mark.thorough),
]


def test_every_option_of_simplify_is_walked():
    assert options_of(simplify_command.command) == set(SIMPLIFY) == set().union(*(run.values[0] for run in RUNS))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("again")
    model = keras.Sequential([keras.Input([64]), keras.layers.Dense(128, "relu"), keras.layers.Dense(3)])
    tiny_models.randomise(model)
    model.export(folder / "plain", verbose=False)
    rows = np.random.default_rng(0).normal(size=(16, 64)).astype("float32")
    name = next(iter(tf.saved_model.load(str(folder / "plain")).signatures["serving_default"]
                     .structured_input_signature[1]))  # fmt: skip
    np.savez(folder / "rows.npz", **{name: rows})
    (folder / "requests.jsonl").write_text(json.dumps({"batch": 2, "length": 1}) + "\n")
    return folder, {name: rows}


@pytest.mark.parametrize("used", RUNS)
def test_simplify_again(used, plain, tmp_path):
    folder, inputs = plain
    places = {"SRC": folder / "plain", "CALIBRATION": folder / "rows.npz", "REQUESTS.jsonl": folder / "requests.jsonl"}
    given = " ".join(SIMPLIFY[name][0] for name in sorted(used))
    run(simplify_command.command, f"SRC DST {given}", DST=tmp_path / "a", **places)
    step = last_step(tmp_path / "a")
    for name in used:
        assert SIMPLIFY[name][1] in step["again"], (name, step["again"])
    for name in set(SIMPLIFY) - used - {"target", "precision", "rules"}:
        assert f"--{name.replace('_', '-')} " not in step["again"] + " "
    run(simplify_command.command, step["again"], DST=tmp_path / "b", **places)
    repeated = last_step(tmp_path / "b")
    assert repeated["again"] == step["again"]
    if "measure" not in used:
        assert repeated["options"] == step["options"]
        assert repeated["rules"] == step["rules"]
    np.testing.assert_array_equal(*(next(iter(answers(tmp_path / n, **inputs).values())) for n in ("a", "b")))


def test_what_no_option_can_say_stands_behind_the_command(plain, tmp_path):
    from tfvllm.rules.fold_scale import FoldScale

    folder, inputs = plain
    rows = [{name: value[:2] for name, value in inputs.items()}]
    tfvllm.simplify_saved_model(folder / "plain", tmp_path / "a", rules=["-heads", FoldScale()], calibration=rows)
    step = last_step(tmp_path / "a")
    assert step["again"].endswith("--rules -heads --calibration CALIBRATION  # with rules added in Python: FoldScale")
    assert step["options"]["calibration"]["samples"] == 1


def test_one_signature_keeps_its_own_warmup_requests(text_export, tmp_path):
    from tfvllm.savedmodel import warmup
    from tfvllm.serving import lint

    assert {name for name, _ in warmup.read(text_export)} == {"serving_default", "classify"}
    tfvllm.simplify_saved_model(text_export, tmp_path / "1", signature="serving_default")
    requests = warmup.read(tmp_path / "1")
    assert requests and {name for name, _ in requests} == {"serving_default"}
    assert "broken-warmup" not in lint.lint(tmp_path / "1").codes()


def test_words_are_quoted_for_the_shell():
    line = command_line("x", {"--a": "two words", "--b": ["1", "it's"], "--c": True, "--d": None, "--e": False})
    assert shlex.split(line) == ["x", "--a", "two words", "--b", "1", "--b", "it's", "--c"]


# --- export -----------------------------------------------------------------------------------------------------------

EXPORT = {
    "task": ("--task classify", "--task classify"),
    "labels": ("--labels bad,good", "--labels bad,good"),
    "max_length": ("--max-length 20", "--max-length 20"),
    "precision": ("--precision float32", "--precision float32"),
    "options": ("--option pad_to_multiple=4", "--option pad_to_multiple=4"),
    "check": ("--check here", "--check here"),
    "warmup": ("--no-warmup", "--no-warmup"),
    "serving_kit": ("--serving-kit", "--serving-kit"),
}
ONLY_TRANSLATE = {"max_source_length"}


def test_every_option_of_export_is_walked():
    assert options_of(export_command.command) == set(EXPORT) | ONLY_TRANSLATE


@pytest.fixture(scope="module")
def saved(text_classifier, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "t.keras"
    text_classifier.save(path)
    return path


@pytest.mark.thorough
def test_export_again(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(kit, "measure", functools.partial(kit.measure, seconds=0.1))
    given = " ".join(given for given, _ in EXPORT.values())
    run(export_command.command, f"MODEL DST {given}", MODEL=saved, DST=tmp_path / "a" / "1")
    step = last_step(tmp_path / "a" / "1")
    for _, said in EXPORT.values():
        assert said in step["again"]
    run(export_command.command, step["again"], MODEL=saved, DST=tmp_path / "b" / "1")
    assert last_step(tmp_path / "b" / "1") == step
    assert (tmp_path / "b" / "serving-kit").is_dir()
    found = [answers(tmp_path / n / "1", text=tiny_models.TEXTS) for n in ("a", "b")]
    np.testing.assert_array_equal(found[0]["scores"], found[1]["scores"])
    assert found[1]["classes"][0].numpy().tolist() == [b"bad", b"good"]


@pytest.mark.parametrize("labels", [["bad, very", " good"], ["[good", "bad"], ["a'b", 'c"d'], ["坏", ""]])
def test_labels_of_any_kind(labels):
    line = export_again("classify", {"labels": labels, "precision": "float32"}, {"--check": "none"})
    words = shlex.split(line)
    assert labels_of(words[words.index("--labels") + 1]) == labels


def test_what_export_was_given_in_python():
    line = export_again("embed", {"preprocessor": object(), "pooling": "max"}, {"--no-warmup": True})
    said = "--task embed --option 'pooling=\"max\"' --no-warmup  # with preprocessor given in Python"
    assert line == f"tfvllm export MODEL DST {said}"


# --- compress ---------------------------------------------------------------------------------------------------------


def test_compress_again_asks_for_what_the_recipe_cannot_hold(tmp_path):
    (tmp_path / "t.keras").touch()
    content = {"data": {"path": str(tmp_path)}, "teacher": {"model": str(tmp_path / "t.keras")}}
    line = again(parse_recipe(content))
    assert line.endswith("tfvllm compress RECIPE.yaml --data DATA --set teacher.model=TEACHER_MODEL")
    assert again(parse_recipe({"teacher": {"preset": "bert_tiny_en_uncased"}})).endswith("compress RECIPE.yaml")

"""The whole road on a tiny model: what comes out, what is redone, what is refused, what the report says."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from tests import browser
from tests.compress.conftest import RECIPE, write_data
from tfvllm import cli
from tfvllm.compress.report import terminal_summary


def run(capsys, *arguments) -> tuple[int, str, str]:
    """The command line, in this process: exit code, stdout, stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


def _set(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


@pytest.fixture(scope="module")
def out(tmp_path_factory, recipe_file):
    """One finished run."""
    from tfvllm import compress
    from tfvllm.compress.recipe import read_recipe

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    compress.run(read_recipe(recipe_file), folder)
    return folder


@pytest.fixture
def report(out):
    return json.loads((out / "report.json").read_text())


def steps(out) -> set[str]:
    return {entry.name for entry in (out / "steps").iterdir()}


@pytest.mark.thorough
def test_every_stage_is_reported_with_its_accuracy(report):
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert list(stages) == ["teacher", "student", "distill", "shrink"]
    assert stages["teacher"]["dev_accuracy"] > 0.95
    assert stages["shrink"]["dev_accuracy"] > 0.95
    assert stages["teacher"]["weights"] > stages["student"]["weights"] > stages["shrink"]["weights"]
    assert stages["teacher"]["nonzero_share"] > 0.98
    # half of the kernels' weights are zero, embeddings and norms are not pruned
    assert 0.5 < stages["distill"]["nonzero_share"] < stages["student"]["nonzero_share"] - 0.1
    assert len(stages["teacher"]["history"]) == 4


@pytest.mark.thorough
def test_saved_models_are_measured_side_by_side(report):
    names = ["teacher (Keras export)", "distilled", "shrunk", "simplified"]
    assert list(report["saved_models"]) == list(report["accuracy"]) == names
    assert [point["shape"] for point in report["latency"]] == [[1, 8], [3, 16]]
    for point in report["latency"]:
        for timing in point["models"].values():
            assert 0 < timing["min_ms"] <= timing["median_ms"] <= timing["p95_ms"] and timing["repeats"] == 3
    assert report["accuracy"]["simplified"] == report["accuracy"]["shrunk"]
    shrunk = next(stage for stage in report["stages"] if stage["stage"] == "shrink")
    assert report["accuracy"]["shrunk"]["dev"] == pytest.approx(
        shrunk["dev_accuracy"]
    )  # the file serves what was trained
    assert report["saved_models"]["simplified"]["flops"] < report["saved_models"]["teacher (Keras export)"]["flops"] / 2
    assert report["simplify"]["after"]["nodes"] < report["simplify"]["before"]["nodes"]
    ratio = report["summary"]["speedup"]["(1, 8)"]
    medians = report["latency"][0]["models"]
    assert ratio == medians["teacher (Keras export)"]["median_ms"] / medians["simplified"]["median_ms"]


@pytest.mark.thorough
def test_the_student_is_servable_and_says_where_it_came_from(out):
    from tfvllm.bench.models import ServedModel

    served = ServedModel(out / "saved_model")  # the base folder, as a server would be given it
    answer = served({"text": ["the plot was great", "the plot was awful", ""]})
    assert answer["classes"].tolist() == [[b"negative", b"positive"]] * 3
    assert answer["scores"][:2].argmax(-1).tolist() == [1, 0]
    np.testing.assert_allclose(answer["scores"].sum(-1), 1.0, atol=1e-6)
    manifest = json.loads((out / "saved_model" / "1" / "assets.extra" / "tfvllm.json").read_text())
    assert [step["step"] for step in manifest["steps"]] == ["export", "simplify", "compress"]
    assert manifest["steps"][-1]["recipe"]["student"]["layers"] == 1
    assert manifest["steps"][-1]["accuracy"]["dev"] > 0.95
    assert (out / "teacher" / "1" / "saved_model.pb").is_file()


@pytest.mark.thorough
@pytest.mark.slow  # of an export: tests/export/test_classify_export.py::test_nothing_but_tensorflow_is_needed
def test_the_model_loads_with_tensorflow_alone(out):
    program = (
        "import sys, tensorflow as tf, tensorflow_text\n"
        f"f = tf.saved_model.load({str(out / 'saved_model' / '1')!r}).signatures['serving_default']\n"
        "s = f(text=tf.constant(['the film was good', 'the film was bad']))['scores'].numpy()\n"
        "assert 'tfvllm' not in sys.modules\n"
        "print(s.argmax(-1).tolist())\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", check=True)
    assert answer.stdout.strip() == "[1, 0]"


@pytest.mark.thorough
def test_the_html_report_is_self_contained_and_honest(out):
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Masks alone do not speed up serving" in page
    assert '<meta name="viewport"' in page and "prefers-color-scheme: dark" in page
    assert page.count("<svg ") == 4 and page.count('class="mermaid-source"') == 3
    outside = page.split('id="mermaid-gzip"')[0]
    assert not re.findall(r"""(?:src|href)=["']?https?:""", outside)
    assert str(out) not in page  # a report travels: it names no folder of this machine
    for figure in ("Teacher", "Distilled and pruned (masks)", "Structure removed, before recovery", "simplified"):
        assert figure in page


@pytest.mark.thorough
def test_the_terminal_shows_tables(out):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(terminal_summary(json.loads((out / "report.json").read_text()), out))
    text = console.export_text()
    assert "Distilled and pruned (masks)" in text and "teacher (Keras export)" in text
    for name, scores in json.loads((out / "report.json").read_text())["accuracy"].items():
        row = next(line for line in text.split("\n") if line.startswith(f"│ {name} "))
        assert f"{100 * scores['dev']:.2f}" in row
    assert "the teacher's Keras export: " in text and max(map(len, text.split("\n"))) <= 100


@pytest.mark.thorough
def test_the_html_report_in_a_browser(out):
    with browser.chromium() as chromium:
        browser.check_page(chromium, out / "report.html", diagrams=3)


@pytest.mark.thorough
def test_resume_redoes_what_changed_and_what_follows(out, recipe_file, capsys):
    before = steps(out)
    code, told, log = run(capsys, "compress", recipe_file, "--out", out, "--resume", "--json")
    assert code == 0 and steps(out) == before
    assert json.loads(told)["summary"]["final"] == "simplified"
    assert "benchmark: done before, kept" in log and ": start" not in log
    code, told, log = run(
        capsys, "compress", recipe_file, "--out", out, "--resume",
        *_set("benchmark.repeats=4", "prune=null", "shrink=null", "distill.epochs=1"),
    )  # fmt: skip
    assert code == 0
    assert re.findall(r"(\S+): start", log) == ["distill", "export-distill", "simplify", "benchmark"]
    assert "× at (1, 8)" in told and "report.html" in told


@pytest.mark.thorough
def test_an_existing_run_is_refused_and_left_alone(out, recipe_file, capsys):
    before = (out / "report.json").read_bytes()
    code, told, log = run(capsys, "compress", recipe_file, "--out", out)
    assert code == 2 and told == ""
    assert log.strip().endswith("pass --resume to go on with it, --overwrite to start afresh.")
    assert (out / "report.json").read_bytes() == before
    code, _, log = run(capsys, "compress", recipe_file, "--out", out, "--resume", "--overwrite")
    assert code == 2 and "found both" in log


@pytest.mark.thorough
def test_report_command(out, tmp_path, capsys):
    code, told, _ = run(capsys, "report", out)
    assert code == 0 and "SavedModel" in told
    code, told, _ = run(capsys, "report", out, "--json")
    assert code == 0 and json.loads(told)["name"] == "tiny"
    code, told, log = run(capsys, "report", tmp_path)
    assert code == 2 and told == "" and "expected the folder of a finished compress run" in log


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (("epochs: 4", "epoch: 4"), 2, "teacher.epoch: unknown key"),
        (("path: ", "path: /nowhere"), 2, "data.path: expected a folder or a TSV file"),
        (("heads: 2", "heads: 5"), 2, "expected hidden as a multiple of heads, found hidden: 32 and heads: 5"),
        (("vocabulary: 200", "preset: ./no_preset"), 2, "teacher.preset: no file ./no_preset; expected"),
    ],
)
def test_wrong_recipes_end_with_one_line_and_code_2(recipe_file, tmp_path, capsys, change, code, said):
    file = tmp_path / "wrong.yaml"
    file.write_text(recipe_file.read_text().replace(*change, 1))
    found, told, log = run(capsys, "compress", file, "--out", tmp_path / "out")
    last = log.strip().split("\n")[-1]
    assert (found, told) == (code, "") and last.startswith("tfvllm: ") and said in last
    assert "Traceback" not in log


def test_a_bad_row_ends_with_one_line_and_code_2(recipe_file, small_data, tmp_path, capsys):
    import shutil

    shutil.copytree(small_data, tmp_path / "data")
    with (tmp_path / "data" / "dev.tsv").open("a") as file:
        file.write("no label\n")
    code, _, log = run(capsys, "compress", recipe_file, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert code == 2
    assert re.search(r"dev\.tsv, line 62: expected sentence<TAB>label, found no tab: 'no label'", log)


def test_a_full_disk_ends_with_one_line_code_1_and_nothing_half_written(recipe_file, tmp_path, capsys, monkeypatch):
    from tfvllm.compress import stages

    def full(model, path):
        path.write_bytes(b"half a model")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stages, "save_model", full)
    out = tmp_path / "out"
    code, _, log = run(capsys, "compress", recipe_file, "--out", out, "--set", "teacher.epochs=0")
    assert code == 1
    assert "No space left on device. Nothing was changed." in log.strip().split("\n")[-1]
    assert not list((out / "steps").glob("teacher-*/model.keras")) and not (out / "saved_model").exists()


@pytest.mark.thorough
def test_ctrl_c_keeps_the_epochs_and_resume_goes_on(recipe_file, tmp_path, capsys, monkeypatch):
    from tfvllm.compress import training

    whole = training.EpochState.record

    def interrupted(self, epoch, entry):
        whole(self, epoch, entry)
        if epoch == 1:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    rest = ("student", "distill", "prune", "shrink", "export", "simplify", "benchmark")
    options = ("--out", out, *_set(*(f"{step}=null" for step in rest)))
    monkeypatch.setattr(training.EpochState, "record", interrupted)
    code, _, log = run(capsys, "compress", recipe_file, *options)
    assert code == 1 and "interrupted in step teacher" in log and "--resume" in log
    monkeypatch.undo()
    code, _, log = run(capsys, "compress", recipe_file, *options, "--resume")
    assert code == 0
    assert re.findall(r"teacher: epoch (\d) of 4", log) == ["3", "4"]


@pytest.mark.slow
def test_chinese_reviews_and_other_routes(tmp_path, capsys):
    """Chinese text; a fresh student; a trained teacher from a file; hidden states; augmentation; a cut vocabulary."""
    data = write_data(tmp_path / "data", chinese=True)
    file = tmp_path / "zh.yaml"
    file.write_text(RECIPE.format(data=data), encoding="utf-8")
    out = tmp_path / "out"
    code, told, log = run(
        capsys, "compress", file, "--out", out, "--json",
        *_set("student={start: scratch, layers: 1, hidden: 16, ffn: 32}", "prune=null", "shrink.vocabulary=seen"),
        *_set("shrink.compensate=least_squares", "simplify.profile=data"),
        *_set("distill.augment=0.1", "distill.hidden=0.1", "distill.hidden_fade=0.5", "distill.epochs=15"),
        *_set("distill.learning_rate=0.01"),
    )  # fmt: skip
    assert code == 0, log
    report = json.loads(told)
    assert report["accuracy"]["teacher (Keras export)"]["test"] > 0.9
    assert report["accuracy"]["simplified"]["test"] > 0.9
    assert all(s["dispatch"] for s in report["simplify"]["signatures"].values())
    from tfvllm.bench.models import ServedModel

    answer = ServedModel(out / "saved_model")({"text": ["酒店很好", "早餐太差"]})
    assert answer["scores"].argmax(-1).tolist() == [1, 0]

    teacher = next((out / "steps").glob("teacher-*/model.keras"))
    code, told, log = run(
        capsys, "compress", file, "--out", tmp_path / "again", "--json",
        *_set(f"teacher={{model: {teacher}}}", "prune=null", "shrink=null", "benchmark=null", "simplify=null"),
    )  # fmt: skip
    assert code == 0, log
    stages = {stage["stage"]: stage for stage in json.loads(told)["stages"]}
    assert stages["teacher"]["dev_accuracy"] == report["stages"][0]["dev_accuracy"]


def test_a_profile_of_the_data():
    from tfvllm.compress.tasks.classify_products import requests_like

    profile = requests_like([5, 9, 7, 5, 12], batch=2, batches=2)
    assert [p["lengths"] for p in profile if "lengths" in p] == [[5, 9], [7, 5]]
    alone = [p["length"] for p in profile if "length" in p]
    assert alone == sorted(set(alone)) and alone[0] >= 5 and alone[-1] <= 12
    assert sum(p["count"] for p in profile if "length" in p) == pytest.approx(1)

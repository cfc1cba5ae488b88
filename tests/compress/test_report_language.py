"""The report of language models, from results written by hand: figures, ratios, what compares, what is no number."""

import io
import json
import math
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console as RichConsole

from tests import browser
from tfvllm.cli.report import command as report_command
from tfvllm.compress import report
from tfvllm.compress.console import Console
from tfvllm.compress.recipe import parse_recipe
from tfvllm.compress.steps import StepResult, Workspace

EXPORT, KERAS = "teacher (tfvllm export)", "teacher (keras-nlp)"
CONDITIONS = {
    "machine": {"cpu": "Made-up", "cores": 2, "memory_gb": 8.0, "load_before": 0.1, "instructions": ["avx2"]},
    "versions": {"tfvllm": "0"},
    "date": "2026-01-01T00:00:00+00:00",
    "commit": None,
}
STEPS = {"student": {"layers": 1}, "distill": {}, "shrink": {"ffn": 0.5}, "export": {}, "benchmark": {}}
HISTORY = {"best_epoch": 2, "averaged": 1}


def _timing(tokens: float, first: float | None) -> dict:
    found = {"tokens_per_second": tokens, "sentences_per_second": tokens / 10, "tokens": 48}
    found["total_ms"] = {"median_ms": 480e3 / tokens if tokens else 1.0, "p95_ms": 9.0, "min_ms": 1.0, "repeats": 5}
    if first is not None:
        found["first_token_ms"] = {"median_ms": first, "p95_ms": first + 1, "min_ms": first, "repeats": 5}
    return found


class Run:
    """A finished run whose results are made up; tests change `stages`, `products` and `speed` before `report()`."""

    def __init__(self, out: Path, task: str, **changes):
        self.task = task
        self.recipe = parse_recipe({"task": task, "name": "made", **STEPS, **changes})
        self.workspace = Workspace(out, Console(quiet=True))
        self.stages = {
            "teacher": self._stage(20.0, 1.0, 1000, epochs=[40.0, 20.0]),
            "student": self._stage(90.0, 2.0, 600),
            "distill": self._stage(24.0, 1.1, 600, epochs=[30.0, 24.0]),
            "shrink": self._stage(25.0, 1.2, 500, epochs=[26.0, 25.0]),
        }
        for name in ("student", "distill", "shrink"):
            if getattr(self.recipe, name) is None:
                del self.stages[name]
        if "distill" in self.stages:
            self.stages["distill"]["settings"] = self.recipe.distill.model_dump()
        if "shrink" in self.stages:
            before = self._stage(50.0, 1.5, 500)
            del before["seconds"]
            objective = (self.recipe.distill or type(self.recipe).default_distill()).model_dump()
            settings = {**self.recipe.shrink.model_dump(), "objective": objective}
            self.stages["shrink"] |= {"before_recovery": before, "settings": settings}
        self.products = {EXPORT: self._product("teacher", 4_000_000)}
        if "shrink" in self.stages:
            self.products["shrunk"] = self._product("shrink", 1_000_000)
        first = (8.0, 4.0, 20.0) if task == "generate" else (None,) * 3
        self.speed = [
            {"batch": batch, "models": {EXPORT: _timing(100.0 * batch, first[0]),
                                        "shrunk": _timing(250.0 * batch, first[1]),
                                        KERAS: _timing(50.0 * batch, first[2])}}
            for batch in (1, 8)
        ]  # fmt: skip
        self.quality = (
            {
                "perplexity": {EXPORT: {"dev": 20.0, "test": 16.0}, "shrunk": {"dev": 25.0, "test": 18.0}},
                "bits_per_byte": {EXPORT: {"dev": 1.0, "test": 0.8}, "shrunk": {"dev": 1.2, "test": 1.0}},
            }
            if task == "generate"
            else {
                "bleu": {EXPORT: {"dev": 30.0, "test": 31.0}, "shrunk": {"dev": 28.0, "test": 29.5}},
                "chrf": {EXPORT: {"dev": 50.0, "test": 51.0}, "shrunk": {"dev": 50.0, "test": 52.0}},
                "signatures": {"bleu": "tok:zh|version:2", "chrf": "nc:6|version:2"},
            }
        )
        if "shrink" not in self.stages:
            for row in [*(batch["models"] for batch in self.speed), *self.quality.values()]:
                row.pop("shrunk", None)
        self.examples = [
            {"input": "<script>alert(1)</script> & more", "reference": "博物馆在\n医院对面。", "teacher": "博物馆",
             "student": "", **({"chrf": 3.25} if task == "translate" else {"worse_by": 0.5})},
        ] * 7  # fmt: skip

    def _stage(self, perplexity: float, bits: float, weights: int, epochs=()) -> dict:
        found = {"weights": weights, "nonzero_share": 1.0, "seconds": 3.0, "settings": {}}
        for split in ("dev", "test"):
            found |= {f"{split}_perplexity": perplexity, f"{split}_bits_per_byte": bits}
            if self.task == "translate":
                found |= {f"{split}_bleu": 30.0, f"{split}_chrf": 50.0}
        if epochs:
            found |= {"history": [{"loss": 1.0, "dev_perplexity": score} for score in epochs], **HISTORY}
        return found

    def _product(self, of: str, size: int) -> dict:
        return {"of": of, "bytes": size, "parameters": 10, "precision": "float32", "target": "portable", "seconds": 2.0}

    def _done(self, name: str, result: dict) -> StepResult:
        return StepResult(name, name, self.workspace.out / "steps" / name, result, False)

    def report(self) -> dict:
        facts = {"source": "made-up", "synthetic": True, "units": "rows", "train": 40, "dev": 10, "test": 10,
                 "notes": ["written by a generator"], "seconds": 0.1}  # fmt: skip
        stages = [self._done("data", facts), *(self._done(name, found) for name, found in self.stages.items())]
        products, measured = {}, None
        if self.recipe.export:
            products = {name: self._done(f"export-{p['of']}", p) for name, p in self.products.items()}
        if self.recipe.benchmark:
            memory = {name: size for name, size in ((EXPORT, 300.0), ("shrunk", 150.0)) if name in self.products}
            told = {"conditions": CONDITIONS, **self.quality, "speed": self.speed, "memory_mb": memory}
            measured = self._done("benchmark", {**told, "examples": self.examples, "seconds": 60.0})
        return report.build(self.recipe, self.workspace, stages, products, measured)


def test_generate_under_the_names_that_others_read(tmp_path):
    found = Run(tmp_path, "generate").report()
    assert found["task"] == "generate"
    assert found["perplexity"]["shrunk"] == {"dev": 25.0, "test": 18.0}
    assert found["bits_per_byte"][EXPORT]["test"] == 0.8
    rates = {EXPORT: 100.0, "shrunk": 250.0, KERAS: 50.0}
    assert found["tokens_per_second"][0] == {"batch": 1, "models": rates}
    assert found["first_token_ms"][1]["models"]["shrunk"] == {"median_ms": 4.0, "p95_ms": 5.0}
    assert found["memory_mb"]["shrunk"] == 150.0 and len(found["examples"]) == 7
    assert [stage["stage"] for stage in found["stages"]] == ["teacher", "student", "distill", "shrink"]
    assert found["stages"][3]["dev_perplexity"] == 25.0
    assert {"saved_models", "conditions", "data", "unused", "recipe", "again"} <= set(found)
    assert not {"bleu", "sentences_per_second", "not_finite"} & set(found)
    summary = found["summary"]
    assert (summary["final"], summary["against"], summary["size_ratio"], summary["memory_ratio"]) == (
        *("shrunk", EXPORT, 4.0, 2.0),
    )
    assert summary["speedup"] == {EXPORT: {"1": 2.5, "8": 2.5}, KERAS: {"1": 5.0, "8": 5.0}}
    assert summary["perplexity_ratio"] == {"dev": 1.25, "test": 1.125}
    assert summary["bits_per_byte_ratio"]["dev"] == pytest.approx(1.2)


def test_translate_under_the_names_that_others_read(tmp_path):
    found = Run(tmp_path, "translate").report()
    assert found["bleu"]["shrunk"]["test"] == 29.5 and found["chrf"][EXPORT]["dev"] == 50.0
    assert found["signatures"]["bleu"] == "tok:zh|version:2"
    assert found["perplexity"]["distill"] == {"dev": 24.0, "test": 24.0}  # of the stages
    assert found["bits_per_byte"]["shrink"]["dev"] == 1.2
    assert found["sentences_per_second"][1]["models"][KERAS] == 40.0
    assert found["stages"][2]["dev_bleu"] == 30.0
    assert found["summary"]["bleu_lost"] == {"dev": 2.0, "test": 1.5}
    assert found["summary"]["chrf_lost"] == {"dev": 0.0, "test": -1.0}
    assert "first_token_ms" not in found


@pytest.mark.parametrize(
    ("task", "quality"),
    [
        ("generate", {"perplexity": {"dev": 25.0, "test": 18.0}, "bits_per_byte": {"dev": 1.2, "test": 1.0}}),
        (
            "translate",
            {
                "bleu": {"dev": 28.0, "test": 29.5},
                "chrf": {"dev": 50.0, "test": 52.0},
                "signatures": {"bleu": "tok:zh|version:2", "chrf": "nc:6|version:2"},
            },
        ),
    ],
)
def test_the_manifest_says_how_good_that_savedmodel_is(tmp_path, task, quality):
    step = report.manifest_step(Run(tmp_path, task).report(), "shrunk")
    assert {key: step[key] for key in quality} == quality
    assert set(step) == {"step", "recipe", "data", "again", *quality}
    unmeasured = Run(tmp_path, task, benchmark=None).report()
    assert set(report.manifest_step(unmeasured, "shrunk")) == {"step", "recipe", "data", "again"}


def test_the_page_of_a_generator(tmp_path):
    page = report.to_html(Run(tmp_path, "generate").report(), {})
    first = page.split("<h2>Data</h2>")[0]
    for said in ("1.00 MB", "4.0× smaller than the teacher", "2.5×", "5.0×", "18.00", "12.5 % worse", "synthetic"):
        assert said in first, said
    assert "Written by a generator." in page
    assert page.count("<svg ") == 4 and page.count('class="mermaid-source"') == 1
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert "<p dir='auto' lang='zh'>博物馆在\n医院对面。</p>" in page and "(nothing)" in page
    assert "<summary>2 more</summary>" in page and "0.500 nats per token harder" in page
    assert not re.findall(r"""(?:src|href)=["']?https?:""", page.split('id="mermaid-gzip"')[0])


def test_the_page_of_a_translator(tmp_path):
    page = report.to_html(Run(tmp_path, "translate").report(), {})
    first = page.split("<h2>Data</h2>")[0]
    assert "29.50" in first and "(-1.50 points against the teacher)" in first and "1.50 points lost" in first
    assert "+1.00 points" in first  # chrF
    assert "tok:zh|version:2" in page and "chrF 3.2" in page and "sentences/s" in page


def test_lines_and_tables_of_the_terminal(tmp_path):
    found = Run(tmp_path, "generate").report()
    lines = report.summary_lines(found, tmp_path)
    text = "\n".join(lines)
    assert "| Shrunk and recovered " in text and "Structure removed, before recovery" in text
    row = next(line for line in text.split("\n") if line.startswith("| shrunk "))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("shrunk", "1.00", "150", "18.00", "1.000", "250", "2,000", "4.00"),
    ]
    keras = next(line for line in text.split("\n") if line.startswith(f"| {KERAS} "))
    assert [cell.strip() for cell in keras.strip("|").split("|")][1:] == ["–", "–", "–", "–", "50", "400", "20.00"]
    assert "2.5× at batch 1, 2.5× at batch 8" in text and f"{tmp_path / 'report.html'}" in text
    console = RichConsole(width=100, record=True, file=io.StringIO())
    console.print(report.terminal_summary(found, tmp_path))
    shown = console.export_text()
    assert "made: stages" in shown and "SavedModels, strings in, strings out" in shown
    assert max(map(len, shown.split("\n"))) <= 100


def test_the_report_command(tmp_path):
    run = Run(tmp_path, "translate")
    report.write(run.workspace, run.report(), None)
    told = CliRunner().invoke(report_command, [str(tmp_path)])
    assert told.exit_code == 0 and "| shrunk " in told.output and "29.50" in told.output
    told = CliRunner().invoke(report_command, [str(tmp_path), "--json"])
    assert json.loads(told.output)["task"] == "translate"


def test_perplexities_of_a_cut_vocabulary_are_told_apart(tmp_path):
    run = Run(tmp_path, "generate", shrink={"vocabulary": "seen"})
    found = run.report()
    assert found["other_vocabulary"] == []  # as many weights as before: all tokens were seen
    run.stages["shrink"]["weights"] -= 10
    found = run.report()
    assert found["other_vocabulary"] == ["shrink", "shrunk"]
    assert found["summary"]["perplexity_ratio"] == {"dev": None, "test": None}
    assert found["summary"]["bits_per_byte_ratio"]["test"] == pytest.approx(1.25)
    page, text = report.to_html(found, {}), "\n".join(report.summary_lines(found, tmp_path))
    for shown in (page.replace("&#x27;", "'"), text):
        assert "18.00*" in shown and "16.00*" not in shown and "does not compare" in shown
        assert "bits per byte of text is 1.000 against the teacher's 0.800: 25.0 % worse" in shown.replace(
            "&#x27;", "'"
        )
    assert "not to be compared" in page.split("<h2>Data</h2>")[0]


@pytest.mark.parametrize("broken", [math.nan, math.inf, math.exp(700)])
def test_a_diverged_model_leaves_the_json_valid_and_is_told(tmp_path, broken):
    run = Run(tmp_path, "generate")
    run.quality["perplexity"]["shrunk"] = {"dev": broken, "test": broken}
    run.quality["bits_per_byte"]["shrunk"] = {"dev": math.inf, "test": math.nan}
    run.stages["shrink"] |= {"test_perplexity": broken, "history": [{"loss": math.nan, "dev_perplexity": broken}] * 2}
    run.examples[0] = {**run.examples[0], "worse_by": math.nan}
    found = run.report()
    report.write(run.workspace, found, None)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    read = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert read == found
    assert read["perplexity"]["shrunk"] == {"dev": None, "test": None}
    assert read["summary"]["perplexity_ratio"] == {"dev": None, "test": None}
    assert "perplexity.shrunk.test" in read["not_finite"] and "stages[3].history[0].loss" in read["not_finite"]
    json.dumps(report.manifest_step(found, "shrunk"), allow_nan=False)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "is not a finite number: training went wrong" in page.split("<h2>Data</h2>")[0]
    assert "report.json has null there" in page and "not finite" in "\n".join(report.summary_lines(found, tmp_path))


def test_a_model_that_answers_nothing_has_no_ratio(tmp_path):
    run = Run(tmp_path, "generate")
    run.speed[0]["models"][KERAS]["tokens_per_second"] = 0.0
    found = run.report()
    assert found["summary"]["speedup"][KERAS] == {"1": None, "8": 5.0}
    assert f"{KERAS} answered with no token at batch 1" in report.to_html(found, {})


@pytest.mark.parametrize("task", ["generate", "translate"])
@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        (("benchmark",), "4.0× smaller than the teacher"),
        (("benchmark", "export"), "No SavedModel was made"),
        (("benchmark", "export", "student", "distill", "shrink"), "makes no student"),
        (("benchmark", "student", "distill", "shrink"), "makes no student"),
        (("student", "distill", "shrink"), "against those of keras-nlp, which runs the teacher: 2.0× at batch 1"),
    ],
)
def test_steps_left_out(tmp_path, task, left_out, said):
    run = Run(tmp_path, task, **dict.fromkeys(left_out))
    found = run.report()
    report.write(run.workspace, found, None)
    page = (tmp_path / "report.html").read_text(encoding="utf-8").replace("&#x27;", "'")
    assert said in page and "Conditions" in page
    text = "\n".join(report.summary_lines(found, tmp_path))
    assert "| Teacher " in text and ("SavedModel:" in text) == ("export" not in left_out)
    assert ("summary" in found) == ("export" not in left_out)
    if "shrink" not in left_out and task == "generate":  # of the Keras models, where nothing was served
        assert "25.00 against the teacher's 20.00: 25.0 % worse" in page
    report.terminal_summary(found, tmp_path)


def test_rounds_and_no_epochs(tmp_path):
    run = Run(tmp_path, "generate", distill={"rounds": 2}, shrink=None, export=None, benchmark=None)
    for stage in run.stages.values():
        stage.pop("history", None)
    rounds = [{"round": 0, "dev_divergence": 0.5}, {"round": 1, "dev_divergence": 0.25}]
    run.stages["distill"] |= {"rounds": rounds, "best_round": 1}
    page = report.to_html(run.report(), {})
    assert "0.2500" in page and "Every epoch" not in page


def test_the_steps_and_their_inputs(tmp_path):
    """Also a step that another did inside itself, in this run or in one before; not that of another teacher."""
    workspace = Workspace(tmp_path, Console(quiet=True))

    def do(name, parameters, inputs, result=None, inside=lambda: None):
        return workspace.do(name, parameters, inputs, lambda directory, work: inside() or dict(result or {}))

    recipe = parse_recipe({"task": "translate", **STEPS, "distill": {"targets": "teacher"}, "benchmark": None})
    run = Run(tmp_path, "translate", distill={"targets": "teacher"}, benchmark=None)
    data = do("data", {}, [], {"source": "s", "synthetic": False, "units": "pairs", "train": 1, "dev": 1, "test": 0,
                               "notes": []})  # fmt: skip
    teacher = do("teacher", {"seed": 1}, [data], run.stages["teacher"])
    other = do("teacher", {"seed": 2}, [data])
    do("teacher-answers", {"top_k": 32}, [other])

    def ask():
        do("teacher-translations", {"beams": 4}, [teacher])
        do("teacher-answers", {"top_k": 32}, [teacher])

    student = do("student", {}, [teacher], run.stages["student"])
    for _ in range(2):  # the second time all are there
        distill = do("distill", run.stages["distill"]["settings"], [student], run.stages["distill"], ask)
        shrink = do("shrink", run.stages["shrink"]["settings"], [distill], run.stages["shrink"], ask)
    products = {EXPORT: do("export-teacher", {}, [teacher], run.products[EXPORT]),
                "shrunk": do("export-shrink", {}, [shrink], run.products["shrunk"])}  # fmt: skip
    found = report.build(recipe, workspace, [data, teacher, student, distill, shrink], products, None)
    assert {entry["step"]: entry["inputs"] for entry in found["steps"]} == {
        "data": [],
        "teacher": ["data"],
        "student": ["teacher"],
        "teacher-translations": ["teacher"],
        "teacher-answers": ["teacher"],
        "distill": ["student", "teacher-translations", "teacher-answers"],
        "shrink": ["distill", "teacher-translations", "teacher-answers"],
        "export-teacher": ["teacher"],
        "export-shrink": ["shrink"],
    }
    assert len(found["steps"]) == 9  # the other teacher's answers are none of this run
    page = report.to_html(found, {})
    assert "&lt;b&gt;teacher-answers&lt;/b&gt;&lt;br/&gt;0.0 s" in page and "--&gt;" in page


@pytest.mark.thorough
@pytest.mark.parametrize("task", ["generate", "translate"])
def test_the_page_in_a_browser(tmp_path, task):
    run = Run(tmp_path, task)
    run.examples.append({**run.examples[0], "student": "很长" * 200, "teacher": "x" * 300})
    report.write(run.workspace, run.report(), None)
    with browser.chromium() as chromium:
        browser.check_page(chromium, tmp_path / "report.html", diagrams=1)

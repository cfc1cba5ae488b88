"""The report of a run: report.json, report.html for people, and a few lines for the terminal. One module a task."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from tfvllm import html
from tfvllm.bench import results
from tfvllm.compress.recipe import Recipe, unused_keys
from tfvllm.compress.report import classify, common, language, step_graph
from tfvllm.compress.report.common import again
from tfvllm.compress.steps import StepResult, Workspace
from tfvllm.files import write_text

__all__ = ["again", "build", "manifest_step", "summary_lines", "terminal_summary", "to_html", "write"]


def _module(task: str) -> ModuleType:
    return classify if task == "classify" else language


def build(
    recipe: Recipe,
    workspace: Workspace,
    stages: list[StepResult],
    products: dict[str, StepResult],
    measured: StepResult | None,
) -> dict[str, Any]:
    """Everything the run knows, as JSON-able data.

    Args:
        stages: the Keras steps, data and teacher first.
        products: name -> export or simplify step, teacher first, the final one last.
        measured: the benchmark step.
    """
    task = _module(recipe.task)
    data = next(done for done in stages if done.name == "data")
    models = [done for done in stages if done.name != "data"]
    report: dict[str, Any] = {
        "name": recipe.name,
        "task": recipe.task,
        "recipe": common.without_folders(recipe.model_dump(mode="json")),
        "again": again(recipe),
        "data": task.data_of(data.result),
        "unused": unused_keys(recipe),
        "stages": [{"stage": done.name, **done.result} for done in models],
        "saved_models": {
            name: {key: value for key, value in done.result.items() if key != "graph"}
            for name, done in products.items()
        },
        "steps": step_graph.steps(workspace, [*stages, *products.values(), *([] if measured is None else [measured])]),
        "conditions": results.conditions() if measured is None else measured.result["conditions"],
    }
    report |= task.content(recipe, stages, products, measured, report)
    lost: list[str] = []
    report = common.finite(report, lost)
    return {**report, "not_finite": lost} if lost else report


def manifest_step(report: dict[str, Any], name: str) -> dict[str, Any]:
    """What the manifest of the SavedModel `name` says about the run that made it."""
    told = _module(report["task"]).quality(report, name)
    return {"step": "compress", "recipe": report["recipe"], "data": report["data"], **told, "again": report["again"]}


def write(workspace: Workspace, report: dict[str, Any], simplified: StepResult | None) -> None:
    """Writes report.json and report.html into the output folder."""
    diagrams = {}
    if simplified is not None:
        for which in ("before", "after"):
            file = simplified.directory / f"{which}.mmd"
            if file.is_file():
                diagrams[which] = file.read_text(encoding="utf-8")
    content = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(workspace.out / "report.json", content + "\n")
    write_text(workspace.out / "report.html", to_html(report, diagrams))


def to_html(report: dict[str, Any], diagrams: dict[str, str]) -> str:
    """The report as one self-contained page. `diagrams`: Mermaid sources of the graph before and after simplifying."""
    body = [*_module(report["task"]).page(report, diagrams)]
    graph = html.diagram(step_graph.mermaid(report["steps"]), "Each step of this run, how long it took, and its inputs")
    body += [f"<h2>Steps</h2>{graph}", common.conditions(report)]
    return html.page(f"{report['name']}: what was compressed, and what it cost", "\n".join(body))


def summary_lines(report: dict[str, Any], out: Path) -> list[str]:
    """The run in a few lines of plain text."""
    task = _module(report.get("task", "classify"))  # a report of before there were other tasks does not say it
    lines: list[str] = []
    for _, headers, rows in task.tables(report)[0 if task.STAGES_IN_PLAIN_TEXT else 1 :]:
        lines += [*([""] if lines else []), results.text_table(headers, rows)]
    return [*lines, *task.closing(report), *common.last_lines(report, out)]


def terminal_summary(report: dict[str, Any], out: Path) -> Any:
    """The run as a `rich` renderable: what each stage cost and kept, then the SavedModels side by side."""
    task = _module(report.get("task", "classify"))
    return common.rendered(task.tables(report), [*task.closing(report), *common.last_lines(report, out)])

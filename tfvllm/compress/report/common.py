"""What the reports of all tasks have in common: how files are named, figures shown, tables and pages put together."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tfvllm import html
from tfvllm.compress.artifacts import MODEL
from tfvllm.compress.recipe import Recipe

MASKS = (
    "Masks alone do not speed up serving: TensorFlow multiplies masked weights as it multiplies any others, and its "
    "sparse kernels are slower than the dense ones even at 99 % zeros. They make the model compress better "
    "on disk, and mark what may go. The speed here comes from fewer layers, from removed structure and "
    "from the "
)
_NO_NUMBER = 1e300  # perplexities are capped a little above: no model that is of use comes near

Table = tuple[str, list[str], list[list[str]]]  # title, headers, rows

# --- data ---------------------------------------------------------------------------------------------------------


def without_folders(recipe: dict[str, Any]) -> dict[str, Any]:
    """Reports and manifests travel: they name files, not where one machine keeps them."""
    for block, key in (("data", "path"), ("teacher", "preset"), ("teacher", "model"), ("simplify", "profile")):
        if (recipe.get(block) or {}).get(key):
            recipe[block][key] = Path(recipe[block][key]).name
    return recipe


def again(recipe: Recipe) -> str:
    """How to ask for the same run: the recipe holds every option, but names files without their folders."""
    from tfvllm.savedmodel.manifest import command_line

    files = {"teacher.model": getattr(recipe.teacher, "model", None), "teacher.preset": recipe.teacher.preset}
    files["simplify.profile"] = recipe.simplify.profile if recipe.simplify else None
    flags = {
        "--data": "DATA" if recipe.data.path else None,
        "--set": [f"{key}={key.upper().replace('.', '_')}" for key, path in files.items() if path and _is_path(path)],
    }
    return "save recipe as YAML, then: " + command_line("tfvllm compress RECIPE.yaml", flags)


def _is_path(name: str) -> bool:
    return Path(name).name != name or Path(name).exists()


def finite(content: Any, found: list[str], where: str = "") -> Any:
    """The same content with None for each float that JSON has no number for, whose places are put into `found`."""
    if isinstance(content, dict):
        return {key: finite(value, found, f"{where}.{key}" if where else str(key)) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value, found, f"{where}[{i}]") for i, value in enumerate(content)]
    if isinstance(content, float) and not abs(content) < _NO_NUMBER:
        found.append(where)
        return None
    return content


def ratio(over: float | None, under: float | None) -> float | None:
    """`over / under`; None where either is no number, or there is nothing to divide by."""
    if over is None or under is None or not under or not math.isfinite(over) or not math.isfinite(under):
        return None
    return over / under


# --- figures ------------------------------------------------------------------------------------------------------


def times(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio < 100 else f"{ratio:.0f}×"


def points(gained: float) -> str:
    return f"{round(gained, 2) + 0.0:+.2f}"  # + 0.0: no minus before zero


def number(entry: dict[str, Any], key: str, shown: str = ".2f") -> str:
    """A figure of an entry: a dash where there is none, a word where it is no number."""
    if key not in entry:
        return "–"
    return "not finite" if entry[key] is None else format(entry[key], shown)


def megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"


# --- stages -------------------------------------------------------------------------------------------------------

_TITLES = {
    "teacher": "Teacher",
    "student": "Student, before training",
    "distill": "Distilled",
    "shrink": "Shrunk and recovered",
}


def stage_rows(report: dict[str, Any], cells: Callable[[str, dict[str, Any]], list[str]]) -> list[list[str]]:
    """A row for each stage: title, weights, share not zero, `cells(stage's name, its figures)`, seconds."""
    rows = []

    def row(title: str, stage: dict[str, Any], of: str, took: str) -> None:
        size = [f"{stage['weights']:,}", f"{stage['nonzero_share']:.0%}"]
        rows.append([title, *size, *cells(of, stage), took])

    for stage in report["stages"]:
        title = _TITLES.get(stage["stage"], stage["stage"])
        if stage["stage"] == "distill" and report["recipe"]["prune"]:
            title += " and pruned (masks)"
        if before := stage.get("before_recovery"):
            row("Structure removed, before recovery", before, "", "–")
        row(title, stage, stage["stage"], f"{stage['seconds']:.0f} s")
    return rows


def kept(stage: dict[str, Any], epoch: int) -> str:
    """What became of the weights of an epoch, counted from 1."""
    if stage.get("averaged", 1) > 1:
        return "kept in the mean" if epoch > len(stage["history"]) - stage["averaged"] else ""
    return "kept" if epoch == stage["best_epoch"] else ""


def every_epoch(report: dict[str, Any], key: str, label: str, shown: str) -> str:
    """A folded table of the epochs of all steps that trained."""
    rows = [
        [stage["stage"], i + 1, f"{_or_nan(entry.get('loss')):.4f}", number(entry, key, shown), kept(stage, i + 1)]
        for stage in report["stages"]
        for i, entry in enumerate(stage.get("history", ()))
    ]
    return f"<details><summary>Every epoch</summary>{html.table(['step', 'epoch', 'loss', label, ''], rows)}</details>"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def masks(report: dict[str, Any], what_else: str) -> str:
    """A note, where the run pruned, on what masks do and do not; `what_else` makes the model fast."""
    return f"<p class='note'>{html.escape(MASKS + what_else)}</p>" if report["recipe"]["prune"] else ""


# --- parts of the page --------------------------------------------------------------------------------------------


def data_notes(report: dict[str, Any]) -> str:
    return "".join(
        f"<p class='note'>{html.escape(note[0].upper() + note[1:])}.</p>" for note in report["data"]["notes"]
    )


def conditions(report: dict[str, Any]) -> str:
    """Machine, versions, date; and the recipe, folded."""
    found = report["conditions"]
    machine = found["machine"]
    rows = [
        ["processor", f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['instructions'])}"],
        ["memory", f"{machine['memory_gb']} GB"],
        ["load before measuring", str(machine["load_before"])],
        ["date", found["date"]],
        ["commit", found["commit"] or "not a checkout"],
        ["versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())],
    ]
    recipe = html.escape(json.dumps(report["recipe"], indent=1, ensure_ascii=False))
    return (
        f"<h2>Conditions</h2>{html.table(['', ''], rows)}<details><summary>The recipe, defaults filled in</summary>"
        f"<pre>{recipe}</pre></details>"
    )


# --- terminal -----------------------------------------------------------------------------------------------------


def last_lines(report: dict[str, Any], out: Path) -> list[str]:
    """Where things are."""
    lines = []
    if report["saved_models"]:
        lines.append(f"SavedModel: {out / MODEL}   (tfvllm serve {report['name']}={out / MODEL})")
    lines.append(f"report: {out / 'report.html'}")
    return lines


def rendered(tables: Sequence[Table], lines: Sequence[str]) -> Any:
    """Tables and lines below them as a `rich` renderable."""
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    parts: list[Any] = []
    for title, headers, rows in tables:
        made = RichTable(title=title, title_justify="left", title_style="bold", header_style="bold")
        for i, header in enumerate(headers):
            made.add_column(header, justify="right" if i else "left", overflow="fold")
        for row in rows:
            made.add_row(*map(Text, row))
        parts.append(made)
    return Group(*parts, *(Text(line, overflow="fold") for line in lines))

"""Walks every cell and writes the table of what works, docs/matrix.md.

    python -m tests.matrix.table [--jobs 2] [--results FILE] [FAMILY ...]

An hour of two cores. With `--results` what was walked is kept in FILE, and not walked again. With names of families
only these are walked, and printed, not written.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

from .families import FAMILIES
from .walk import ENTRIES, SETTINGS, TASKS, Cell, Group, every_cell

PAGE = Path(__file__).parents[2] / "docs" / "matrix.md"
HEAD = """# What works

Every cell was run: the SavedModel was written by its entry point, loaded by a process that has TensorFlow and
TensorFlow Text only (REST: by `tfvllm serve`), and gave keras-nlp's own answers (GPT-NeoX: its forward pass's). In
float32 that is the same greedy tokens, or scores and embeddings within 1e-4; in bfloat16 tokens whose logits lie
within 0.5 of the best one's, or scores and embeddings within 0.06. Models are tiny, with random weights. `python -m
tests.matrix.table` makes this page.

P: `tfvllm.export` (and `tfvllm.simplify_saved_model` for encoders) in Python; C: `tfvllm export` (and `tfvllm
simplify`) on a `.keras` file; R: `tfvllm serve`, asked over REST. A number is a cell that does not work, and why.

"""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="FAMILY")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args(arguments)
    families = [family for family in FAMILIES if not given.names or family.name in given.names]
    wanted = [(family.name, task) for family in families for task in family.task]
    text = HEAD + table(families, walked(wanted, given.jobs, given.results))
    if given.names:
        print(text)
    else:
        PAGE.write_text(text)


def walked(wanted: list[tuple[str, str]], jobs: int, results: Path | None) -> dict[tuple[str, str], dict[Cell, str]]:
    """(family, task) -> cell -> what went wrong, "" for nothing; those in `results` are not walked again."""
    found: dict = {}
    if results is not None and results.exists():
        for line in results.read_text().splitlines():
            name, task, cells = json.loads(line)
            found[name, task] = {Cell(*cell): problem for *cell, problem in cells}
    missing = [group for group in wanted if group not in found]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, max_tasks_per_child=1) as pool:
        tasks = {pool.submit(_walk, *group): group for group in missing}
        for done in as_completed(tasks):
            name, task = tasks[done]
            found[name, task] = done.result()
            problems = {problem for problem in found[name, task].values() if problem}
            print(name, task, problems or "passed", file=sys.stderr, flush=True)
            if results is not None:
                cells = [[cell.precision, cell.target, cell.entry, words] for cell, words in found[name, task].items()]
                with results.open("a") as file:
                    file.write(json.dumps([name, task, cells]) + "\n")
    return found


def _walk(name: str, task: str) -> dict[Cell, str]:
    family = next(family for family in FAMILIES if family.name == name)
    with tempfile.TemporaryDirectory() as folder:
        return Group(family, task, Path(folder)).walk(every_cell())


def table(families, found: dict[tuple[str, str], dict[Cell, str]]) -> str:
    """The rows of `families` in Markdown, and below it why some cells do not work."""
    notes: list[str] = []
    lines = [
        f"| family | task | {' | '.join(f'{precision}, {target}' for precision, target in SETTINGS)} |",
        "|---" * (2 + len(SETTINGS)) + "|",
    ]
    for family in families:
        for task in TASKS:
            if task in family.task:
                places = [_place(found[family.name, task], *setting, notes) for setting in SETTINGS]
            else:
                places = [_note(notes, _refused(family.no[task]))] * len(SETTINGS)
            lines.append(f"| {family.name} | {task} | {' | '.join(places)} |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(notes, 1)), ""]
    versions = ", ".join(f"{name} {version(name)}" for name in ("tensorflow", "keras", "keras-nlp"))
    return "\n".join([*lines, f"Walked on {datetime.date.today().isoformat()} with {versions}.", ""])


def _place(found: dict[Cell, str], precision: str, target: str, notes: list[str]) -> str:
    """What stands in one place of the table, such as "P C R"."""
    words = []
    for entry in ENTRIES:
        problem = found[Cell(precision, target, entry)]
        words.append(entry[0].upper() + (_note(notes, problem) if problem else ""))
    return " ".join(words)


def _refused(pattern: str) -> str:
    return f"Not meant to work; refused: “… {pattern.replace(chr(92), '')} …”."


def _note(notes: list[str], reason: str) -> str:
    if reason not in notes:
        notes.append(reason)
    return f"[{notes.index(reason) + 1}]"


if __name__ == "__main__":
    main(sys.argv[1:])

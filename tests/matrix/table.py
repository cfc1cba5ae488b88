"""Walks every cell and writes the table of what works, docs/matrix.md.

    python -m tests.matrix.table [FAMILY ...]

With names of families only these are walked, and printed, not written.
"""

from __future__ import annotations

import datetime
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from .families import FAMILIES
from .walk import ENTRIES, SETTINGS, TASKS, Cell, Group, every_cell

PAGE = Path(__file__).parents[2] / "docs" / "matrix.md"
HEAD = """# What works

Every cell was run: the SavedModel was written by its entry point, loaded by a process that has TensorFlow and
TensorFlow Text only (REST: by `tfvllm serve`), and gave keras-nlp's own answers. In float32 that is the same greedy
tokens, or scores and embeddings within 1e-4; in bfloat16 tokens whose logits lie within 0.5 of the best one's, or
scores and embeddings within 0.06. Models are tiny, with random weights. `python -m tests.matrix.table` makes this page.

P: `tfvllm.export` (and `tfvllm.simplify_saved_model` for encoders) in Python; C: `tfvllm export` (and `tfvllm
simplify`) on a `.keras` file; R: `tfvllm serve`, asked over REST.

"""


def main(names: list[str]) -> int:
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            if names and family.name not in names:
                continue
            for task in TASKS:
                if task not in family.task:
                    rows.append((family.name, task, [_note(notes, family.no[task].replace("\\", ""))] * len(SETTINGS)))
                    continue
                found = Group(family, task, Path(folder)).walk(every_cell())
                rows.append((family.name, task, [_setting(found, *setting, notes) for setting in SETTINGS]))
                print(*rows[-1], file=sys.stderr, flush=True)
    text = HEAD + _table(rows, notes)
    if names:
        print(text)
    else:
        PAGE.write_text(text)
    return 0


def _setting(found: dict[Cell, str], precision: str, target: str, notes: list[str]) -> str:
    """What stands in one place of the table, such as "P C R"."""
    words = []
    for entry in ENTRIES:
        problem = found[Cell(precision, target, entry)]
        words.append(entry[0].upper() + (_note(notes, problem) if problem else ""))
    return " ".join(words)


def _note(notes: list[str], reason: str) -> str:
    if reason not in notes:
        notes.append(reason)
    return f"[{notes.index(reason) + 1}]"


def _table(rows: list, notes: list[str]) -> str:
    settings = [f"{precision}, {target}" for precision, target in SETTINGS]
    lines = [f"| family | task | {' | '.join(settings)} |", "|---" * (2 + len(settings)) + "|"]
    lines += [f"| {name} | {task} | {' | '.join(cells)} |" for name, task, cells in rows]
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(notes, 1)), ""]
    versions = ", ".join(f"{name} {version(name)}" for name in ("tensorflow", "keras", "keras-nlp"))
    return "\n".join([*lines, f"Walked on {datetime.date.today().isoformat()} with {versions}.", ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

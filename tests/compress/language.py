"""Tiny recipes of `task: generate` and `task: translate`, and runs of them that end where a test wants it.

`python -m tests.compress.language RECIPE.json OUT [TITLE SHARE]` goes on with a run; it kills itself with SIGKILL once
SHARE of the work called TITLE is done.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tfvllm.compress.console import Console, Progress

ONCE = {"epochs": 1, "batch_size": 16, "learning_rate": 2e-3}
COMMON: dict[str, Any] = {
    "seed": 3,
    "teacher": {"vocabulary": 320, "layers": 2, "heads": 2, "hidden": 16, "ffn": 32, **ONCE},
    "student": {"layers": 1},
    "distill": ONCE,
}
GENERATE = {"task": "generate", "data": {"synthetic": {"train": 48, "dev": 8, "test": 8}, "max_length": 48}, **COMMON}
TRANSLATE = {
    "task": "translate",
    "data": {"synthetic": {"train": 64, "dev": 12, "test": 8}, "max_length": 40},
    **COMMON,
}


def changed(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A recipe with other keys: `distill={"rounds": 2}` changes one key of the block, `student=None` takes it away."""
    made = dict(content)
    for name, value in changes.items():
        held = made.get(name)
        made[name] = {**held, **value} if isinstance(value, dict) and isinstance(held, dict) else value
    return {name: value for name, value in made.items() if value is not None}


class Listening(Console):
    """Says nothing, and knows what was said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def steps(self, how: str) -> list[str]:
        """Those that were begun (`start`), or kept (`done before, kept`)."""
        return [line.removesuffix(f": {how}") for line in self.lines if line.endswith(f": {how}")]


class Run:
    """A run that has come to its end.

    Attributes:
        made, kept: names of the steps that were done, and of those that had been done before.
        results: what each step said, by its name.
        folders: the folder of each.
    """

    def __init__(self, content: dict[str, Any], out: Path, **options: Any):
        from tfvllm import compress
        from tfvllm.compress.recipe import parse_recipe
        from tfvllm.compress.steps import Workspace

        self.out, self.console = out, Listening()
        self.results: dict[str, dict[str, Any]] = {}
        self.folders: dict[str, Path] = {}
        do = Workspace.do

        def heard(workspace: Workspace, name: str, *arguments: Any) -> Any:
            done = do(workspace, name, *arguments)
            self.results[name], self.folders[name] = done.result, done.directory
            return done

        Workspace.do = heard  # type: ignore[method-assign]
        try:
            compress.run(parse_recipe(content), out, console=self.console, **options)
        finally:
            Workspace.do = do  # type: ignore[method-assign]
        self.made, self.kept = self.console.steps("start"), self.console.steps("done before, kept")

    def figures(self) -> dict[str, dict[str, Any]]:
        """What of the results must not depend on when and how often they were made."""
        timed = ("seconds", "settings", "conditions", "speed", "memory_mb")
        return {
            name: {key: value for key, value in found.items() if key not in timed}
            for name, found in self.results.items()
        }


def _main(recipe: str, out: str, title: str = "", share: str = "1") -> None:
    at = Progress.at

    def counted(self: Progress, done: int, note: str = "") -> None:
        at(self, done, note)
        if self._title == title and done >= float(share) * self._total:
            os.kill(os.getpid(), signal.SIGKILL)

    Progress.at = counted  # type: ignore[method-assign]
    found = Run(json.loads(Path(recipe).read_text()), Path(out), resume=Path(out).exists())
    print(json.dumps({"made": found.made, "kept": found.kept, "figures": found.figures()}))


if __name__ == "__main__":
    _main(*sys.argv[1:])

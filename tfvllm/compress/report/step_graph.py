"""Which step of a run was made from which: as data, and as a Mermaid diagram."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tfvllm.compress.steps import StepResult, Workspace


def steps(workspace: Workspace, wanted: Sequence[StepResult]) -> list[dict[str, Any]]:
    """The steps that `wanted` were made from, and these, inputs first: `{"step", "inputs", "seconds"}` of each."""
    found: dict[str, dict[str, Any]] = {}

    def visit(folder: str) -> str:
        name = folder.rpartition("-")[0]
        if folder not in found:
            file = workspace.out / "steps" / folder / "result.json"
            result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            inputs = list(map(visit, result.get("inputs", ())))
            found[folder] = {"step": name, "inputs": inputs, "seconds": result.get("seconds", 0.0)}
        return name

    for done in wanted:
        visit(done.directory.name)
    return list(found.values())


def mermaid(entries: Sequence[Mapping[str, Any]]) -> str:
    """The steps as a Mermaid flowchart, each with its seconds."""
    ids = {entry["step"]: f"s{i}" for i, entry in enumerate(entries)}
    lines = ["flowchart TD"]
    lines += [f'  {ids[e["step"]]}["<b>{e["step"]}</b><br/>{took(e["seconds"])}"]' for e in entries]
    lines += [f"  {ids[source]} --> {ids[e['step']]}" for e in entries for source in e["inputs"] if source in ids]
    return "\n".join(lines) + "\n"


def took(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"

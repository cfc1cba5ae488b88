"""Which step of a run was made from which: as data, and as a Mermaid diagram."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tfvllm.compress.steps import StepResult, Workspace
from tfvllm.files import digest


def steps(
    workspace: Workspace,
    stages: Sequence[StepResult],
    products: Mapping[str, StepResult],
    measured: StepResult | None,
    asked: Mapping[str, Sequence[str]],
    *,
    teacher_is_measured: bool,
) -> list[dict[str, Any]]:
    """Each step of the run in the order of its inputs, as `{"step", "inputs", "seconds"}`.

    Args:
        stages: data, teacher and what was trained from it.
        asked: of a stage that learns from the teacher, the steps that it learns from: the teacher, or such in which the
            teacher was asked beforehand, the first of them first.
        teacher_is_measured: whether the benchmark runs the Keras teacher too.
    """
    data, teacher, *learnt = stages
    found = [_entry(data, []), _entry(teacher, ["data"])]
    helpers = _helpers(workspace, teacher)
    before, known = "teacher", {"teacher"}
    for stage in learnt:
        names = [name if name in helpers else "teacher" for name in asked.get(stage.name, ())]
        for i, name in enumerate(names):
            if name not in known:
                found.append(_entry(helpers[name], ["teacher", *names[:i]]))
                known.add(name)
        found.append(_entry(stage, [before, *names]))
        before = stage.name
    files: list[str] = []
    for product in products.values():
        found.append(_entry(product, [product.result.get("of") or _of(product, files, stages)]))
        files.append(product.name)
    if measured is not None:
        found.append(_entry(measured, ["teacher", *files] if teacher_is_measured else files))
    return found


def _entry(done: StepResult, inputs: Sequence[str]) -> dict[str, Any]:
    return {"step": done.name, "inputs": list(dict.fromkeys(inputs)), "seconds": done.result.get("seconds", 0.0)}


def _of(product: StepResult, before: Sequence[str], stages: Sequence[StepResult]) -> str:
    name = product.name.removeprefix("export-")
    return name if any(stage.name == name for stage in stages) else before[-1]


def _helpers(workspace: Workspace, teacher: StepResult) -> dict[str, StepResult]:
    """The steps that were made from this very teacher alone, the newest of each name.

    A step that a stage does inside itself is not done again where that stage was done before: only its folder tells.
    """
    found: dict[str, tuple[float, StepResult]] = {}
    for file in (workspace.out / "steps").glob("teacher-*/result.json"):
        name, _, key = file.parent.name.rpartition("-")
        result = json.loads(file.read_text(encoding="utf-8"))
        # As `Workspace.do` makes it.
        if digest(name, json.dumps(result.get("settings"), sort_keys=True), [teacher.key])[:12] != key:
            continue
        made = file.stat().st_mtime
        if name not in found or made > found[name][0]:
            found[name] = made, StepResult(name, key, file.parent, result, True)
    return {name: done for name, (_, done) in found.items()}


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

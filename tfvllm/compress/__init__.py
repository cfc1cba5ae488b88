"""The main job: a recipe in, a small, fast SavedModel and a measured report out.

The package itself can be called: `tfvllm.compress("recipe.yaml")`.
"""

import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfvllm.compress.recipe import Recipe
from tfvllm.files import write_text

if TYPE_CHECKING:
    from tfvllm.compress.console import Console

__all__ = ["run"]


def run(
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: "Console | None" = None,
) -> dict[str, Any]:
    """Does all steps of `recipe` in the folder `out` and returns the report.

    `out` holds, when done: `saved_model/1` (the result; beside it `serving-kit/`, where `export.serving_kit` asks for
    it), `teacher/1` (the baseline), `report.html`, `report.json`, `recipe.json` and `steps/` (each step's own result,
    which `resume` builds on).

    Args:
        recipe: from `tfvllm.compress.recipe.read_recipe` or `parse_recipe`.
        out: a new folder, or an earlier run's with `resume` (go on; steps whose parameters or inputs changed are
            redone) or `overwrite` (start afresh).
        console: where progress goes; None says nothing.

    Raises:
        InputError: the data, a preset or `out` is not as expected.
        TfvllmError: a step failed or was interrupted; finished steps are kept.
        VerificationError: a SavedModel does not compute what its Keras model computes.

    Example:
        >>> from tfvllm.compress.recipe import parse_recipe
        >>> synthetic = {"train": 40, "dev": 10, "test": 10}
        >>> teacher = {"layers": 1, "hidden": 8, "heads": 2, "ffn": 8, "vocabulary": 120, "epochs": 0}
        >>> recipe = parse_recipe({"data": {"synthetic": synthetic, "max_length": 8}, "teacher": teacher})
        >>> report = tfvllm.compress.run(recipe, folder / "run")
        >>> [stage["stage"] for stage in report["stages"]]
        ['teacher']
    """
    from tfvllm.compress.console import Console
    from tfvllm.compress.steps import open_workspace

    with open_workspace(out, console or Console(quiet=True), resume=resume, overwrite=overwrite) as workspace:
        from tfvllm.compress import artifacts, report
        from tfvllm.compress.stages import Pipeline
        from tfvllm.compress.tasks import task_for

        write_text(workspace.out / "recipe.json", json.dumps(recipe.model_dump(mode="json"), indent=1) + "\n")
        task = task_for(recipe, workspace)
        road = Pipeline(recipe, workspace, task)
        data = road.data()
        teacher = road.teacher(data)
        stages = [data, teacher]
        if recipe.student:
            stages.append(road.student(teacher))
        if recipe.distill:
            stages.append(road.distill(stages[-1]))
        if recipe.shrink:
            stages.append(road.shrink(stages[-1]))

        products, simplified, measured = {}, None, None
        if recipe.export:
            products[task.baseline] = task.export(teacher, road.model_of, baseline=True)
            for done in stages[2:]:
                if done.name != "student" or done is stages[-1]:
                    products[_EXPORTED[done.name]] = task.export(done, road.model_of)
            if recipe.simplify:
                last = products[next(reversed(products))]
                simplified = products["simplified"] = task.simplify(last)
        if recipe.benchmark:
            measured = task.benchmark(list(products.items()), teacher, road.model_of)
        content = report.build(recipe, workspace, stages, products, measured)
        content["models"] = {done.name: f"steps/{done.directory.name}/model.keras" for done in stages[1:]}
        if recipe.export:
            names = {"teacher": next(iter(products)), artifacts.MODEL: next(reversed(products))}
            for folder, name in names.items():
                step = report.manifest_step(content, name)
                kit_for = recipe.name if recipe.export.serving_kit and folder == artifacts.MODEL else None
                artifacts.publish(workspace, products[name].directory / artifacts.MODEL, folder, step, kit_for=kit_for)
        report.write(workspace, content, simplified)
        return content


_EXPORTED = {"student": "student", "distill": "distilled", "shrink": "shrunk"}


def open_report(out: str | os.PathLike) -> tuple[Path, dict[str, Any]]:
    """The HTML file and the data of an earlier run's report.

    Raises:
        InputError: `out` holds no report.

    Example:
        >>> try:
        ...     tfvllm.compress.open_report("nowhere")
        ... except tfvllm.errors.InputError as error:
        ...     print(error)
        nowhere: expected the folder of a finished compress run (report.json, report.html), found none.
    """
    from tfvllm.errors import InputError

    out = Path(out)
    if not (out / "report.json").is_file() or not (out / "report.html").is_file():
        raise InputError(
            f"{out}: expected the folder of a finished compress run (report.json, report.html), found none."
        )
    return out / "report.html", json.loads((out / "report.json").read_text(encoding="utf-8"))


class _CallablePackage(types.ModuleType):
    # `tfvllm.compress` has to be both a package and the public function, whichever is imported first.
    def __call__(self, recipe: Any, out: Any = None, **options: Any) -> Any:
        return importlib.import_module("tfvllm.compress.result").compress(recipe, out, **options)


sys.modules[__name__].__class__ = _CallablePackage

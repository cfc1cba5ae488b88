"""`tfvllm.compress(...)`: the main job from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tfvllm.errors import InputError


@dataclass(frozen=True)
class Result:
    """What a finished run left in its folder.

    Attributes:
        out: the folder.
        report: what report.json holds.

    Example:
        >>> result = tfvllm.compress.result.Result(folder, {"stages": []})
        >>> result.saved_model is None, result.report_html.name
        (True, 'report.html')
    """

    out: Path
    report: dict[str, Any]

    @property
    def saved_model(self) -> Path | None:
        """The compressed model, as `tfvllm serve` and TF Serving take it; None where the recipe has no export step."""
        return self._version("saved_model")

    @property
    def teacher_saved_model(self) -> Path | None:
        """The teacher's, which it was measured against."""
        return self._version("teacher")

    @property
    def report_html(self) -> Path:
        """The report as a page."""
        return self.out / "report.html"

    @cached_property
    def student(self) -> Any:
        """The compressed Keras model, uncompiled; without a student, distil or shrink step the teacher itself."""
        return self._model(self.report["stages"][-1]["stage"])

    @cached_property
    def teacher(self) -> Any:
        """The teacher's Keras model, uncompiled."""
        return self._model("teacher")

    def _version(self, name: str) -> Path | None:
        path = self.out / name / "1"
        return path if path.is_dir() else None

    def _model(self, stage: str) -> Any:
        from tfvllm.compress.artifacts import load_model

        return load_model(self.out / self.report["models"][stage])

    def __repr__(self) -> str:
        return f"Result({str(self.out)!r})"


def compress(
    recipe: str | os.PathLike | Mapping[str, Any],
    out: str | os.PathLike | None = None,
    *,
    data: str | os.PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verbose: bool = True,
    **overrides: Any,
) -> Result:
    """Does all that a recipe says, as `tfvllm compress` does.

    Args:
        recipe: a YAML file, or its content as nested dicts.
        out: the folder of the run; default `runs/<name of the recipe>`.
        data: takes the place of `data.path` and of `data.synthetic`.
        resume: go on with an earlier run in `out`; what changed is redone.
        overwrite: start afresh in an earlier run's folder.
        verbose: whether to say on stderr what is going on.
        overrides: keys of the recipe; a block's are merged into the recipe's, as in `teacher={"epochs": 1}`; None
            leaves a step out.

    Raises:
        InputError: the recipe, the data, a preset or `out` is not as expected.
        TfvllmError: a step failed or was interrupted; finished steps are kept.
        VerificationError: a SavedModel does not compute what its Keras model computes.

    Example:
        >>> synthetic = {"train": 40, "dev": 10, "test": 10}
        >>> teacher = {"layers": 1, "hidden": 8, "heads": 2, "ffn": 8, "vocabulary": 120, "epochs": 0}
        >>> recipe = {"data": {"synthetic": synthetic, "max_length": 8}, "teacher": teacher}
        >>> result = tfvllm.compress(recipe, folder / "result", verbose=False, seed=2)
        >>> result.report["recipe"]["seed"], type(result.student).__name__, result.saved_model
        (2, 'BertTextClassifier', None)
    """
    from tfvllm.compress import run
    from tfvllm.compress.console import Console
    from tfvllm.compress.recipe import parse_recipe, read_content, with_data

    if resume and overwrite:
        raise InputError("expected resume=True (go on) or overwrite=True (start afresh), found both.")
    if isinstance(recipe, Mapping):
        content, where = dict(recipe), "recipe"
    else:
        content, where = read_content(recipe), str(recipe)
    checked = parse_recipe(with_data(_merged(content, overrides), data), where=where)
    folder = Path("runs") / checked.name if out is None else Path(out)
    return Result(folder, run(checked, folder, resume=resume, overwrite=overwrite, console=Console(quiet=not verbose)))


def _merged(content: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(content)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged

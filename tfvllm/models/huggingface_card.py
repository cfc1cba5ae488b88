"""The model card of a Hugging Face folder: how it is loaded, its sizes, and the numbers of the run that made it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfvllm.errors import InputError

_STAGES = ("weights", "nonzero_share", "dev_accuracy", "test_accuracy")


def read_report(report: Any) -> dict[str, Any]:
    """The content of a run's `report.json`: as it is, from its file, or from the folder it is in.

    Raises:
        InputError: there is none.
    """
    found = report
    if not isinstance(report, Mapping):
        path = Path(os.fspath(report))
        file = path / "report.json" if path.is_dir() else path
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: expected the report.json of a tfvllm compress run; {error}.") from None
    if not isinstance(found, Mapping) or not {"data", "stages"} <= set(found):
        raise InputError("report: expected the content of a compress run's report.json, found other JSON.")
    return dict(found)


def card(model: Any, parameters: int, name: str, config: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    """The text of `README.md`.

    Args:
        model: what is written.
        parameters: how many numbers its weights have.
        name: of the folder.
        config: the content of `config.json`.
        report: the content of a run's `report.json`, if there was one.
    """
    architecture = config["architectures"][0]
    auto, pipeline = "AutoModel", "feature-extraction"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        auto, pipeline = "AutoModelForCausalLM", "text-generation"
    elif architecture.endswith("ForSequenceClassification"):
        auto, pipeline = "AutoModelForSequenceClassification", "text-classification"
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: {pipeline}\ntags:\n- tfvllm\n---",
        f"# {name}",
        f"A `{architecture}` of {parameters:,} parameters, written by tfvllm from a keras-nlp "
        f"`{type(model).__name__}`.",
        _loading(auto, name, getattr(model, "preprocessor", None) is not None),
    ]
    return "\n\n".join([*parts, *_run(report)]) + "\n"


def _loading(auto: str, name: str, tokenizer: bool) -> str:
    lines = [f"from transformers import {auto}" + (", AutoTokenizer" if tokenizer else ""), ""]
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{name}")'] if tokenizer else []
    return "\n".join(["```python", *lines, f'model = {auto}.from_pretrained("{name}")', "```"])


def _run(report: Mapping[str, Any] | None) -> list[str]:
    if report is None:
        return []
    data = report["data"]
    parts = [
        "## The run that made it",
        f"{data['source']}: {data['train']:,} sentences to train on, {data['dev']:,} dev, {data['test']:,} test; "
        f"labels {', '.join(data['labels'])}. Weights and epochs were chosen by dev accuracy.",
        _table(
            ["stage", "weights", "not zero", "dev accuracy", "test accuracy"],
            [[stage["stage"], *(_cell(stage, key) for key in _STAGES)] for stage in report["stages"]],
        ),
    ]
    sizes, scores = report.get("saved_models") or {}, report.get("accuracy") or {}
    if sizes:
        splits = list(next(iter(scores.values()), {}))
        rows = [
            [
                name,
                f"{size['bytes'] / 1e6:.2f} MB",
                *(f"{scores[name][s]:.2%}" if name in scores else "–" for s in splits),
            ]
            for name, size in sizes.items()
        ]
        head = ["SavedModel", "on disk", *(f"{split} accuracy" for split in splits)]
        parts += ["SavedModels of the same run, strings in, highest score out:", _table(head, rows)]
    return parts


def _cell(stage: Mapping[str, Any], key: str) -> str:
    value = stage.get(key)
    if value is None:
        return "–"
    return f"{value:,}" if key == "weights" else f"{value:.0%}" if key == "nonzero_share" else f"{value:.2%}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

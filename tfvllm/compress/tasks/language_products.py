"""From language models to SavedModels that are measured side by side: what generation and translation share."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfvllm.bench import models as bench
from tfvllm.compress.artifacts import MODEL
from tfvllm.compress.steps import StepResult, Workspace
from tfvllm.compress.tasks.base import AnyModel
from tfvllm.errors import InputError
from tfvllm.export import exporter
from tfvllm.savedmodel import manifest
from tfvllm.timing import compare

KERAS = "teacher (keras-nlp)"  # what reports call the teacher as its user runs it today
# (texts, most new tokens) -> (answers, tokens of each answer)
Generating = Callable[[Sequence[str], int], tuple[list[str], list[int]]]


def export(
    recipe: Any, workspace: Workspace, model: StepResult, model_of: AnyModel, options: Mapping[str, Any]
) -> StepResult:
    """Exports a step's Keras model."""
    check = recipe.export.check

    def build(directory: Path, work: Path) -> dict[str, Any]:
        exporter.export(model_of(model), directory / MODEL, task=recipe.task, check=check, **options)
        told = manifest.read(directory / MODEL)
        return {
            "of": model.name,
            "bytes": bench.size_on_disk(directory / MODEL),
            "parameters": told.get("parameters"),
            "precision": told["precision"],
            "target": told["target"],
        }

    done = workspace.do(f"export-{model.name}", {**options, "check": check}, [model], build)
    workspace.console.line(f"  {model.name} as a SavedModel: {done.result['bytes'] / 1e6:.1f} MB")
    return done


def speed_of(
    candidates: Mapping[str, Generating], texts: Sequence[str], new_tokens: int, repeats: int, warmup: int
) -> dict[str, dict[str, Any]]:
    """Times all candidates on one batch of texts, taking turns.

    Args:
        new_tokens: the most of an answer; 0 where the models themselves say it.
    Returns:
        For each `tokens_per_second` (of the answers it gives, from the median), `sentences_per_second`, `total_ms` and,
        with `new_tokens`, `first_token_ms`: of a call for one token.
    """
    counts = {name: sum(call(texts, new_tokens)[1]) for name, call in candidates.items()}
    calls = {f"{name}, all": functools.partial(call, texts, new_tokens) for name, call in candidates.items()}
    if new_tokens:
        calls |= {f"{name}, first": functools.partial(call, texts, 1) for name, call in candidates.items()}
    timings = compare(calls, repeats=repeats, warmup=warmup)
    found: dict[str, dict[str, Any]] = {}
    for name in candidates:
        whole = timings[f"{name}, all"]
        found[name] = {
            "tokens_per_second": counts[name] / whole.median_ms * 1e3,
            "sentences_per_second": len(texts) / whole.median_ms * 1e3,
            "tokens": counts[name],
            "total_ms": whole.to_dict(),
        }
        if new_tokens:
            found[name]["first_token_ms"] = timings[f"{name}, first"].to_dict()
    return found


def resident(directory: Path, inputs: Mapping[str, Sequence[str]]) -> float:
    """MB of memory that a process with TensorFlow alone has more, once it has loaded a SavedModel and answered."""
    program = _RESIDENT.format(path=str(directory.absolute()), inputs=dict(inputs))
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    if told.returncode:
        raise InputError(f"{directory} does not answer in a process of its own: {told.stderr.strip()[-300:]}")
    return float(told.stdout.split()[-1])


_RESIDENT = """
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf, tensorflow_text

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

before = resident()
loaded = tf.saved_model.load({path!r})
inputs = {inputs!r}
loaded.signatures["serving_default"](**{{name: tf.constant(value) for name, value in inputs.items()}})
print(resident() - before)
"""


def spread(items: Sequence[str], count: int) -> list[str]:
    """`count` of the items, evenly over all of them, some twice where there are fewer."""
    return [items[int(at)] for at in np.linspace(0, len(items) - 1, count)]

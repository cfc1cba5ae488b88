"""From Keras models to measured SavedModels: export, simplify, benchmark. Each function is one step."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.bench import models as bench
from tfvllm.bench import results
from tfvllm.compress.road import Road
from tfvllm.compress.steps import Done, Workspace
from tfvllm.data import Split
from tfvllm.files import new_directory
from tfvllm.recipe import Recipe

MODEL = "saved_model"  # the SavedModel inside a step's folder


def export(recipe: Recipe, workspace: Workspace, road: Road, model: Done, *, baseline: bool = False) -> Done:
    """Exports a step's Keras model. `baseline` is the teacher as Keras would export it, with its tokenizer in front.

    Both kinds take strings and pad a batch to its longest row, so that their latencies compare the models and nothing
    else.
    """
    block = recipe.export
    assert block is not None
    parameters = {"labels": road.text.labels, **({} if baseline else block.model_dump())}

    def build(directory: Path, work: Path) -> dict[str, Any]:
        import tfvllm.export

        tfvllm.export(
            road.model_of(model),
            directory / MODEL,
            task="classify",
            labels=road.text.labels,
            check="here" if baseline else block.check,
        )
        return {"of": model.name, "bytes": bench.size_on_disk(directory / MODEL), **figures(directory / MODEL)}

    done = workspace.do(f"export-{model.name}", parameters, [model], build)
    workspace.console.line(f"  {model.name} as a SavedModel: {done.result['bytes'] / 1e6:.1f} MB")
    return done


def simplify(recipe: Recipe, workspace: Workspace, road: Road, exported: Done) -> Done:
    """Rewrites the exported graph and proves that it computes the same."""
    block = recipe.simplify
    assert block is not None
    train = road.text.train

    def build(directory: Path, work: Path) -> dict[str, Any]:
        from tfvllm.graph.simplify import simplify_saved_model

        calibration = train.texts[:256] if block.precision == "int8" else None
        report = simplify_saved_model(
            exported.directory / MODEL,
            directory / MODEL,
            target=block.target,
            precision=block.precision,
            **({"calibration": calibration} if calibration else {}),
        )
        for which in ("before", "after"):
            (directory / f"{which}.mmd").write_text(report.mermaid(which), encoding="utf-8")
        return {
            "bytes": bench.size_on_disk(directory / MODEL),
            "graph": json.loads(json.dumps(report.to_dict(), default=str)),
            **figures(directory / MODEL),
        }

    done = workspace.do("simplify", block.model_dump(), [exported], build)
    workspace.console.line(f"  simplified for {block.target}, {block.precision}: {done.result['bytes'] / 1e6:.1f} MB")
    return done


def figures(directory: Path) -> dict[str, Any]:
    """What the graph alone tells: nodes and FLOPs of one sentence of 32 tokens."""
    from tfvllm.graph.simplify import inspect_saved_model

    seen = inspect_saved_model(directory)
    return {name: seen[name] for name in ("nodes", "flops") if name in seen}


def benchmark(recipe: Recipe, workspace: Workspace, road: Road, stages: Sequence[tuple[str, Done]]) -> Done:
    """Accuracy of every SavedModel, and latency and throughput of all of them, taking turns in one run."""
    block = recipe.benchmark
    assert block is not None

    def build(directory: Path, work: Path) -> dict[str, Any]:
        console = workspace.console
        before = results.conditions()
        models = {name: bench.ServedModel(done.directory / MODEL) for name, done in stages}
        accuracies: dict[str, dict[str, float]] = {name: {} for name in models}
        for split in ("dev", "test"):
            if part := getattr(road.text, split):
                for name, model in models.items():
                    accuracies[name][split] = served_accuracy(model, part)
        latency = []
        preprocessor = road.preprocessor
        for batch, length in block.shapes:
            texts = sentences_of_length(road.text.train.texts, preprocessor, batch, length)
            inputs = {name: model.texts(texts) for name, model in models.items()}
            timings = bench.latency(models, inputs, repeats=block.repeats, warmup=block.warmup)
            latency.append({"shape": [batch, length], "models": {name: t.to_dict() for name, t in timings.items()}})
            console.line(
                f"  ({batch}, {length}): "
                + ", ".join(f"{name} {timing.median_ms:.2f} ms" for name, timing in timings.items())
            )
        real = road.text.dev.texts[:256]
        passes = bench.throughput(models, real, batch=32, repeats=max(3, block.repeats // 8))
        return {
            "conditions": before,
            "accuracy": accuracies,
            "latency": latency,
            "throughput": {"sentences": len(real), "batch": 32, "models": passes},
        }

    parameters = {"stages": [name for name, _ in stages], **block.model_dump()}
    return workspace.do("benchmark", parameters, [done for _, done in stages], build)


def served_accuracy(model: bench.ServedModel, split: Split, *, batch: int = 32) -> float:
    """Share of sentences to which a SavedModel gives its label the highest score."""
    order = sorted(range(len(split)), key=lambda row: len(split.texts[row]))
    right = 0
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        scores = model(model.texts([split.texts[row] for row in rows]))["scores"]
        right += int((scores.argmax(-1) == np.asarray([split.labels[row] for row in rows])).sum())
    return right / len(split)


def sentences_of_length(texts: Sequence[str], preprocessor: Any, batch: int, length: int) -> list[str]:
    """`batch` made-up sentences of words from `texts` with exactly `length` tokens each, special ones included.

    Where no word fits the last gap, a sentence may be a token or two short.
    """

    def count(candidates: list[str]) -> np.ndarray:
        return np.asarray(preprocessor(tf.constant(candidates))["padding_mask"]).sum(axis=1)

    joint = " " if sum(" " in text for text in texts[:100]) > 50 else ""
    words: list[str] = []
    for text in texts:
        words += text.split() if joint else [character for character in text if character.isalpha()]
        if len(words) >= 2000:
            break
    fixed = int(count([""])[0])
    cost = dict(zip(dict.fromkeys(words), count(list(dict.fromkeys(words))) - fixed))
    made = []
    for row in range(batch):
        shift = (row * 97) % len(words)
        chosen, left = [], length - fixed
        for word in words[shift:] + words[:shift]:
            if 0 < cost[word] <= left:
                chosen.append(word)
                left -= int(cost[word])
            if left <= 0:
                break
        made.append(joint.join(chosen))
    return made


def publish(workspace: Workspace, source: Path, name: str) -> Path:
    """Copies a finished SavedModel to `<out>/<name>/1`, where `tfvllm serve` and TF Serving look for it."""
    target = workspace.out / name / "1"
    with new_directory(target, overwrite=True) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
    return target

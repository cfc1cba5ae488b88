"""From classifiers to measured SavedModels: export, simplify, benchmark. Each function is one step."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.bench import models as bench
from tfvllm.bench import results
from tfvllm.compress.artifacts import MODEL
from tfvllm.compress.recipe import ClassifyRecipe
from tfvllm.compress.steps import StepResult, Workspace
from tfvllm.compress.tasks.base import AnyModel
from tfvllm.data import Split, TextData
from tfvllm.export import exporter
from tfvllm.graph import loading


def export(
    recipe: ClassifyRecipe,
    workspace: Workspace,
    text: TextData,
    model: StepResult,
    model_of: AnyModel,
    *,
    baseline: bool = False,
) -> StepResult:
    """Exports a step's Keras model. `baseline` is the teacher as Keras would export it, with its tokenizer in front.

    Both kinds take strings and pad a batch to its longest row, so that their latencies compare the models and nothing
    else.
    """
    block = recipe.export
    assert block is not None
    parameters = {"labels": text.labels, **({} if baseline else {"check": block.check})}

    def build(directory: Path, work: Path) -> dict[str, Any]:
        exporter.export(
            model_of(model),
            directory / MODEL,
            task="classify",
            labels=text.labels,
            check="here" if baseline else block.check,
        )
        return {"of": model.name, "bytes": bench.size_on_disk(directory / MODEL), **figures(directory / MODEL)}

    done = workspace.do(f"export-{model.name}", parameters, [model], build)
    workspace.console.line(f"  {model.name} as a SavedModel: {done.result['bytes'] / 1e6:.1f} MB")
    return done


def simplify(
    recipe: ClassifyRecipe, workspace: Workspace, text: TextData, lengths: np.ndarray, exported: StepResult
) -> StepResult:
    """Rewrites the exported graph and proves that it computes the same."""
    block = recipe.simplify
    assert block is not None

    def build(directory: Path, work: Path) -> dict[str, Any]:
        from tfvllm.simplifier.api import simplify_saved_model

        report = simplify_saved_model(
            exported.directory / MODEL,
            directory / MODEL,
            target=block.target,
            precision=block.precision,
            calibration=_samples(text.train.texts),
            profile=requests_like(lengths) if block.profile == "data" else block.profile,
            progress=lambda message: workspace.console.line(f"  {message}"),
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


def requests_like(lengths: Sequence[int] | np.ndarray, batch: int = 32, batches: int = 4) -> list[dict[str, Any]]:
    """A profile of requests, half of them single sentences, half batches of `batch` in the order given.

    Args:
        lengths: tokens of each sentence.
    """
    alone = sorted({int(np.quantile(lengths, share)) for share in (0.1, 0.35, 0.65, 0.9)})
    together = [
        [int(n) for n in lengths[at : at + batch]] for at in range(0, min(len(lengths), batch * batches), batch)
    ]
    return [
        *({"batch": 1, "length": length, "count": 1 / len(alone)} for length in alone),
        *({"lengths": rows, "count": 1 / len(together)} for rows in together),
    ]


def figures(directory: Path) -> dict[str, Any]:
    """What the graph alone tells: nodes, and FLOPs for one sentence of 32 tokens (as far as sizes can be known)."""
    from tfvllm.simplifier import cost

    graph = loading.load(directory, "serving_default").signatures["serving_default"].graph
    counted = cost.count(graph, cost.example_sizes(graph, batch=1, length=32))
    return {name: counted[name] for name in ("nodes", "flops", "parameters")}


def _samples(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Real sentences to verify (and calibrate) both signatures on: whole batches, and single short and long ones."""
    ordered = sorted(texts, key=len)
    batches = [list(texts[:16]), list(texts[16:32]), [ordered[0]], [ordered[-1]], ["", ordered[len(ordered) // 2]]]
    samples: list[dict[str, Any]] = []
    for batch in filter(None, batches):
        examples = [
            tf.train.Example(
                features=tf.train.Features(
                    feature={"text": tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()]))}
                )
            ).SerializeToString()
            for text in batch
        ]
        samples.append({"text": np.asarray([text.encode() for text in batch], object)})
        samples.append({"inputs": np.asarray(examples, object)})
    return samples


def benchmark(
    recipe: ClassifyRecipe,
    workspace: Workspace,
    text: TextData,
    preprocessor: Any,
    stages: Sequence[tuple[str, StepResult]],
) -> StepResult:
    """Accuracy of every SavedModel, and latency and throughput of all of them, taking turns in one run."""
    block = recipe.benchmark
    assert block is not None

    def build(directory: Path, work: Path) -> dict[str, Any]:
        console = workspace.console
        before = results.conditions()
        models = {name: bench.ServedModel(done.directory / MODEL) for name, done in stages}
        accuracies: dict[str, dict[str, float]] = {name: {} for name in models}
        for split in ("dev", "test"):
            if part := getattr(text, split):
                for name, model in models.items():
                    accuracies[name][split] = served_accuracy(model, part)
        latency = []
        for batch, length in block.shapes:
            texts = sentences_of_length(text.train.texts, preprocessor, batch, length)
            inputs = {name: model.texts(texts) for name, model in models.items()}
            timings = bench.latency(models, inputs, repeats=block.repeats, warmup=block.warmup)
            latency.append({"shape": [batch, length], "models": {name: t.to_dict() for name, t in timings.items()}})
            console.line(
                f"  ({batch}, {length}): "
                + ", ".join(f"{name} {timing.median_ms:.2f} ms" for name, timing in timings.items())
            )
        real = text.dev.texts[:256]
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

"""Translators measured: BLEU and chrF as served, tokens per second, examples side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.bench import models as bench
from tfvllm.bench import results
from tfvllm.compress.artifacts import MODEL
from tfvllm.compress.steps import StepResult, Workspace
from tfvllm.compress.tasks.base import AnyModel
from tfvllm.compress.tasks.language_products import KERAS, Generating, resident, speed_of, spread
from tfvllm.data import Pairs


def benchmark(
    recipe: Any,
    workspace: Workspace,
    text: Pairs,
    codec: Any,
    products: Sequence[tuple[str, StepResult]],
    teacher: StepResult,
    model_of: AnyModel,
) -> StepResult:
    """BLEU and chrF of every SavedModel, and sentences and tokens per second beside the teacher in keras-nlp."""
    block = recipe.benchmark

    def build(directory: Path, work: Path) -> dict[str, Any]:
        import sacrebleu

        before, console = results.conditions(), workspace.console
        paths = {name: done.directory / MODEL for name, done in products}
        served = {name: served_translator(bench.ServedModel(path), codec) for name, path in paths.items()}
        scores: dict[str, dict[str, dict[str, float]]] = {
            kind: {name: {} for name in paths} for kind in ("bleu", "chrf")
        }
        signatures, of_dev = {}, {}
        for split in ("dev", "test"):
            pairs = getattr(text, split)
            if not pairs:
                continue
            for name, translate in served.items():
                answers = in_batches(functools.partial(_answers, translate), pairs.sources)
                found = quality(answers, pairs.targets)
                signatures = found["signatures"]
                for kind in scores:
                    scores[kind][name][split] = found[kind]
                if split == "dev":
                    of_dev[name] = answers
            console.line(
                f"  {split} BLEU as served: " + ", ".join(f"{n} {s[split]:.2f}" for n, s in scores["bleu"].items())
            )
        candidates: dict[str, Generating] = {**served, KERAS: keras_translator(model_of(teacher), codec)}
        speed = [
            speed_of(candidates, spread(text.dev.sources, batch), 0, block.repeats, block.warmup)
            for batch in block.batches
        ]
        for batch, row in zip(block.batches, speed):
            rates = (f"{name} {found['tokens_per_second']:.0f}" for name, found in row.items())
            console.line(f"  batch {batch}, tokens/s: {', '.join(rates)}")
        first, last = next(iter(paths)), next(reversed(paths))
        by = [sacrebleu.sentence_chrf(a, [r]).score for a, r in zip(of_dev[last], text.dev.targets)]
        worst = np.argsort(by, kind="stable")[: block.examples]
        return {
            "conditions": before,
            **scores,
            "signatures": signatures,
            "speed": [{"batch": batch, "models": row} for batch, row in zip(block.batches, speed)],
            "memory_mb": {name: resident(path, {"texts": [text.dev.sources[0]]}) for name, path in paths.items()},
            "examples": [
                {
                    "input": text.dev.sources[row],
                    "reference": text.dev.targets[row],
                    "teacher": of_dev[first][row],
                    "student": of_dev[last][row],
                    "chrf": by[row],
                }
                for row in worst
            ],
        }

    parameters = {"stages": [name for name, _ in products], **block.model_dump()}
    return workspace.do("benchmark", parameters, [teacher, *(done for _, done in products)], build)


def _answers(candidate: Generating, texts: Sequence[str]) -> list[str]:
    return candidate(texts, 0)[0]


def served_translator(model: bench.ServedModel, codec: Any) -> Generating:
    """Answers of an export's `serving_default`, by as many beams as it was exported with."""

    def call(texts: Sequence[str], count: int) -> tuple[list[str], list[int]]:
        answers = [text.decode() for text in model(model.texts(texts))["translations"]]
        return answers, _tokens(codec, answers)

    return call


def keras_translator(model: Any, codec: Any) -> Generating:
    """keras-nlp's own `generate`, greedy."""
    model.compile(sampler="greedy")

    def call(texts: Sequence[str], count: int) -> tuple[list[str], list[int]]:
        answers = list(model.generate(list(texts)))
        return answers, _tokens(codec, answers)

    return call


def _tokens(codec: Any, texts: Sequence[str]) -> list[int]:
    """Of each answer, its end token among them."""
    return [len(row) + 1 for row in codec.encode(tf.constant(list(texts), tf.string)).to_list()]


def quality(answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """`bleu` and `chrf` of a corpus and their `signatures`, by sacrebleu; Chinese and Japanese by their own tokens."""
    from sacrebleu.metrics import BLEU, CHRF

    found: dict[str, Any] = {"signatures": {}}
    for name, metric in (("bleu", BLEU(tokenize=_tokenizer(tuple(references[:200])))), ("chrf", CHRF())):
        found[name] = metric.corpus_score(list(answers), [list(references)]).score
        found["signatures"][name] = str(metric.get_signature())
    return found


@functools.lru_cache(8)
def _tokenizer(references: tuple[str, ...]) -> str:
    """sacrebleu's tokenizer for a language, by what it is written in: words, or characters where none are apart."""
    letters = [letter for reference in references for letter in reference if letter.isalpha()]
    han = sum("\u4e00" <= letter <= "\u9fff" for letter in letters)
    kana = sum("\u3040" <= letter <= "\u30ff" for letter in letters)
    if kana > len(letters) / 20:
        return "char"
    return "zh" if han > len(letters) / 2 else "13a"


def in_batches(call: Callable[[list[str]], Sequence[str]], texts: Sequence[str], at_once: int = 64) -> list[str]:
    """Answers in the order of the texts, which are asked by length."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    answers = [""] * len(texts)
    for at in range(0, len(order), at_once):
        rows = order[at : at + at_once]
        for row, answer in zip(rows, call([texts[row] for row in rows]), strict=True):
            answers[row] = answer.strip()
    return answers

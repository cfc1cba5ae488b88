"""Text generators measured: perplexity as served, tokens per second, examples side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from tfvllm.data import Document, Texts
from tfvllm.errors import InputError

_AT_ONCE = 32


def benchmark(
    recipe: Any,
    workspace: Workspace,
    text: Texts,
    codec: Any,
    products: Sequence[tuple[str, StepResult]],
    teacher: StepResult,
    model_of: AnyModel,
) -> StepResult:
    """Perplexity of every SavedModel, and tokens per second beside the teacher in keras-nlp."""
    block = recipe.benchmark

    def build(directory: Path, work: Path) -> dict[str, Any]:
        before, console = results.conditions(), workspace.console
        longest = recipe.export.max_length or recipe.data.max_length
        most = min(longest, recipe.data.max_length) - 2
        paths = {name: done.directory / MODEL for name, done in products}
        scored = {name: bench.ServedModel(path, "score") for name, path in paths.items()}
        perplexity: dict[str, dict[str, float]] = {name: {} for name in paths}
        bits: dict[str, dict[str, float]] = {name: {} for name in paths}
        totals: dict[str, np.ndarray] = {}
        for split in ("dev", "test"):
            documents = getattr(text, split)
            if not documents:
                continue
            pieces = pieces_of(documents, codec, most)
            for name, model in scored.items():
                nats, counts = served_scores(model, pieces)
                perplexity[name][split] = math.exp(min(nats.sum() / counts.sum(), 700.0))
                bits[name][split] = nats.sum() / math.log(2) / sum(len(piece.encode()) for piece in pieces)
                if split == "dev":
                    totals[name] = nats / np.maximum(counts, 1)
            console.line(
                f"  {split} perplexity as served: "
                + ", ".join(f"{name} {found[split]:.2f}" for name, found in perplexity.items())
            )
        dev = pieces_of(text.dev, codec, most)
        beginnings = prompts_of(dev, block.prompt_tokens, codec, longest - block.new_tokens - 1)
        prompts = [words for _, words in beginnings]
        served = {name: bench.ServedModel(path, "generate") for name, path in paths.items()}
        candidates: dict[str, Generating] = {name: served_generator(model) for name, model in served.items()}
        candidates[KERAS] = keras_generator(model_of(teacher), codec)
        speed = [
            speed_of(candidates, spread(prompts, batch), block.new_tokens, block.repeats, block.warmup)
            for batch in block.batches
        ]
        for batch, row in zip(block.batches, speed):
            rates = (f"{name} {found['tokens_per_second']:.0f}" for name, found in row.items())
            console.line(f"  batch {batch}, tokens/s: {', '.join(rates)}")
        first, last = next(iter(paths)), next(reversed(paths))
        worst = totals[last] - totals[first]
        shown = sorted(beginnings, key=lambda item: -worst[item[0]])[: block.examples]
        return {
            "conditions": before,
            "perplexity": perplexity,
            "bits_per_byte": bits,
            "speed": [{"batch": batch, "models": row} for batch, row in zip(block.batches, speed)],
            "new_tokens": block.new_tokens,
            "memory_mb": {name: resident(path, {"prompts": [prompts[0]]}) for name, path in paths.items()},
            "examples": [
                {
                    "input": words,
                    "reference": dev[index][len(words) :],
                    "teacher": _completion(candidates[first], words, block.new_tokens),
                    "student": _completion(candidates[last], words, block.new_tokens),
                    "worse_by": float(worst[index]),
                }
                for index, words in shown
            ],
        }

    parameters = {"stages": [name for name, _ in products], **block.model_dump()}
    return workspace.do("benchmark", parameters, [teacher, *(done for _, done in products)], build)


def served_generator(model: bench.ServedModel) -> Generating:
    """Greedy answers of an export's `generate` signature."""

    def call(texts: Sequence[str], count: int) -> tuple[list[str], list[int]]:
        found = model.function(
            prompts=tf.constant(list(texts)),
            max_new_tokens=tf.constant(count),
            stop_strings=tf.constant([], tf.string),
            **_GREEDY,
        )
        return [text.decode() for text in found["completions"].numpy()], found["lengths"].numpy().tolist()

    return call


_GREEDY = {
    "temperature": tf.constant(0.0),
    "top_k": tf.constant(0),
    "top_p": tf.constant(1.0),
    "repetition_penalty": tf.constant(1.0),
    "no_repeat_ngram": tf.constant(0),
    "seed": tf.constant(0),
}


def keras_generator(model: Any, codec: Any) -> Generating:
    """keras-nlp's own `generate`, greedy."""
    model.compile(sampler="greedy")
    start = int(getattr(model.preprocessor.tokenizer, "start_token_id", None) is not None)

    def call(texts: Sequence[str], count: int) -> tuple[list[str], list[int]]:
        longest = max(len(row) for row in codec.encode(tf.constant(list(texts))).to_list()) + start
        whole = model.generate(list(texts), max_length=longest + count)
        answers = [found[len(text) :] for found, text in zip(whole, texts)]
        return answers, [len(row) for row in codec.encode(tf.constant(answers)).to_list()]

    return call


def _completion(candidate: Generating, text: str, count: int) -> str:
    return candidate([text], count)[0][0]


def beginning(text: str, words: int) -> str | None:
    """The first `words` words of a text (of Chinese, characters); None where hardly anything would be left."""
    spaced = " " in text.strip()
    if not spaced:
        return text[:words] if len(text) > words + 1 else None
    at = -1
    for _ in range(words):
        at = text.find(" ", at + 1)
        if at < 0:
            return None
    return text[:at] if len(text) > at + 2 else None


def prompts_of(pieces: Sequence[str], words: int, codec: Any, most: int) -> list[tuple[int, str]]:
    """Numbers of pieces and their first words: as many as asked for, or fewer where these are more than `most` tokens.

    Raises:
        InputError: no piece is that long.
    """
    for count in range(words, 0, -1):
        found = [(index, begun) for index, piece in enumerate(pieces) if (begun := beginning(piece, count))]
        sizes = codec.encode(tf.constant([begun for _, begun in found], tf.string)).row_lengths().numpy()
        if fitting := [item for item, size in zip(found, sizes) if size <= max(most, 1)]:
            return fitting
    raise InputError(f"benchmark.prompt_tokens: expected dev texts of more than {words} words, found none.")


def pieces_of(documents: Sequence[Document], codec: Any, most: int) -> list[str]:
    """The texts of documents as they may be sent: longer ones cut, after a line or a word, to `most` tokens."""
    pieces: list[str] = []
    texts = [document.prompt + document.text for document in documents]
    for at in range(0, len(texts), 512):
        some = texts[at : at + 512]
        sizes = codec.encode(tf.constant(some)).row_lengths().numpy()
        for text, size in zip(some, sizes):
            pieces += [text] if size <= most else _cut(text, codec, most)
    return [piece for piece in pieces if piece.strip()]


def _cut(text: str, codec: Any, most: int) -> list[str]:
    parts = text.splitlines(keepends=True)
    if len(parts) == 1:
        words = text.split(" ")
        parts = [part for part in ([word + " " for word in words[:-1]] + words[-1:]) if part]
    if len(parts) == 1:  # one long word, or text without spaces
        parts = list(text)
    sizes = codec.encode(tf.constant(parts)).row_lengths().numpy()
    pieces, held, room = [], "", 0
    for part, size in zip(parts, sizes):
        if size > most and len(part) > 1:
            pieces += [held, *_cut(part, codec, most)]
            held, room = "", 0
            continue
        if room + size > most:
            pieces.append(held)
            held, room = "", 0
        held, room = held + part, room + int(size)
    return [*pieces, held]


def served_scores(model: bench.ServedModel, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """-log p of each text in nats, and how many of its tokens were predicted, by an export's `score` signature."""
    nats, counts = np.zeros(len(texts)), np.zeros(len(texts), int)
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    for at in range(0, len(order), _AT_ONCE):
        rows = order[at : at + _AT_ONCE]
        found = model({"texts": [texts[row] for row in rows]})
        nats[rows] = -found["total"]
        counts[rows] = np.maximum(found["lengths"] - 1, 0)
    return nats, counts

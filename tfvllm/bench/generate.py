"""`tfvllm bench generate`: tokens per second, time to the first token, time per token, side by side in one run.

Every candidate answers the same prompts greedily with the same number of new tokens. The time to the first token is
that of a call for one new token; the time per token is what the further tokens take, divided by their number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from tfvllm.errors import InputError
from tfvllm.timing import Timing, compare

# A candidate takes (ids int32[batch, longest], lengths int32[batch], new tokens) and returns int32[batch, new tokens].
Candidate = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def prompts(batch: int, shortest: int, longest: int, vocabulary: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random ids int32[batch, longest], padded with 0 on the right, and their lengths between the two."""
    random = np.random.default_rng(seed + batch)
    lengths = random.integers(shortest, longest + 1, batch).astype(np.int32)
    lengths[0] = longest if batch > 1 else (shortest + longest) // 2
    ids = random.integers(1, vocabulary, [batch, lengths.max()]).astype(np.int32)
    return ids * (np.arange(lengths.max()) < lengths[:, None]), lengths


def measure(
    candidates: Mapping[str, Candidate],
    ids: np.ndarray,
    lengths: np.ndarray,
    new_tokens: int,
    *,
    repeats: int = 5,
    warmup: int = 1,
) -> dict[str, dict[str, Any]]:
    """Times all candidates on one batch, taking turns.

    Returns, for each: `tokens_per_second` (new tokens of all rows, from the median), `total_ms`, `first_token_ms` and
    `per_token_ms` (each with median, p95, p99), and `same_tokens` (the share of rows that equal the first candidate's).
    """
    if new_tokens < 2:
        raise InputError(f"expected at least 2 new tokens to tell the first from the others, found {new_tokens}.")
    answers = {name: np.asarray(call(ids, lengths, new_tokens)) for name, call in candidates.items()}
    first = next(iter(answers.values()))
    calls = {}
    for name, call in candidates.items():
        calls[f"{name}, first"] = _bind(call, ids, lengths, 1)
        calls[f"{name}, all"] = _bind(call, ids, lengths, new_tokens)
    timings = compare(calls, repeats=repeats, warmup=warmup)
    found = {}
    for name in candidates:
        whole, head = timings[f"{name}, all"], timings[f"{name}, first"]
        per_token = Timing(
            tuple(max(total - start, 0.0) / (new_tokens - 1) for total, start in zip(whole.samples_ms, head.samples_ms))
        )
        found[name] = {
            "tokens_per_second": len(ids) * new_tokens / whole.median_ms * 1e3,
            "total_ms": _summary(whole),
            "first_token_ms": _summary(head),
            "per_token_ms": _summary(per_token),
            "same_tokens": float(np.mean((answers[name] == first).all(axis=1))),
        }
    return found


def _bind(call: Candidate, ids, lengths, count) -> Callable[[], Any]:
    return lambda: call(ids, lengths, count)


def _summary(timing: Timing) -> dict[str, float]:
    samples = timing.samples_ms
    return {
        "median": float(np.median(samples)),
        "p95": float(np.percentile(samples, 95)),
        "p99": float(np.percentile(samples, 99)),
    }


# Candidates -----------------------------------------------------------------------------------------------------------


def saved_model(directory) -> Candidate:
    """A SavedModel exported with `task="generate"` from a model without a preprocessor (ids in, ids out)."""
    import tensorflow as tf

    from tfvllm.bench.models import ServedModel

    served = ServedModel(directory)
    wanted = {"token_ids", "padding_mask", "max_new_tokens"}
    if set(served.inputs) != wanted:
        raise InputError(
            f"{directory}: expected the inputs {', '.join(sorted(wanted))}, found {', '.join(sorted(served.inputs))}. "
            "Export the model on ids: without its preprocessor."
        )

    def call(ids, lengths, count):
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int32)
        inputs = {
            "token_ids": tf.constant(ids),
            "padding_mask": tf.constant(mask),
            "max_new_tokens": tf.constant(count),
        }
        return served.function(**inputs)["token_ids"].numpy()

    return call


def saved_text_model(directory) -> Callable[[Sequence[str], int], dict[str, np.ndarray]]:
    """The `generate` signature of a text export, greedy: (prompts, new tokens) -> its outputs."""
    import tensorflow as tf

    from tfvllm.bench.models import ServedModel

    served = ServedModel(directory, "generate")
    neutral = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram": 0, "seed": 0}

    def call(texts, count):
        inputs = {name: tf.constant(value) for name, value in neutral.items()}
        inputs |= {"prompts": tf.constant(list(texts)), "max_new_tokens": tf.constant(count)}
        return served({**inputs, "stop_strings": tf.constant([], tf.string)})

    return call


def keras_model(model) -> Candidate:
    """keras-nlp's own generate function, greedy, without end tokens.

    It starts all rows at the shortest prompt and fills every row up to the longest prompt plus the new tokens.
    """
    import tensorflow as tf

    model.compile(sampler="greedy")
    function = model.make_generate_function()

    def call(ids, lengths, count):
        total = int(lengths.max()) + count
        full = np.pad(ids, [[0, 0], [0, total - ids.shape[1]]])
        inputs = {"token_ids": tf.constant(full), "padding_mask": tf.constant(np.arange(total) < lengths[:, None])}
        found = function(inputs, stop_token_ids=None)["token_ids"].numpy()
        return np.stack([row[length : length + count] for row, length in zip(found, lengths)])

    return call


# Command --------------------------------------------------------------------------------------------------------------


@click.command("generate")
@click.argument("model", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--vs", "others", multiple=True, type=click.Path(path_type=Path), help="Another SavedModel; may repeat.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=[1, 8], show_default=True)
@click.option(
    "--prompt", nargs=2, type=click.IntRange(1), default=(16, 64), show_default=True, help="Shortest, longest."
)
@click.option("--new-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option("--vocabulary", type=click.IntRange(2), help="Ids are drawn below this; default from the manifest.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--warmup", type=click.IntRange(0), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the JSON to this file.")
def command(model, others, batches, prompt, new_tokens, vocabulary, repeats, warmup, as_json, out):
    """Tokens per second of DIR, and of the others, generating from random prompts of mixed lengths.

    DIR is a SavedModel of `tfvllm export --task generate`, of text or of ids; all must be of the same kind.
    """
    from tfvllm.quietly import import_tensorflow

    import_tensorflow(without_keras=True)
    from tfvllm.bench import results
    from tfvllm.bench.models import names_of

    if prompt[0] > prompt[1]:
        raise InputError(f"--prompt: expected the shortest first, found {prompt[0]} {prompt[1]}.")
    paths = names_of(model, others)
    vocabulary = vocabulary or _vocabulary(paths)
    candidates = {name: _candidate(path) for name, path in paths.items()}
    rows = []
    for batch in batches:
        ids, lengths = prompts(batch, prompt[0], prompt[1], vocabulary)
        found = measure(candidates, ids, lengths, new_tokens, repeats=repeats, warmup=warmup)
        rows.append({"batch": batch, "prompt": list(prompt), "new_tokens": new_tokens, "models": found})
    if out:
        results.write_json(out, "generate", rows)
    if as_json:
        content = {"what": "generate", "conditions": results.conditions(), "results": rows}
        click.echo(json.dumps(content, ensure_ascii=False))
    else:
        click.echo(table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results of `measure` at several batch sizes as a plain table."""
    from tfvllm.bench import results

    lines = []
    for row in rows:
        first = next(iter(row["models"].values()))["tokens_per_second"]
        for name, entry in row["models"].items():
            lines.append(
                [
                    f"{row['batch']} {name}",
                    f"{entry['tokens_per_second']:.1f}",
                    f"{entry['tokens_per_second'] / first:.2f}",
                    f"{entry['first_token_ms']['median']:.1f}",
                    f"{entry['per_token_ms']['median']:.2f}",
                    f"{entry['per_token_ms']['p95']:.2f}",
                    f"{entry['per_token_ms']['p99']:.2f}",
                    f"{entry['same_tokens']:.0%}",
                ]
            )
    headers = ["batch, candidate", "tokens/s", "ratio", "first ms", "per token ms", "p95", "p99", "same tokens"]
    return results.text_table(headers, lines)


def _candidate(path: Path) -> Candidate:
    from tfvllm.savedmodel import manifest

    if manifest.read(_latest(path)).get("interface") != "text":
        return saved_model(path)
    text_call = saved_text_model(path)

    def call(ids, lengths, count):
        # Words made of the ids, one for each token: texts of mixed lengths, the same for every candidate.
        texts = [" ".join(_WORDS[i % len(_WORDS)] for i in row[:length]) for row, length in zip(ids, lengths)]
        return text_call(texts, count)["token_ids"]

    return call


_WORDS = str.split("the of and to in is was that for on with as by at from his it an were are which this be had")


def _vocabulary(paths: Mapping[str, Path]) -> int:
    from tfvllm.savedmodel import manifest

    known = [manifest.read(_latest(path)).get("vocabulary_size") for path in paths.values()]
    sizes = [size for size in known if size]
    if not sizes:
        raise InputError("no manifest names the vocabulary size: pass --vocabulary.")
    return min(sizes)


def _latest(path: Path) -> Path:
    from tfvllm.bench.models import latest_version

    return latest_version(path)

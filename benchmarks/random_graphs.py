"""Simplifies random graphs on both targets and compares them with their originals.

    python benchmarks/random_graphs.py --graphs 10000 --out benchmarks/results/random_graphs.json

Ten graphs are traced into one function, over shared inputs and weights. The record holds how many graphs were checked,
every failure with the seed that makes it again, how often each rule fired, and the versions.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")  # the processes share the cores
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tensorflow as tf

from tests.graph import random_graphs

GRAPHS_IN_ONE = 10
SIZES = ((None, None), (2, 5), (None, 4), (1, 16), (None, None))


def programs(seed: int) -> list[list[random_graphs.Instruction]]:
    """The programs of one function, always the same for one seed."""
    rng = np.random.default_rng(seed)

    def instruction():
        return int(rng.integers(len(random_graphs.OPERATIONS))), int(rng.integers(3)), int(rng.integers(6))

    return [[instruction() for _ in range(rng.integers(1, 8))] for _ in range(GRAPHS_IN_ONE)]


def prepare() -> None:
    """TensorFlow's own optimizer takes most of the time, and it is not what is tested here."""
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


def run(seed: int) -> dict[str, Any]:
    """Checks the function of one seed."""
    cpu, size = time.process_time(), SIZES[seed % len(SIZES)]
    result: dict[str, Any] = {"seed": seed, "size": size, "fired": {}, "reference": "none", "failures": []}
    try:
        outcome = random_graphs.check(programs(seed), *size, seed=seed)
    except Exception as error:
        result["failures"] = [f"{type(error).__name__}: {error}"[:500]]
    else:
        result.update(fired=outcome.fired, reference=outcome.reference, failures=outcome.failures)
    return {**result, "cpu_seconds": time.process_time() - cpu}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--graphs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    fired: Counter = Counter()
    failures: list[dict] = []
    started, cpu = time.perf_counter(), 0.0
    functions = -(-arguments.graphs // GRAPHS_IN_ONE)
    references: Counter = Counter()
    with multiprocessing.get_context("spawn").Pool(arguments.processes, prepare) as pool:
        seeds = range(arguments.seed, arguments.seed + functions)
        for number, result in enumerate(pool.imap_unordered(run, seeds, chunksize=10), 1):
            cpu += result["cpu_seconds"]
            fired.update(result["fired"])
            references[result["reference"]] += 1
            if result["failures"]:
                failures.append({k: result[k] for k in ("seed", "size", "failures")})
                print(failures[-1], flush=True)
            if number % 50 == 0:
                print(f"{number * GRAPHS_IN_ONE} graphs, {len(failures)} functions failed", flush=True)
    record = {
        "graphs": functions * GRAPHS_IN_ONE,
        "functions": functions,
        "targets": ["portable", "onednn"],
        "failed_functions": sorted(failures, key=lambda f: f["seed"]),
        "references": dict(references),
        "rules_fired": dict(fired.most_common()),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(cpu, 1),
        "tensorflow": tf.__version__,
        "python": platform.python_version(),
    }
    text = json.dumps(record, indent=2) + "\n"
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

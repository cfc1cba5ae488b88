"""Weights kept packed against weights packed anew at every call: products of oneDNN, by number of rows and by type.

    python benchmarks/packed.py

Six pairs of products, width -> 4 · width -> width with a bias, at width 768 and 384; each pair has weights of its own,
in variables. The numbers of rows come in both orders, each in a process of its own: a kernel keeps the layout of its
first call. "kept" is what `PrepackWeights` (bfloat16) emits, and `PrepackWeightsSmallBatch` (float32) for 8 to 32 rows.
"float32, any rows" shows why that one has a comparison in front: what does not come first may be slower than before.
Writes benchmarks/results/packed.json and .txt.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROWS = (1, 8, 16, 32, 40, 64, 128, 1024)
SERIES = {"bfloat16": ROWS, "float32": (8, 16, 32, 40), "float32, any rows": ROWS}
PAIRS = 6


def measure(width: int, kind: str, rows: list[int]) -> list[dict[str, Any]]:
    """Milliseconds for all pairs, both ways taking turns, in the order of `rows`."""
    import numpy as np
    import tensorflow as tf

    from tfvllm.generation.kernels import internal_op
    from tfvllm.timing import compare

    tf.config.threading.set_intra_op_parallelism_threads(2)
    dtype, rng = tf.as_dtype(kind), np.random.default_rng(0)

    def variable(*shape: int) -> tf.Variable:
        return tf.Variable(tf.cast(rng.normal(0, 0.03, shape), dtype))

    sizes = [(width, 4 * width), (4 * width, width)] * PAIRS
    weights = {way: [(variable(*size), variable(size[1])) for size in sizes] for way in ("anew", "kept")}
    common: dict[str, Any] = {"transpose_a": False, "transpose_b": False, "fused_ops": ["BiasAdd"], "num_args": 1}
    ways = {
        "anew": ("_FusedMatMul", common),
        "kept": ("_MklNativeFusedMatMul", {**common, "is_filter_const": True, "_kernel": "MklNameChangeOp"}),
    }

    def chain(way: str) -> Any:
        op, attributes = ways[way]

        @tf.function(input_signature=[tf.TensorSpec([None, width], dtype)], autograph=False)
        def run(x: tf.Tensor) -> tf.Tensor:
            for w, b in weights[way]:
                x = internal_op(op, [x, w, b], attributes)
            return tf.cast(x, tf.float32)

        return run

    functions = {way: chain(way) for way in ways}
    found = []
    for count in rows:
        x = tf.cast(rng.normal(size=(count, width)), dtype)
        calls = {way: (lambda f=function, x=x: f(x).numpy()) for way, function in functions.items()}
        timings = compare(calls, repeats=10 if count > 500 else 30)
        medians = {way: round(timing.median_ms, 3) for way, timing in timings.items()}
        found.append({"rows": count, **medians, "times": round(medians["anew"] / medians["kept"], 2)})
    return found


def main() -> None:
    from tfvllm.bench.results import text_table, write_json

    results = []
    for kind, counts in SERIES.items():
        for width in (768, 384):
            orders = []
            for rows in (counts, counts[::-1]):
                call = [sys.executable, __file__, str(width), kind.split(",")[0], *map(str, rows)]
                told = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout
                orders.append({row["rows"]: row for row in json.loads(told.splitlines()[-1])})
            results += [
                {"type": kind, "width": width, "rows": n, "few first": orders[0][n], "many first": orders[1][n]}
                for n in counts
            ]
    shown = text_table(
        ["products", "rows", "packed anew ms", "kept ms", "times", "times, many rows first"],
        [
            (
                f"{r['type']}, {r['width']}",
                r["rows"],
                f"{r['few first']['anew']:.2f}",
                f"{r['few first']['kept']:.2f}",
                f"{r['few first']['times']:.2f}",
                f"{r['many first']['times']:.2f}",
            )
            for r in results
        ],
    )
    print(shown)
    out = Path(__file__).parent / "results" / "packed"
    write_json(out.with_suffix(".json"), "weights kept packed against packed at every call", results)
    out.with_suffix(".txt").write_text(shown + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]), sys.argv[2], [int(n) for n in sys.argv[3:]])))
    else:
        main()

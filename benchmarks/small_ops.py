"""What some ops of oneDNN cost where there is little to compute: TensorFlow prepares their kernel at every call.

    python benchmarks/small_ops.py        needs a TensorFlow with oneDNN on

Each op against what the rule of the simplifier takes in its place for few elements: `_MklLayerNorm` (norm_by_rows.py),
`QuantizeV2` (quantize_few.py), `Transpose` of float32 (integer_transposes.py). A graph holds 20 of them, each with an
input of its own, one after the other; both graphs take turns. Microseconds are those of a graph, by 20.
Writes benchmarks/results/small_ops.json and .txt.
"""

import os
from pathlib import Path
from typing import Any

from tfvllm.graph import executable, probes

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from tfvllm.bench.results import conditions, text_table, write_json
from tfvllm.graph.builder import Builder
from tfvllm.graph.ir import Graph, Value
from tfvllm.rules import unfuse_small_layer_norm, unfuse_small_quantize
from tfvllm.timing import compare

RESULTS = Path(__file__).parent / "results"
COUNT, WIDTH, HEADS = 20, 384, 12
ROWS = (1, 16, 64, 128, 256, 1024)


def layer_norm(b: Builder, x: Value, public: bool, _: int) -> Value:
    gamma, beta = (b.const(np.full(WIDTH, value), tf.float32) for value in (1.5, 0.5))
    fused = b.op("_MklLayerNorm", [x, gamma, beta], epsilon=1e-12)[0]
    return unfuse_small_layer_norm.plain(b, fused.node) if public else fused


def quantise(b: Builder, x: Value, public: bool, i: int) -> Value:
    ends = [b.const(end, tf.float32) for end in (-4.0 - i / 64, 4.0)]
    bytes_ = b.op("QuantizeV2", [x, *ends], T=tf.quint8, mode="MIN_FIRST", ensure_minimum_range=0.0)[0]
    return unfuse_small_quantize.plain(b, bytes_.node, x) if public else bytes_


def transpose(b: Builder, x: Value, public: bool, _: int) -> Value:
    x = b.reshape(x, [1, -1, HEADS, WIDTH // HEADS])
    order = b.ints(0, 2, 1, 3)
    if not public:
        return b.Transpose(x, order)
    return b.Bitcast(b.Transpose(b.Bitcast(x, type=tf.int32), order), type=tf.float32)


OPS = {"_MklLayerNorm": layer_norm, "QuantizeV2": quantise, "Transpose float32": transpose}


def runner(make: Any, rows: int, public: bool) -> Any:
    graph = Graph("small")
    b = Builder(graph, "small")
    for i in range(COUNT):
        node = graph.add(f"x{i}", "Placeholder", [], {"dtype": tf.float32, "shape": [rows, WIDTH]})
        node.output.shape = (rows, WIDTH)
        graph.inputs[node.name] = node.output
    graph.outputs = {f"y{i}": make(b, x, public, i) for i, x in enumerate(list(graph.inputs.values()))}
    spec = tf.TensorSpec([rows, WIDTH], tf.float32)
    function = executable.to_concrete(graph, ((spec,) * COUNT, {}), pack=list)
    rng = np.random.default_rng(0)
    inputs = [tf.constant(rng.normal(size=(rows, WIDTH)), tf.float32) for _ in range(COUNT)]
    return lambda: function(*inputs)


def main() -> None:
    tf.config.threading.set_inter_op_parallelism_threads(1)
    probes.check_runs("onednn")
    rows, cells = [], []
    for name, make in OPS.items():
        for count in ROWS:
            runs = {way: runner(make, count, way == "public") for way in ("onednn", "public")}
            first, second = (np.asarray(tf.cast(run()[0], tf.float32)) for run in runs.values())
            assert np.abs(first - second).max() <= (1.0 if name == "QuantizeV2" else 1e-4), name
            times = compare(runs, repeats=40)
            found = {way: round(1000 * timing.median_ms / COUNT, 1) for way, timing in times.items()}
            rows.append({"op": name, "rows": count, "width": WIDTH, "microseconds": found})
            cells.append([name, f"{count} x {WIDTH}", *(f"{found[way]:.0f}" for way in runs)])
            print(cells[-1], flush=True)
    table = text_table(["op", "size", "oneDNN, us", "in its place, us"], cells)
    print(table)
    where = conditions()
    write_json(RESULTS / "small_ops.json", "ops of oneDNN on little data", rows)
    (RESULTS / "small_ops.txt").write_text(f"{where['date']}, commit {where['commit']}\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Why masks alone do not make serving faster: TensorFlow's sparse product against its dense one.

    python benchmarks/sparse.py

x @ W for 256 tokens, float32, W with a share of zeros, as a dense matrix and as a SparseTensor, taking turns.
Writes benchmarks/results/sparse.json and .txt; "times dense" below 1 is slower than dense.
"""

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from tfvllm.bench.results import text_table, write_json
from tfvllm.timing import compare

RESULTS = Path(__file__).parent / "results"
TOKENS = 256
SHAPES = ((384, 1536), (768, 3072))
ZEROS = (0.5, 0.75, 0.9, 0.95, 0.99)


def main() -> None:
    rows, results = [], []
    rng = np.random.default_rng(0)
    for k, n in SHAPES:
        x = tf.constant(rng.normal(size=(TOKENS, k)).astype(np.float32))
        for zeros in ZEROS:
            w = rng.normal(size=(k, n)).astype(np.float32)
            w[rng.random((k, n)) < zeros] = 0
            dense, sparse = tf.constant(w), tf.sparse.from_dense(w.T)

            # Weights are arguments, as a SavedModel's variables are: no kernel may prepare them beforehand.
            @tf.function
            def multiply(x, w):
                return tf.matmul(x, w)

            @tf.function
            def multiply_sparse(x, w):
                return tf.sparse.sparse_dense_matmul(w, x, adjoint_b=True)

            np.testing.assert_allclose(multiply(x, dense), tf.transpose(multiply_sparse(x, sparse)), atol=1e-2)
            calls = {"dense": lambda: multiply(x, dense), "sparse": lambda: multiply_sparse(x, sparse)}  # noqa: B023
            timings = compare(calls, repeats=40, warmup=5)
            ratio = timings["sparse"].ratio(timings["dense"])
            times = (f"{timings[name].median_ms:.2f}" for name in ("dense", "sparse"))
            rows.append((f"{k} x {n}, {zeros:.0%} zeros", *times, f"{ratio:.2f}"))
            results.append(
                {"shape": [k, n], "zeros": zeros, **{name: t.to_dict() for name, t in timings.items()},
                 "times_dense": round(ratio, 3)}
            )  # fmt: skip
    table = text_table((f"{TOKENS} tokens @ W", "dense ms", "sparse ms", "times dense"), rows)
    print(table)
    write_json(RESULTS / "sparse.json", "TensorFlow's sparse product against its dense one", results)
    (RESULTS / "sparse.txt").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

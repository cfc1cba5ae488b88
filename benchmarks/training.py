"""A training step of a keras-nlp encoder: as Keras traces it, with `einsum_as_matmul`, and with the compiled AdamW too.

    python benchmarks/training.py

The shape of MiniLM-L6 (6 x 384) with a vocabulary of 30,522, random weights, dropout 0.1, float32, sequence
classification with AdamW. Every way has a model of its own with the same weights; they take turns. oneDNN is
TensorFlow's choice and depends on the CPU, so each shape is measured with and without it, each in a process of its own.
Writes benchmarks/results/training.json and .txt.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SHAPES = ((64, 16), (32, 64))
REPEATS = 7
RESULTS = Path(__file__).parent / "results"


def measure(batch: int, length: int) -> dict[str, Any]:
    """Median milliseconds of a step by each way, and the loss after all steps."""
    import keras
    import keras_nlp
    import numpy as np

    from tfvllm.compress.optimizer import adamw
    from tfvllm.families.matmuls import einsum_as_matmul
    from tfvllm.timing import compare

    rng = np.random.default_rng(0)
    x = {
        "token_ids": rng.integers(1, 30522, (batch, length)).astype("int32"),
        "segment_ids": np.zeros((batch, length), "int32"),
        "padding_mask": np.ones((batch, length), "int32"),
    }
    y = rng.integers(0, 2, batch).astype("int32")
    runs, losses = {}, {}

    def way(name: str, flat: bool, compiled: bool) -> None:
        keras.utils.set_random_seed(0)
        model = keras_nlp.models.BertTextClassifier(
            keras_nlp.models.BertBackbone(30522, 6, 12, 384, 1536, dropout=0.1, max_sequence_length=512), 2, dropout=0.1
        )
        optimizer = adamw(1e-5, 1000, 0.1, 0.01)
        if not compiled:
            optimizer = keras.optimizers.AdamW.from_config(optimizer.get_config())
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss=loss, jit_compile=False)
        optimizer.build(model.trainable_variables)

        def step() -> None:
            with einsum_as_matmul(model) if flat else contextlib.nullcontext():  # the first step is traced
                losses[name] = float(np.ravel(keras.Model.train_on_batch(model, x, y))[0])

        runs[name] = step

    way("Keras", False, False)
    way("flat products", True, False)
    way("flat products, compiled update", True, True)
    times = compare(runs, repeats=REPEATS)
    return {"ms": {name: timing.median_ms for name, timing in times.items()}, "loss": losses}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))))
        return
    from tfvllm.bench.results import text_table, write_json

    rows, cells = [], []
    for onednn in (False, True):
        for shape in SHAPES:
            told = subprocess.run(
                [sys.executable, __file__, *map(str, shape)],
                env=os.environ | {"TF_ENABLE_ONEDNN_OPTS": str(int(onednn))},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            row = {"onednn": onednn, "batch": shape[0], "length": shape[1], **json.loads(told.splitlines()[-1])}
            rows.append(row)
            base = row["ms"]["Keras"]
            for name, ms in row["ms"].items():
                cells.append(["on" if onednn else "off", str(shape), name, f"{ms:.0f}", f"{base / ms:.2f}"])
                print(cells[-1], flush=True)
    table = text_table(["oneDNN", "batch, length", "way", "ms a step", "times faster"], cells)
    print(table)
    write_json(RESULTS / "training.json", "a training step of a 6 x 384 encoder", rows)
    (RESULTS / "training.txt").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

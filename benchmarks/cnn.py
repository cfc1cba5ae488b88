"""Image classifiers at batch 1: the Keras export against tfvllm, the same weights, taking turns.

    python benchmarks/cnn.py                       ResNet50 and MobileNetV3 (large), 224 x 224, random weights
    python benchmarks/cnn.py --models resnet50

Writes benchmarks/results/cnn-<model>.json and .txt. Every candidate has a process of its own, with two threads, and
works while the others wait.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from encoder import Candidate, alone, tensorflow_runner

RESULTS = Path(__file__).parent / "results"
MODELS = {"resnet50": "ResNet50", "mobilenet_v3": "MobileNetV3Large"}
BASE = "Keras export"


def make_models(name: str, folder: str) -> None:
    """In a process of its own: the Keras export and the simplified models."""
    import keras

    import tfvllm

    keras.utils.set_random_seed(1)
    model = getattr(keras.applications, MODELS[name])(weights=None, input_shape=(224, 224, 3))
    rng = np.random.default_rng(0)
    for variable in model.variables:  # statistics and gains as training leaves them, not 0 and 1
        if "moving_mean" in variable.path or "beta" in variable.path:
            variable.assign(rng.normal(0, 0.1, variable.shape))
        if "moving_variance" in variable.path or "gamma" in variable.path:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    model.export(f"{folder}/keras", verbose=False)
    rows = [{model.inputs[0].name: rng.normal(size=(1, 224, 224, 3)).astype(np.float32)}]
    for target in ("portable", "onednn"):
        tfvllm.simplify_saved_model(
            f"{folder}/keras", f"{folder}/{target}", target=target, signature="serving_default", calibration=rows
        )
    np.savez(f"{folder}/inputs.npz", **rows[0])


def measure(name: str, repeats: int) -> None:
    from tfvllm.bench.results import text_table, write_json
    from tfvllm.timing import Timing

    folder = tempfile.mkdtemp()
    try:
        alone(make_models, name, folder)
        inputs = dict(np.load(f"{folder}/inputs.npz"))
        folders = {BASE: "keras", "tfvllm portable": "portable", "tfvllm onednn": "onednn"}
        candidates = {label: Candidate(tensorflow_runner, f"{folder}/{d}") for label, d in folders.items()}
        found = {label: candidate.ask(inputs) for label, candidate in candidates.items()}
        samples: dict[str, list[float]] = {label: [] for label in candidates}
        labels = list(candidates)
        for turn in range(-3, repeats):
            shift = turn % len(labels)
            for label in labels[shift:] + labels[:shift]:
                milliseconds = candidates[label].ask("run")
                if turn >= 0:
                    samples[label].append(milliseconds)
        timings = {label: Timing(tuple(values)) for label, values in samples.items()}
        rows, results = [], []
        for label, timing in timings.items():
            error = float(np.abs(found[label] - found[BASE]).max() / np.abs(found[BASE]).max())
            ratio = timing.ratio(timings[BASE])
            rows.append((label, f"{timing.median_ms:.2f}", f"{timing.p95_ms:.2f}", f"{ratio:.2f}", f"{error:.1e}"))
            results.append(
                {"candidate": label, **timing.to_dict(), "times_keras_export": round(ratio, 3),
                 "relative_difference": error}
            )  # fmt: skip
        headers = (MODELS[name], "median ms", "p95 ms", "x Keras export", "relative difference")
        table = text_table(headers, rows)
        print(table, flush=True)
        RESULTS.mkdir(exist_ok=True)
        write_json(RESULTS / f"cnn-{name}.json", f"cnn {name}, batch 1", results)
        (RESULTS / f"cnn-{name}.txt").write_text(table + "\n", encoding="utf-8")
    finally:
        for child in multiprocessing.active_children():
            child.terminate()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=60)
    options = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    for name in options.models:
        measure(name, options.repeats)


if __name__ == "__main__":
    main()

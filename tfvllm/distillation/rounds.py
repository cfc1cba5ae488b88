"""Train, compare, train where student and teacher differ most; stop when it stops paying."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.distillation.cache import TeacherCache
from tfvllm.distillation.comparison import Comparison, Difference, compare, side_by_side
from tfvllm.distillation.distiller import Distiller
from tfvllm.distillation.inputs import as_arrays, rows_of
from tfvllm.errors import InputError
from tfvllm.files import new_file, write_text


@dataclass
class Round:
    """One round: what the student had seen, and how it then stood on the dev data.

    Attributes:
        number: from 0 (before any training).
        dev: student against teacher on the dev data.
        hard_share: how much more often than at random the hardest tenth of the examples was drawn for this round.
        seconds: wall time of training and comparing.
    """

    number: int
    dev: Comparison
    hard_share: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {"round": self.number, **self.dev.to_dict(), "hard_share": self.hard_share, "seconds": self.seconds}


@dataclass
class Rounds:
    """All rounds, the best one (whose weights the student has), and why it ended."""

    rounds: list[Round] = field(default_factory=list)
    best: int = 0
    stopped: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"best": self.best, "stopped": self.stopped, "rounds": [r.to_dict() for r in self.rounds]}


def iterate(
    distiller: Distiller,
    train: tuple[Any, ...],
    dev: tuple[Any, ...],
    *,
    rounds: int = 5,
    epochs: int = 1,
    batch_size: int = 32,
    focus: float = 0.5,
    min_gain: float = 0.01,
    patience: int = 1,
    worst: int = 20,
    seed: int = 0,
    callbacks: Sequence[Any] = (),
    report: str | os.PathLike | None = None,
    backup: str | os.PathLike | None = None,
    verbose: int = 1,
) -> Rounds:
    """Distils in rounds; each trains more on the examples where student and teacher differ most.

    Every round draws as many examples as there are, with replacement: a share `focus` of the draws in proportion to
    KL(teacher ‖ student) of the example, the others evenly. Before round 1 all examples are drawn once. At the end the
    student has the weights of the round with the smallest divergence on the dev data.

    Args:
        distiller: compiled, with one teacher.
        train: (x,), (x, y) or (x, y, sample_weight) of raw strings or arrays.
        dev: the same, never trained on. Comparing counts every real position, whatever its weight.
        rounds: at most.
        epochs: over the drawn examples, in each round.
        batch_size: of training and comparing.
        focus: share in [0, 1]; 0 draws evenly.
        min_gain: a round pays if it lowers the best divergence on the dev data by this share of it.
        patience: how many rounds in a row may fail to pay.
        worst: how many dev examples each round lists.
        seed: of the draws.
        callbacks: for every `fit`.
        report: a JSON file written after every round.
        backup: a folder for the state after every round: the same call, interrupted and made again, goes on from
            there (weights, optimizer, dropout, draws).
        verbose: of `fit`.
    Returns:
        The rounds, the first being the student before any training.
    Raises:
        InputError: several teachers, a cache, data that are not arrays, or the backup of another call.

    Example:
        >>> distiller = tfvllm.Distiller(tiny_net(), tiny_net())
        >>> distiller.compile("adam", loss="sparse_categorical_crossentropy")
        >>> rounds = tfvllm.distillation.iterate(distiller, (points, kinds), (points, kinds), rounds=1, verbose=0)
        >>> [entry.number for entry in rounds.rounds]
        [0, 1]
    """
    teacher = distiller.teacher
    if teacher is None or isinstance(teacher, (TeacherCache, Mapping)):
        raise InputError(
            "iterate compares the student with one teacher; expected a Distiller with a keras.Model as teacher."
        )
    if any(isinstance(part, tf.data.Dataset) for part in (train, dev, *train[:1], *dev[:1])):
        raise InputError(
            "iterate draws examples anew in each round; expected (x, y) of arrays or strings, found a dataset."
        )
    if not 0.0 <= focus <= 1.0:
        raise InputError(f"focus must be between 0 and 1, found {focus}.")
    count = rows_of(train[0])
    settings = {"examples": count, "epochs": epochs, "batch_size": batch_size, "focus": focus, "seed": seed}
    saved = _Backup(Path(backup), settings) if backup is not None else None
    rng = np.random.default_rng(seed)
    both = side_by_side(teacher, distiller.student, distiller.mask, distiller.from_logits)
    options: dict[str, Any] = {"batch_size": batch_size, "both": both}
    started = time.perf_counter()
    done = Rounds()

    def settle(number: int, hard_share: float) -> Round:
        found = compare(teacher, distiller.student, *dev[:2], worst=worst, **options)
        done.rounds.append(Round(number, found, hard_share, time.perf_counter() - started))
        return done.rounds[-1]

    state = saved.read(distiller) if saved is not None else None
    if state is None:
        best = settle(0, 1.0).dev.divergence
        kept = distiller.get_weights()
        drawn, hard_share, idle = rng.permutation(count), 1.0, 0
    else:
        done, kept, drawn, hard_share, idle = state.done, state.kept, state.drawn, state.hard_share, state.idle
        best = done.rounds[done.best].dev.divergence
        rng.bit_generator.state = state.rng
        if idle < patience and len(done.rounds) <= rounds:
            done.stopped = ""  # it had only come to the end of the rounds it was given
    for number in range(len(done.rounds), rounds + 1):
        if done.stopped:
            break
        started = time.perf_counter()
        distiller.fit(
            _shuffled(tuple(_take(part, drawn) for part in train), batch_size, seed + number),
            epochs=epochs,
            callbacks=list(callbacks),
            verbose=verbose,
        )
        now = settle(number, hard_share).dev.divergence
        pays = now <= best * (1.0 - min_gain)
        idle = 0 if pays else idle + 1
        if now < best:
            best, done.best, kept = now, number, distiller.get_weights()
        if idle >= patience:
            done.stopped = f"{idle} rounds in a row lowered the divergence by less than {min_gain:.1%}"
        elif number == rounds:
            done.stopped = f"all {rounds} rounds done"
        if report is not None:
            write_text(report, json.dumps(done.to_dict(), indent=1, ensure_ascii=False) + "\n")
        if not done.stopped or saved is not None:
            found = compare(teacher, distiller.student, train[0], worst=0, **options).divergences
            chances = _chances(found, focus)
            drawn = rng.choice(count, count, p=chances)
            hardest = np.argsort(-found, kind="stable")[: max(1, count // 10)]
            hard_share = float(chances[hardest].mean() * count)
        if saved is not None:
            saved.write(distiller, _State(done, kept, drawn, hard_share, idle, rng.bit_generator.state))
    distiller.set_weights(kept)
    return done


@dataclass
class _State:
    """What the next round needs."""

    done: Rounds
    kept: list[np.ndarray]  # the distiller's weights after the best round
    drawn: np.ndarray
    hard_share: float
    idle: int
    rng: Mapping[str, Any]


@dataclass
class _Backup:
    """A `_State` with the distiller's weights and optimizer, in one file."""

    folder: Path
    settings: dict[str, Any]

    @property
    def file(self) -> Path:
        return self.folder / "rounds.npz"

    def write(self, distiller: Distiller, state: _State) -> None:
        told = {
            "settings": self.settings,
            "rounds": state.done.to_dict(),
            "hard_share": state.hard_share,
            "idle": state.idle,
            "rng": state.rng,
        }
        arrays: dict[str, Any] = {"drawn": state.drawn, "told": np.frombuffer(json.dumps(told).encode(), np.uint8)}
        for name, values in self._lists(distiller, state.kept).items():
            arrays |= {f"{name}/{i}": value for i, value in enumerate(values)}
        arrays |= {f"dev/{i}": entry.dev.divergences for i, entry in enumerate(state.done.rounds)}
        with new_file(self.file) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)

    def read(self, distiller: Distiller) -> _State | None:
        """The state, after the distiller has got its weights and optimizer back; None where there is none yet."""
        if not self.file.exists():
            return None
        with np.load(self.file) as arrays:
            told = json.loads(arrays["told"].tobytes())
            if told["settings"] != self.settings:
                raise InputError(
                    f"backup: {self.file} is of a call with {told['settings']}, this one has {self.settings}. "
                    "Call with the same settings, or give another folder."
                )
            distiller._build_optimizer()
            wanted = {name: len(values) for name, values in self._lists(distiller, distiller.get_weights()).items()}
            found = {
                name: [arrays[f"{name}/{i}"] for i in range(n) if f"{name}/{i}" in arrays] for name, n in wanted.items()
            }
            if {name: len(values) for name, values in found.items()} != wanted:
                raise InputError(f"backup: {self.file} is of another student or optimizer. Give another folder.")
            rounds = [
                Round(
                    entry["round"],
                    Comparison(
                        agreement=entry["agreement"],
                        divergence=entry["divergence"],
                        teacher_accuracy=entry["teacher_accuracy"],
                        student_accuracy=entry["student_accuracy"],
                        worst=[Difference(**difference) for difference in entry["worst"]],
                        divergences=arrays[f"dev/{i}"],
                    ),
                    entry["hard_share"],
                    entry["seconds"],
                )
                for i, entry in enumerate(told["rounds"]["rounds"])
            ]
            drawn = arrays["drawn"]
        distiller.set_weights(found["now"])
        for name, variables in (("optimizer", distiller.optimizer.variables), ("dropout", _dropout(distiller))):
            for variable, value in zip(variables, found[name]):
                variable.assign(value)
        done = Rounds(rounds, told["rounds"]["best"], told["rounds"]["stopped"])
        return _State(done, found["best"], drawn, told["hard_share"], told["idle"], told["rng"])

    @staticmethod
    def _lists(distiller: Distiller, kept: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
        optimizer = [variable.numpy() for variable in distiller.optimizer.variables]
        drawn = [variable.numpy() for variable in _dropout(distiller)]
        return {"now": distiller.get_weights(), "best": kept, "optimizer": optimizer, "dropout": drawn}


def _dropout(distiller: Distiller) -> list[Any]:
    """What dropout draws from; Keras does not count it among the weights."""
    return [variable for variable in distiller.variables if variable.path.endswith("seed_generator_state")]


def _chances(divergences: np.ndarray, focus: float) -> np.ndarray:
    """The chance of each example to be drawn, float64 [examples], adding up to 1."""
    even = np.full(len(divergences), 1.0 / len(divergences))
    total = float(divergences.astype(np.float64).sum())
    if total <= 0.0:
        return even
    mixed = (1.0 - focus) * even + focus * divergences.astype(np.float64).clip(0.0) / total
    return mixed / mixed.sum()


def _shuffled(parts: tuple[Any, ...], batch_size: int, seed: int) -> tf.data.Dataset:
    """Batches of (x, y, sample_weight), in another order every epoch, which `seed` alone decides."""
    while parts[-1] is None:
        parts = parts[:-1]
    arrays = tf.nest.map_structure(lambda leaf: None if leaf is None else tf.convert_to_tensor(leaf), parts)
    count = rows_of(parts[0])
    rows = tf.data.Dataset.range(count).shuffle(count, seed=seed).batch(batch_size)

    def batch(at: tf.Tensor) -> tuple[Any, ...]:
        return tf.nest.map_structure(lambda leaf: None if leaf is None else tf.gather(leaf, at), arrays)

    return rows.map(batch, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def _take(part: Any, at: np.ndarray) -> Any:
    """Rows of arrays, however nested; strings stay Python's."""
    if part is None:
        return None
    return tf.nest.map_structure(lambda leaf: _rows(leaf, at), as_arrays(part))


def _rows(leaf: Any, at: np.ndarray) -> np.ndarray:
    leaf = np.asarray(leaf)
    return (leaf.astype(object) if leaf.dtype.kind == "U" else leaf)[at]

"""A teacher's outputs, computed once and read again at every epoch.

A cache is a folder: TFRecord shards with the largest logits of each example (or position), and the mass of all others,
in the order of the data; `cache.json` says which teacher and which data they belong to.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.distillation.answers import Heads, logits_of
from tfvllm.distillation.inputs import has_strings, select, takes_strings
from tfvllm.distillation.teacher_logits import NONE, TopLogits
from tfvllm.errors import InputError
from tfvllm.families.heads import Head, Kind
from tfvllm.families.matmuls import einsum_as_matmul
from tfvllm.files import digest, new_file, write_text

_FORMAT = 1
_INPUTS = "tfvllm_inputs"  # where inputs that are a single tensor are kept, beside what the cache adds
_CHECKED = 64  # examples compared at once, before any training; the others are compared as they are read


class TeacherCache:
    """A finished cache, to be used in place of the teacher: `tfvllm.Distiller(cache, student).fit(cache.join(data))`.

    Args:
        path: a folder that `write_teacher_cache` finished.
    Raises:
        InputError: there is none, or it is not finished.

    Example:
        >>> data = tf.data.Dataset.from_tensor_slices((points, kinds)).batch(8)
        >>> written = tfvllm.distillation.write_teacher_cache(tiny_net(), data, folder / "answers")
        >>> cache = tfvllm.distillation.TeacherCache(folder / "answers")
        >>> distiller = tfvllm.Distiller(cache, tiny_net())
        >>> distiller.compile("adam", loss="sparse_categorical_crossentropy")
        >>> sorted(distiller.fit(cache.join(data), verbose=0).history)
        ['logits_loss', 'loss', 'task_loss']
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            told = json.loads((self.path / "cache.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            state = "is not finished" if (self.path / "plan.json").exists() else "is no teacher cache"
            raise InputError(
                f"{self.path} {state}. Run tfvllm.distillation.write_teacher_cache(teacher, data, {str(self.path)!r})."
            ) from None
        if told["format"] != _FORMAT:
            raise InputError(f"{self.path} has cache format {told['format']}, expected {_FORMAT}. Write it again.")
        self.teacher: str = told["teacher"]
        self.inputs: list[str] | None = told["inputs"]
        self.temperatures: tuple[float, ...] = tuple(told["temperatures"])
        self.classes: int = told["classes"]
        self.top_k: int = told["top_k"]
        self.rank: int = told["rank"]
        self.kind: Kind = told.get("kind", "logits")
        self.examples: int = told["examples"]
        self.data: str = told["data"]
        self.shards = [self.path / _shard(index) for index in range(told["shards"])]
        self.name = f"cache_{self.teacher[:8]}"

    def check_teacher(self, teacher: keras.Model) -> None:
        """Refuses a cache that another teacher wrote, or this one before it was trained further."""
        found = model_digest(teacher)
        if found != self.teacher:
            raise InputError(
                f"stale teacher cache: {self.path} was written by a teacher with digest {self.teacher}, this one has "
                f"{found} (other weights, or another model). Write it again, or use the teacher it was written by."
            )

    def join(
        self, data: tf.data.Dataset, *, batch_size: int | None = None, shuffle: int = 0, seed: int | None = None
    ) -> tf.data.Dataset:
        """`data` with the teacher's outputs among the inputs, for `Distiller.fit` and `evaluate`.

        Args:
            data: the batches the cache was written for (or the first of them), in the same order, with examples of one
                shape: shuffle here, not before.
            batch_size: of the result; the default is that of `data`.
            shuffle: size of the shuffle buffer in examples; 0 keeps the order.
            seed: of the shuffle.
        Raises:
            InputError: the data are not those the cache was written for. What differs after the first examples is found
                while reading and raised as `tf.errors.InvalidArgumentError`.
        """
        size = batch_size or _batch_size(data)
        rows = _rows(data)
        parse = self._parse
        stored = tf.data.TFRecordDataset([str(shard) for shard in self.shards]).map(parse, tf.data.AUTOTUNE)
        self._check_start(rows, stored)
        past = tf.data.Dataset.from_tensors(self._nothing()).repeat()  # data beyond the cache meet a key of none
        inputs, path = self.inputs, str(self.path)

        def together(row: Any, entry: dict[str, tf.Tensor]) -> Any:
            x, *rest = row
            same = tf.equal(_key(x, inputs), entry["key"])
            message = (
                f"stale teacher cache: an example of the data is not the one in {path} at its place. Write it again."
            )
            with tf.control_dependencies([tf.debugging.Assert(same, [message])]):
                kept = dict(x) if isinstance(x, Mapping) else {_INPUTS: x}
                kept.update({self._entry(part): tf.identity(entry[part]) for part in ("ids", "logits", "log_tails")})
            return (kept, *rest)

        joined = tf.data.Dataset.zip(rows, stored.concatenate(past)).map(together, tf.data.AUTOTUNE)
        if shuffle:
            joined = joined.shuffle(shuffle, seed=seed)
        return joined.batch(size, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)

    def outputs(self, x: Any) -> TopLogits:
        """The teacher's logits for a batch that `join` made."""
        if not isinstance(x, Mapping) or self._entry("ids") not in x:
            raise InputError(
                f"the teacher is the cache {self.path}, but the batch has no entries of it. Pass cache.join(data), not "
                "data, to fit and as validation_data (which may have a cache of its own, by the same teacher)."
            )
        ids, logits, log_tails = (x[self._entry(part)] for part in ("ids", "logits", "log_tails"))
        return TopLogits(ids, logits, log_tails, self.temperatures, self.classes, self.kind)

    def _entry(self, part: str) -> str:
        return f"tfvllm_{self.teacher[:8]}_{part}"

    def _nothing(self) -> dict[str, tf.Tensor]:
        shape = [0] if self.rank == 3 else []
        return {
            "key": tf.constant(-1, tf.int64),
            "ids": tf.zeros([*shape, self.top_k], tf.int32),
            "logits": tf.zeros([*shape, self.top_k]),
            "log_tails": tf.zeros([*shape, len(self.temperatures)]),
        }

    def _parse(self, record: tf.Tensor) -> dict[str, tf.Tensor]:
        entry = tf.io.parse_single_example(
            record,
            {
                "key": tf.io.FixedLenFeature([], tf.int64),
                **{name: tf.io.FixedLenFeature([], tf.string) for name in ("ids", "logits", "log_tails")},
            },
        )
        shape = [-1] if self.rank == 3 else []
        return {
            "key": entry["key"],
            "ids": tf.reshape(tf.io.decode_raw(entry["ids"], tf.int32), [*shape, self.top_k]),
            "logits": tf.reshape(tf.io.decode_raw(entry["logits"], tf.float32), [*shape, self.top_k]),
            "log_tails": tf.reshape(tf.io.decode_raw(entry["log_tails"], tf.float32), [*shape, len(self.temperatures)]),
        }

    def _check_start(self, rows: tf.data.Dataset, stored: tf.data.Dataset) -> None:
        keys = [int(key) for key in _keys(rows.take(_CHECKED), self.inputs)]
        known = [int(entry["key"]) for entry in stored.take(_CHECKED)]
        for index, key in enumerate(keys):
            if index >= len(known) or known[index] != key:
                why = "it is not in the cache" if key not in known else "it has another place in the cache"
                raise InputError(
                    f"stale teacher cache: example {index} of the data differs from example {index} of {self.path} "
                    f"({why}). Pass the data it was written for, in that order (shuffle in join), or write it again."
                )


def write_teacher_cache(
    teacher: keras.Model,
    data: tf.data.Dataset,
    path: str | os.PathLike,
    *,
    top_k: int | None = 64,
    temperatures: Sequence[float] = (1.0, 2.0),
    shard_size: int = 4096,
    worker: tuple[int, int] = (0, 1),
    from_logits: bool | None = None,
) -> TeacherCache | None:
    """Runs `teacher` once over `data` and writes its largest logits to TFRecord shards.

    Interrupted work goes on where it stopped: shards that are there and belong to the same teacher and data are kept.
    Several processes may write one cache, each with its own `worker`; the one that finds all shards there finishes it.

    Args:
        teacher: the model; its output is [batch, classes] or [batch, length, vocabulary].
        data: batches of preprocessed x, (x, y) or (x, y, sample_weight), in the same order at every pass.
        path: the cache's folder.
        top_k: how many logits of each example or position to keep; None keeps all of them, and every loss on logits is
            then exact. Else divergences see the k largest and all others as one class.
        temperatures: for which the mass of the others is kept; each loss needs its own among them.
        shard_size: examples in a shard.
        worker: (this process, how many processes).
        from_logits: whether the teacher gives logits, where that cannot be found out.
    Returns:
        The cache, or None where other workers have shards left to write.
    Raises:
        InputError: the folder has shards of another teacher, other data or other settings; the message says which.

    Example:
        >>> data = tf.data.Dataset.from_tensor_slices((points, kinds)).batch(8)
        >>> cache = tfvllm.distillation.write_teacher_cache(tiny_net(), data, folder / "cache")
        >>> cache.examples, cache.classes
        (16, 3)
    """
    if has_strings(data) and not takes_strings(teacher):
        raise InputError(
            "the data are raw strings; expected preprocessed batches. Use data.map(teacher.preprocess_samples), here "
            "and in join."
        )
    shape = teacher.output_shape
    if not isinstance(shape, tuple) or len(shape) not in (2, 3):
        raise InputError(f"expected a teacher with one output [batch, (length,) classes], found {shape}.")
    temperatures = tuple(float(t) for t in temperatures)
    names = sorted(teacher.input) if isinstance(getattr(teacher, "input", None), dict) else None
    plan = {
        "format": _FORMAT,
        "teacher": model_digest(teacher),
        "inputs": names,
        "top_k": shape[-1] if top_k is None else min(top_k, shape[-1]),
        "classes": shape[-1],
        "rank": len(shape),
        "temperatures": list(temperatures),
        "shard_size": shard_size,
    }
    path = Path(path)
    spec = data.element_spec[0] if isinstance(data.element_spec, tuple) else data.element_spec
    head = Heads({} if from_logits is None else {"teacher": from_logits}, "from_logits={}").of("teacher", teacher, spec)
    if head.kind != "logits":
        plan["kind"] = head.kind
    if head.independent and plan["top_k"] != plan["classes"]:
        raise InputError(
            f"the teacher gives a probability for each of {plan['classes']} classes by itself (sigmoid); all of them "
            f"are needed, but top_k={top_k}. Pass top_k=None."
        )
    _check_plan(path, plan)
    compute = _computed(teacher, head, plan["top_k"], temperatures)
    rows, size = _rows(data), _batch_size(data)
    total = shards = 0
    complete = True
    digests = []
    for index, rows_of_shard in enumerate(rows.batch(shard_size)):
        part = tf.data.Dataset.from_tensor_slices(rows_of_shard)
        keys = [int(key) for key in _keys(part, names)]
        total, shards = total + len(keys), shards + 1
        found = _shard_state(path, index)
        told = {"examples": len(keys), "keys": digest(keys)}
        digests.append(told["keys"])
        if found is not None:
            if found != told:
                raise InputError(
                    f"stale teacher cache: shard {index} of {path} was written for other data ({found['examples']} "
                    f"examples with keys {found['keys']}, now {told['examples']} with {told['keys']}). "
                    "Delete the folder, or pass the data it was written for, in the same order."
                )
        elif index % worker[1] == worker[0]:
            _write_shard(path / _shard(index), part.batch(size), keys, compute)
            write_text(path / f"{_shard(index)}.json", json.dumps(told))
        else:
            complete = False
    if not total:
        raise InputError("the data hold no examples.")
    if not complete and any(_shard_state(path, index) is None for index in range(shards)):
        return None
    told = {**plan, "examples": total, "shards": shards, "data": digest(*digests)}
    write_text(path / "cache.json", json.dumps(told, indent=1) + "\n")
    return TeacherCache(path)


def model_digest(model: keras.Model) -> str:
    """A hash of the model's class and the values of its weights: the same after saving and loading."""
    sha = hashlib.sha256(type(model).__name__.encode())
    for variable in model.weights:
        value = np.ascontiguousarray(variable.numpy())
        sha.update(f"{value.shape}{value.dtype}".encode())
        sha.update(value.tobytes())
    return sha.hexdigest()[:16]


def without_entries(x: Any) -> Any:
    """The inputs of a batch that `join` made, as they were in the data."""
    if not isinstance(x, Mapping):
        return x
    return x[_INPUTS] if _INPUTS in x else {name: part for name, part in x.items() if not name.startswith("tfvllm_")}


def _check_plan(path: Path, plan: dict[str, Any]) -> None:
    file = path / "plan.json"
    if not file.exists():
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} is there and is no teacher cache; expected a new path or an unfinished cache.")
        write_text(file, json.dumps(plan))
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    unlike = [key for key in plan if found.get(key) != plan[key]]
    if unlike:
        told = ", ".join(f"{key} was {found.get(key)}, now {plan[key]}" for key in unlike)
        raise InputError(
            f"stale teacher cache: {path} was written with other settings: {told}. Delete it, or take another path."
        )


def _shard(index: int) -> str:
    return f"shard-{index:05d}.tfrecord"


def _shard_state(path: Path, index: int) -> dict[str, Any] | None:
    told = path / f"{_shard(index)}.json"
    return json.loads(told.read_text(encoding="utf-8")) if told.exists() and (path / _shard(index)).exists() else None


def _write_shard(path: Path, batches: tf.data.Dataset, keys: list[int], compute: Any) -> None:
    left = iter(keys)
    with new_file(path) as partial, tf.io.TFRecordWriter(str(partial)) as writer:
        for x, *_ in batches:
            for ids, logits, tails in zip(*(part.numpy() for part in compute(x))):
                features = {
                    name: _bytes(part) for name, part in (("ids", ids), ("logits", logits), ("log_tails", tails))
                }
                features["key"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[next(left)]))
                example = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(example.SerializeToString())


def _bytes(part: np.ndarray) -> tf.train.Feature:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[np.ascontiguousarray(part).tobytes()]))


def _computed(teacher: keras.Model, head: Head, top_k: int, temperatures: tuple[float, ...]) -> Any:
    @tf.function(reduce_retracing=True)
    def compute(x: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        with einsum_as_matmul(teacher):
            logits = tf.cast(logits_of(teacher(select(teacher, x), training=False), teacher, head), tf.float32)
        largest, ids = tf.math.top_k(logits, top_k)
        if top_k == logits.shape[-1]:
            tails = tf.fill(tf.concat([tf.shape(logits)[:-1], [len(temperatures)]], 0), NONE)
        else:
            flat, at = tf.reshape(logits, [-1, logits.shape[-1]]), tf.reshape(ids, [-1])
            count = tf.shape(flat)[0]
            at = tf.stack([tf.repeat(tf.range(count), top_k), at], axis=1)
            others = tf.tensor_scatter_nd_update(flat, at, tf.fill([count * top_k], NONE))
            tails = tf.stack([tf.reduce_logsumexp(others / t, axis=-1) for t in temperatures], axis=-1)
            tails = tf.reshape(tails, tf.concat([tf.shape(logits)[:-1], [len(temperatures)]], 0))
        return ids, largest, tails

    return compute


def _rows(data: tf.data.Dataset) -> tf.data.Dataset:
    """Examples (x, ...) of batches of x, (x, y) or (x, y, sample_weight)."""
    rows = data.unbatch()
    return rows if isinstance(rows.element_spec, tuple) else rows.map(lambda x: (x,))


def _batch_size(data: tf.data.Dataset) -> int:
    first = next(iter(data.take(1)), None)
    if first is None:
        raise InputError("the data hold no batches.")
    return int(tf.shape(tf.nest.flatten(first)[0])[0])


def _keys(rows: tf.data.Dataset, inputs: list[str] | None) -> Iterator[np.ndarray]:
    yield from rows.map(lambda x, *_: _key(x, inputs), tf.data.AUTOTUNE).as_numpy_iterator()


def _key(x: Any, inputs: list[str] | None) -> tf.Tensor:
    """A hash of what the teacher reads of one example, int64 scalar."""
    parts = [x[name] for name in inputs] if inputs is not None else tf.nest.flatten(x)
    told = tf.strings.join([tf.io.serialize_tensor(part) for part in parts])
    return tf.strings.to_hash_bucket_strong(told, 2**62, key=[0x7466766C, 0x6C6D])

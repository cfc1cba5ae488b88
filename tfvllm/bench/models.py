"""SavedModels to measure: loading, inputs of a wanted shape, latency and throughput side by side."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.savedmodel import read, text_ops
from tfvllm.timing import Timing, compare

# Everyday words that WordPiece and BPE vocabularies of English hold whole: n words are about n tokens.
_WORDS = str.split(
    "the film was good and we had a great time with all of it but some people did not like what they saw "
    "because it is long and there are few new ideas in this story about an old man who lost his house"
)


class ServedModel:
    """One signature of a SavedModel, called with arrays."""

    def __init__(self, directory: str | os.PathLike, signature: str = "serving_default"):
        self.directory = latest_version(directory)
        import_text_ops()
        try:
            self._loaded = read.load(self.directory)
        except Exception as error:
            line = " ".join(str(error).split())[:200]
            raise InputError(
                f"{directory}: expected a SavedModel that loads with TensorFlow and TensorFlow Text: {line}"
            ) from error
        if signature not in self._loaded.signatures:
            raise InputError(
                f"{directory}: expected the signature {signature}, "
                f"found {', '.join(self._loaded.signatures) or 'none'}."
            )
        self.function = self._loaded.signatures[signature]
        self.inputs: dict[str, tf.TensorSpec] = dict(sorted(self.function.structured_input_signature[1].items()))

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Runs the signature and waits for its outputs."""
        tensors = {
            name: value if isinstance(value, tf.Tensor) else tf.constant(value, self.inputs[name].dtype)
            for name, value in inputs.items()
        }
        return {name: value.numpy() for name, value in self.function(**tensors).items()}

    def texts(self, texts: Sequence[str]) -> dict[str, tf.Tensor]:
        """`texts` as this signature's inputs; it must have one string input."""
        names = [name for name, spec in self.inputs.items() if spec.dtype == tf.string]
        if len(names) != 1 or len(self.inputs) != 1:
            raise InputError(f"{self.directory}: expected one string input, found {', '.join(sorted(self.inputs))}.")
        return {names[0]: tf.constant(list(texts))}

    def request(self, rows: Sequence[str], texts: bool) -> dict[str, tf.Tensor]:
        """One request of rows that are texts, or lengths in tokens as decimal numbers, padded to the longest.

        Raises:
            InputError: lengths below 1; texts for a signature of several inputs or of ids.
        """
        if texts:
            return self.texts(rows)
        lengths = np.array([int(row) for row in rows])
        if lengths.min() < 1 or lengths.max() > 1 << 20:
            raise InputError(f"lengths: expected whole numbers from 1 to {1 << 20}, found {lengths.min()}.")
        made = self.made_up(len(rows), int(lengths.max()))
        for name, tensor in made.items():
            if tensor.dtype == tf.string and tensor.shape == [len(rows)]:
                words = tf.strings.split(tensor).to_list()
                made[name] = tf.constant([b" ".join(w[:n]) for w, n in zip(words, lengths)])
            elif tensor.shape.rank == 2 and self.inputs[name].shape[1] is None and not tensor.dtype.is_floating:
                real = np.arange(lengths.max())[None, :] < lengths[:, None]  # [rows, positions]
                made[name] = tf.where(real, tensor, tf.zeros_like(tensor))
        return made

    def made_up(self, batch: int, length: int, seed: int = 0) -> dict[str, tf.Tensor]:
        """Inputs of a shape: English words for strings, small ids, full masks, normal floats."""
        rng = np.random.default_rng(seed)
        made = {}
        for name, spec in self.inputs.items():
            if spec.dtype == tf.string:
                made[name] = tf.constant([" ".join(rng.choice(_WORDS, length)) for _ in range(batch)])
                continue
            free = iter((batch, length))
            shape = [
                size if size is not None else next(free, 1)
                for size in (spec.shape.as_list() if spec.shape.rank else [])
            ]
            made[name] = tf.constant(_numbers(name, spec.dtype, shape, rng), spec.dtype)
        return made


def import_text_ops() -> None:
    """Registers TensorFlow Text's ops, which a SavedModel with a tokenizer needs to load."""
    text_ops.load()


def latest_version(directory: str | os.PathLike) -> Path:
    """The SavedModel in `directory`: itself, or its highest numbered version as TF Serving would take."""
    directory = Path(directory)
    if (directory / "saved_model.pb").is_file():
        return directory
    versions = [child for child in directory.glob("*") if child.name.isdigit() and (child / "saved_model.pb").is_file()]
    if not versions:
        raise InputError(
            f"{directory}: expected a SavedModel (a folder with saved_model.pb, or base/<number>), found none."
        )
    return max(versions, key=lambda child: int(child.name))


def latency(
    models: Mapping[str, Callable[[Any], Any]], inputs: Mapping[str, Any], *, repeats: int, warmup: int
) -> dict[str, Timing]:
    """Times each model on its own inputs, taking turns. `inputs[name]` is what `models[name]` is called with."""
    return compare({name: partial(model, inputs[name]) for name, model in models.items()}, repeats, warmup)


def distribution(
    models: Mapping[str, Callable[[Any], Any]], requests: Mapping[str, Sequence[Any]], *, passes: int, warmup: int
) -> dict[str, list[float]]:
    """Milliseconds of each request, the median over the passes; the models take turns request by request.

    Args:
        requests: name -> what `models[name]` is called with, request by request.
        warmup: the first so many requests are also run untimed.
    """
    count = len(next(iter(requests.values())))
    names = list(models)
    for i in range(min(warmup, count)):
        for name in names:
            models[name](requests[name][i])
    times = {name: np.zeros((passes, count)) for name in names}
    for turn in range(passes):
        for i in range(count):
            shift = (turn + i) % len(names)
            for name in names[shift:] + names[:shift]:
                began = time.perf_counter_ns()
                models[name](requests[name][i])
                times[name][turn, i] = (time.perf_counter_ns() - began) / 1e6
    return {name: np.median(found, axis=0).tolist() for name, found in times.items()}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean, p50, p90, p95, p99 and the largest."""
    found = {f"p{q}": round(float(np.percentile(values, q)), 4) for q in (50, 90, 95, 99)}
    return {"mean": round(float(np.mean(values)), 4), **found, "max": round(float(np.max(values)), 4)}


def throughput(
    models: Mapping[str, ServedModel], texts: Sequence[str], *, batch: int, repeats: int, warmup: int = 1
) -> dict[str, dict[str, Any]]:
    """Sentences per second over all of `texts`, in the order given, in batches; the models take turns by whole passes.

    Returns:
        name -> `sentences_per_second` (of the median pass) and the timing of a pass.
    """
    groups = [list(texts[i : i + batch]) for i in range(0, len(texts), batch)]
    passes = {}
    for name, model in models.items():
        prepared = [model.texts(group) for group in groups]
        passes[name] = lambda m=model, p=prepared: [m(inputs) for inputs in p]
    timings = compare(passes, repeats, warmup)
    return {
        name: {"sentences_per_second": round(len(texts) / timing.median_ms * 1e3, 1), "pass": timing.to_dict()}
        for name, timing in timings.items()
    }


def size_on_disk(directory: str | os.PathLike) -> int:
    """Bytes of all files of a SavedModel."""
    return sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())


def _numbers(name: str, dtype: tf.DType, shape: list[int], rng: np.random.Generator) -> np.ndarray:
    if dtype == tf.bool or "mask" in name:
        return np.ones(shape, bool if dtype == tf.bool else dtype.as_numpy_dtype)
    if "segment" in name:
        return np.zeros(shape, dtype.as_numpy_dtype)
    if dtype.is_integer:
        return rng.integers(1, 100, shape).astype(dtype.as_numpy_dtype)
    return rng.normal(size=shape).astype(dtype.as_numpy_dtype)


def names_of(model: Path, others: tuple[Path, ...]) -> dict[str, Path]:
    """A short, different name for each path: its last parts."""
    paths = [model, *others]
    for count in range(1, max(len(path.resolve().parts) for path in paths) + 1):
        names = ["/".join(path.resolve().parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    else:
        names = [f"{name} #{i + 1}" for i, name in enumerate(names)]  # the same model twice: a fair check of the noise
    return dict(zip(names, paths))

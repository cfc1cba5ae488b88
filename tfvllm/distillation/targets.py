"""Sequence-level distillation: what the teacher writes, kept in a file, as the student's targets.

Kim and Rush 2016, section 3.2: the student learns the teacher's best sequence (of greedy or beam search) by plain
cross-entropy, instead of the reference.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tfvllm.distillation.cache import model_digest
from tfvllm.errors import InputError


def write_targets(
    teacher: keras.Model,
    texts: Iterable[str],
    path: str | os.PathLike,
    *,
    beams: int = 1,
    max_length: int | None = None,
    batch_size: int = 32,
    generate: Callable[[list[str]], Sequence[str]] | None = None,
) -> Path:
    """Writes what the teacher makes of each text to a JSON-lines file. Interrupted work goes on where it stopped.

    Args:
        teacher: a keras-nlp causal or sequence-to-sequence language model with a preprocessor.
        texts: sources, or prompts.
        path: the file; one line of settings, then `{"input": …, "target": …}` for each text.
        beams: 1 for greedy search, more for beam search.
        max_length: of prompt and answer (causal) or answer (sequence to sequence), in tokens; the default is the
            preprocessor's.
        batch_size: texts generated at once.
        generate: another way to generate, from texts to answers, such as `tfvllm.rollouts.Answers(teacher)`, which is
            faster than keras-nlp's: then `beams` and `max_length` are only written down.
    Returns:
        The path. A finished file of the same teacher and settings is left as it is.
    Raises:
        InputError: the file belongs to another teacher, other settings or other texts.

    Example:
        >>> backwards = lambda texts: [text[::-1] for text in texts]  # in place of the teacher's own generate
        >>> path = tfvllm.distillation.write_targets(tiny_net(), ["ab", "cd"], folder / "a.jsonl", generate=backwards)
        >>> len(path.read_text().splitlines())  # what it is, then a line for each text
        3
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    told = {
        "teacher": model_digest(teacher),
        "kind": "seq2seq" if _reads_two(teacher) else "causal",
        "beams": beams,
        "max_length": max_length,
    }
    texts = list(texts)
    finished = path.exists()
    done = _done(path if finished else partial, told)
    for index, (text, entry) in enumerate(zip(texts, done)):
        if entry["input"] != text:
            raise InputError(f"{path} was written for other texts: text {index} was {entry['input']!r}, now {text!r}.")
    if finished:
        if len(done) != len(texts):
            raise InputError(f"{path} holds {len(done)} texts, now there are {len(texts)}. Take another path.")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    answer = generate or _generator(teacher, beams, max_length)
    kept = len(done) // batch_size * batch_size  # whole batches: what a text gets may depend on its company
    with partial.open("a+b") as opened:  # what is written stays, whenever this is killed
        opened.seek(0)
        opened.truncate(sum(map(len, itertools.islice(opened, 1 + kept if done else 0))))
    with partial.open("a", encoding="utf-8", newline="\n") as file:
        if not done:
            print(json.dumps(told, ensure_ascii=False), file=file)
        for start in range(kept, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            for text, target in zip(batch, answer(batch), strict=True):
                print(json.dumps({"input": text, "target": target}, ensure_ascii=False), file=file)
            file.flush()
    os.replace(partial, path)
    return path


def read_targets(path: str | os.PathLike) -> tf.data.Dataset:
    """What the student's preprocessor takes: {"encoder_text", "decoder_text"}, or the teacher's texts (causal).

    Unbatched; batch it and pass it to `Distiller.fit` (token-level and sequence-level distillation at once) or to the
    student's own `fit` (sequence-level alone).

    Example:
        >>> backwards = lambda texts: [text[::-1] for text in texts]
        >>> path = tfvllm.distillation.write_targets(tiny_net(), ["ab", "cd"], folder / "b.jsonl", generate=backwards)
        >>> [text.numpy() for text in tfvllm.distillation.read_targets(path)]
        [b'ba', b'dc']
    """
    told, *entries = _lines(Path(path))
    targets = [entry["target"] for entry in entries]
    if told["kind"] == "causal":
        return tf.data.Dataset.from_tensor_slices(targets)
    inputs = [entry["input"] for entry in entries]
    return tf.data.Dataset.from_tensor_slices({"encoder_text": inputs, "decoder_text": targets})


def _reads_two(model: keras.Model) -> bool:
    inputs = getattr(model, "input", None)
    return isinstance(inputs, dict) and "decoder_token_ids" in inputs


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        raise InputError(f"{path} is not there; expected a file of tfvllm.distillation.write_targets.")
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):  # the last may end amid a character
        try:
            yield json.loads(line)
        except ValueError:
            raise InputError(f"line {number} of {path} is not JSON; expected a file of write_targets.") from None


def _done(path: Path, told: dict[str, Any]) -> list[dict[str, str]]:
    """What is already written; a last line cut off by an interruption is dropped."""
    if not path.exists() or not path.stat().st_size:
        return []
    found, *entries = [*_lines(path)] or [told]
    unlike = [f"{key} was {found.get(key)}, now {told[key]}" for key in told if found.get(key) != told[key]]
    if unlike:
        raise InputError(f"{path} was written otherwise: {', '.join(unlike)}. Delete it, or take another path.")
    return entries


def _generator(teacher: keras.Model, beams: int, max_length: int | None) -> Callable[[list[str]], Sequence[str]]:
    from keras_hub.samplers import BeamSampler, GreedySampler

    if getattr(teacher, "preprocessor", None) is None or not hasattr(teacher, "generate"):
        raise InputError(
            f"expected a keras-nlp language model with a preprocessor, found {type(teacher).__name__}. "
            "Pass generate=..., a function from a list of texts to a list of answers."
        )

    compiled: list[Any] = [None]  # traced once, kept beside the teacher's own

    def answer(batch: list[str]) -> Sequence[str]:
        before = teacher.sampler, teacher.generate_function
        teacher.sampler = GreedySampler() if beams == 1 else BeamSampler(num_beams=beams)
        teacher.generate_function = compiled[0]
        try:
            made = teacher.generate(batch, max_length=max_length)
            compiled[0] = teacher.generate_function
        finally:
            teacher.sampler, teacher.generate_function = before
        return [made] if isinstance(made, str) else list(made)

    return answer

"""`tfvllm.export`: checks the call, lets the task write a SavedModel beside the final name, proves it, renames it."""

import difflib
import importlib
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tfvllm.errors import InputError
from tfvllm.export import PRECISIONS, TASKS
from tfvllm.files import new_directory
from tfvllm.savedmodel import manifest, write


def export(
    model,
    path: str | os.PathLike,
    task: str,
    *,
    labels: list[str] | None = None,
    max_length: int | None = None,
    precision: str = "float32",
    overwrite: bool = False,
    check: str | None = "here",
    warmup: bool = True,
    **options: Any,
) -> Path:
    """Writes `model` as a SavedModel for `task` in the new folder `path`, and returns that folder.

    Args:
        model: a Keras or keras-nlp model.
        path: a folder that does not exist yet, such as `saved_models/sentiment/1` (TF Serving serves the parent).
        task: one of `tfvllm.export.TASKS`.
        labels: for `classify`, the class names in the order of the model's outputs; default "0", "1", …
        max_length: the longest input (and, for generating tasks, output) in tokens; default the preprocessor's own, or
            as many as the model has positions for, where the preprocessor's is beyond them.
        precision: of the weights, where the task offers it.
        overwrite: replace an existing `path` (only after the new one is complete).
        check: compare the SavedModel with the model "here" (in this process), "fresh" (in a new process that has only
            TensorFlow and TensorFlow Text: no Keras, no tfvllm), or None for no comparison.
        warmup: write `assets.extra/tf_serving_warmup_requests`, so that TF Serving's first answer is not its slowest.
        options: further options of the task; an unknown one is refused.

    Raises:
        InputError: the call is wrong, or `path` exists and `overwrite` is False.
        VerificationError: the SavedModel does not compute what the model computes; nothing is written.

    Example:
        >>> path = tfvllm.export(tiny_net(), folder / "net" / "1", task="classify", labels=["a", "b", "c"])
        >>> served = tf.saved_model.load(str(path)).signatures["serving_default"]
        >>> answer = served(**{name: tf.constant(points) for name in served.structured_input_signature[1]})
        >>> answer["classes"].numpy()[0], answer["scores"].shape
        (array([b'a', b'b', b'c'], dtype=object), TensorShape([16, 3]))
    """
    check_call(task, precision=precision)
    if check not in (None, "here", "fresh"):
        raise InputError(f'check must be "here", "fresh" or None; got {check!r}.')
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise InputError(f"max_length must be a whole number of tokens, at least 1; got {max_length!r}.")
    if labels is not None and (isinstance(labels, str) or not all(isinstance(label, str) for label in labels)):
        raise InputError(f"labels must be a list of strings, one per class; got {labels!r}.")

    export_task = importlib.import_module(TASKS[task]).export_task
    if labels is not None:
        options["labels"] = list(labels)
    if max_length is not None:
        options["max_length"] = max_length
    options["precision"] = precision
    fitted = fit_lengths(model, task, options)
    _check_options(export_task, task, options)

    from tfvllm.savedmodel import parity
    from tfvllm.savedmodel import warmup as records

    path = Path(path)
    with new_directory(path, overwrite=overwrite) as partial:
        entries = dict(export_task(model, partial, **options))
        comparison = entries.pop("check", None)
        examples = entries.pop("warmup", None)
        notes = [*fitted, *entries.pop("notes", ())]
        asked = {"--check": check or "none", "--no-warmup": not warmup}
        step = {"step": "export", "task": task, "options": _jsonable(options), "again": again(task, options, asked)}
        document = manifest.new(task=task, source=manifest.describe_source(model), **entries)
        document["steps"].append(step)
        document["signatures"] = write.signature_summary(partial)
        if notes:
            document["notes"] = notes
        manifest.write(partial, document)
        run = parity.loaded_here(partial)
        if check and comparison:
            comparison = comparison() if callable(comparison) else comparison
            document["measured_error"] = parity.check(partial, **comparison, fresh=check == "fresh", run=run)
        if warmup and examples:
            document["warmup"] = records.write(partial, examples, run=run)
        manifest.write(partial, document)
    for note in notes:
        warnings.warn(f"export of {path.name}: {note}", stacklevel=2)
    return path


def check_call(task: str, *, precision: str = "float32", options: Iterable[str] = ()) -> None:
    """Checks what can be checked without a model. Raises InputError that names the nearest valid word.

    `options`: names of further options, labels and max_length among them.
    """
    if task not in TASKS:
        raise InputError(f"task must be one of {', '.join(TASKS)}; got {task!r}.{_nearest(task, TASKS)}")
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}.")
    asked = dict.fromkeys(options)
    if asked:
        _check_options(importlib.import_module(TASKS[task]).export_task, task, asked)


# option -> the preprocessor's own length
_LENGTHS = {"max_length": "sequence_length"}
_LENGTHS_OF_TWO = {"max_length": "decoder_sequence_length", "max_source_length": "encoder_sequence_length"}


def fit_lengths(model, task: str, options: dict[str, Any]) -> list[str]:
    """Sets the lengths that nobody gave and the preprocessor has beyond the model's positions; says so.

    keras-nlp's preprocessors have defaults (1024, 512) that know nothing of the model, and a sequence-to-sequence one
    comes back from a file with them, whatever it was made with.
    """
    preprocessor = options.get("preprocessor") or getattr(model, "preprocessor", None)
    positions = getattr(getattr(model, "backbone", model), "max_sequence_length", None)
    lengths = _LENGTHS_OF_TWO if task == "translate" else _LENGTHS
    notes = []
    for option, attribute in lengths.items():
        own = getattr(preprocessor, attribute, None)
        if options.get(option) is None and isinstance(own, int) and isinstance(positions, int) and own > positions:
            options[option] = positions
            notes.append(
                f"{option} is {positions}: the preprocessor says {own}, but the model has positions for {positions} "
                f"tokens. Pass {option} for another."
            )
    return notes


def _check_options(export_task, task: str, options: dict) -> None:
    import inspect

    parameters = inspect.signature(export_task).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [name for name in parameters if name not in ("model", "directory")]
    if options.get("precision") == "float32" and "precision" not in known:
        options.pop("precision")
    for name in options:
        if name not in known:
            raise InputError(
                f"task {task!r} has no option {name!r}; it knows {', '.join(known)}.{_nearest(name, known)}"
            )


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def again(task: str, options: dict, asked: dict[str, Any]) -> str:
    """The command that asks for the same export again; MODEL and DST stand for its folders."""
    flags: dict[str, Any] = {"--task": task}
    rest, beyond = [], []
    for name, value in options.items():
        if name == "labels":
            plain = all(label == label.strip() and label and "," not in label for label in value)
            plain = plain and not value[0].startswith("[")
            flags["--labels"] = ",".join(value) if plain else json.dumps(value, ensure_ascii=False)
        elif name in ("max_length", "max_source_length", "precision"):
            flags[f"--{name.replace('_', '-')}"] = value
        elif _jsonable({name: value})[name] is value:
            rest.append(f"{name}={json.dumps(value, ensure_ascii=False)}")
        else:
            beyond.append(name)
    remark = f"with {', '.join(beyond)} given in Python" if beyond else ""
    return manifest.command_line("tfvllm export MODEL DST", {**flags, "--option": rest, **asked}, remark=remark)


def _jsonable(options: dict) -> dict:
    return {
        key: value if isinstance(value, str | int | float | bool | list | type(None)) else repr(value)
        for key, value in options.items()
    }

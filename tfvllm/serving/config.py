"""TF Serving's own configuration files: models.config and the batching parameters, both protobuf text."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from tfvllm.errors import InputError
from tfvllm.savedmodel import messages
from tfvllm.serving.batching import BatchingOptions
from tfvllm.serving.manager import ModelConfig

_MODELS: dict[str, list[messages.Field]] = {
    "Latest": [("num_versions", 1, "uint32", False)],
    "All": [],
    "Specific": [("versions", 1, "int64", True)],
    "Policy": [("latest", 100, "Latest", False), ("all", 101, "All", False), ("specific", 102, "Specific", False)],
    "Label": [("key", 1, "string", False), ("value", 2, "int64", False)],
    "Model": [
        ("name", 1, "string", False),
        ("base_path", 2, "string", False),
        ("model_platform", 4, "string", False),
        ("model_version_policy", 7, "Policy", False),
        ("version_labels", 8, "Label", True),
    ],
    "ModelList": [("config", 1, "Model", True)],
    "ModelServerConfig": [("model_config_list", 1, "ModelList", False)],
}
_BATCHING: dict[str, list[messages.Field]] = {
    "Int64": [("value", 1, "int64", False)],
    "Bool": [("value", 1, "bool", False)],
    "String": [("value", 1, "string", False)],
    "BatchingParameters": [
        ("max_batch_size", 1, "Int64", False),
        ("batch_timeout_micros", 2, "Int64", False),
        ("max_enqueued_batches", 3, "Int64", False),
        ("num_batch_threads", 4, "Int64", False),
        ("thread_pool_name", 5, "String", False),
        ("allowed_batch_sizes", 6, "int64", True),
        ("pad_variable_length_inputs", 7, "bool", False),
        ("enable_large_batch_splitting", 8, "Bool", False),
        ("max_execution_batch_size", 9, "Int64", False),
    ],
}


@functools.cache
def _messages() -> dict[str, type]:
    return {**messages.declare("tfvllm_models", _MODELS), **messages.declare("tfvllm_batching", _BATCHING)}


@dataclass(frozen=True)
class BatchingFile:
    """What a batching parameters file says: options, runs at once and waiting requests (None: not said)."""

    options: BatchingOptions
    slots: int | None
    max_queued: int | None


def read_models(file: str | os.PathLike) -> list[ModelConfig]:
    """The models of a models.config. Relative base paths count from the file's folder.

    Raises InputError that names the line.
    """
    file = Path(file)
    config = _parse(file, "ModelServerConfig", "model_config_list { config { name: … base_path: … } }")
    models = []
    for model in config.model_config_list.config:
        if not model.name or not model.base_path:
            raise InputError(f"{file}: a config has no name or no base_path; expected both.")
        if model.model_platform not in ("", "tensorflow"):
            raise InputError(f"{file}: model_platform {model.model_platform!r} of {model.name}; expected tensorflow.")
        policy, options = model.model_version_policy, dict[str, Any]()
        if policy.HasField("specific"):
            options["specific"] = tuple(policy.specific.versions)
        elif policy.HasField("all"):
            options["latest"] = None
        elif policy.HasField("latest"):
            options["latest"] = policy.latest.num_versions or 1
        labels = {label.key: label.value for label in model.version_labels}
        models.append(ModelConfig(model.name, file.parent / model.base_path, labels=labels, **options))
    if not models:
        raise InputError(f"{file} names no model; expected model_config_list {{ config {{ name: … base_path: … }} }}.")
    return models


def write_models(models: Sequence[ModelConfig]) -> str:
    """A models.config for TF Serving; base paths are written as they are."""
    config = _messages()["ModelServerConfig"]()
    for model in models:
        entry = config.model_config_list.config.add(
            name=model.name, base_path=str(model.base_path), model_platform="tensorflow"
        )
        if model.specific is not None:
            entry.model_version_policy.specific.versions.extend(model.specific)
        elif model.latest is None:
            entry.model_version_policy.all.SetInParent()
        elif model.latest != 1:
            entry.model_version_policy.latest.num_versions = model.latest
        for label, number in sorted(model.labels.items()):
            entry.version_labels.add(key=label, value=number)
    return text_format.MessageToString(config)


def read_batching(file: str | os.PathLike) -> BatchingFile:
    """A batching parameters file. Raises InputError that names the line or the value."""
    parameters = _parse(Path(file), "BatchingParameters", "max_batch_size { value: 32 }")

    def value(name: str):
        return getattr(parameters, name).value if parameters.HasField(name) else None

    size = value("max_batch_size") or value("max_execution_batch_size") or 32
    allowed = tuple(parameters.allowed_batch_sizes)
    if size < 1:
        raise InputError(f"{file}: max_batch_size is {size}; expected at least 1.")
    if allowed and (list(allowed) != sorted(set(allowed)) or allowed[-1] != size):
        raise InputError(
            f"{file}: allowed_batch_sizes must rise and end with max_batch_size ({size}); got {list(allowed)}."
        )
    timeout, batches, threads = value("batch_timeout_micros"), value("max_enqueued_batches"), value("num_batch_threads")
    options = BatchingOptions(
        max_batch_size=size,
        batch_timeout_ms=(timeout or 0) / 1000,
        allowed_batch_sizes=allowed,
        pad_variable_length_inputs=parameters.pad_variable_length_inputs,
    )
    return BatchingFile(options, threads or None, batches * size if batches else None)


def write_batching(options: BatchingOptions, *, slots: int, max_enqueued_batches: int = 100) -> str:
    """A batching parameters file for TF Serving's --batching_parameters_file."""
    parameters = _messages()["BatchingParameters"]()
    parameters.max_batch_size.value = options.max_batch_size
    parameters.batch_timeout_micros.value = round(options.batch_timeout_ms * 1000)
    parameters.max_enqueued_batches.value = max_enqueued_batches
    parameters.num_batch_threads.value = slots
    parameters.allowed_batch_sizes.extend(options.allowed_batch_sizes)
    if options.pad_variable_length_inputs:
        parameters.pad_variable_length_inputs = True
    return text_format.MessageToString(parameters)


def _parse(file: Path, message: str, example: str):
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; expected a text file such as: {example}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text; expected something such as: {example}") from None
    try:
        return text_format.Parse(text, _messages()[message]())
    except text_format.ParseError as error:
        raise InputError(f"{file}:{' '.join(str(error).split())} Expected something such as: {example}") from None

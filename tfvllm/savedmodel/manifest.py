"""The manifest every SavedModel of tfvllm carries: `assets.extra/tfvllm.json`."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfvllm._version import __version__
from tfvllm.errors import InputError

NAME = "assets.extra/tfvllm.json"
_PACKAGES = ("tensorflow", "keras", "keras-hub", "tensorflow-text", "numpy")


def path(directory: str | os.PathLike) -> Path:
    """Where the manifest of the SavedModel in `directory` is."""
    return Path(directory) / NAME


def read(directory: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the SavedModel in `directory`; an empty dict where there is none.

    Raises InputError when the file is there but is no JSON object.
    """
    file = path(directory)
    if not file.exists():
        return {}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is no JSON ({error}); expected a manifest written by tfvllm. Export again.") from None
    if not isinstance(manifest, dict):
        raise InputError(f"{file} holds a {type(manifest).__name__}; expected a JSON object. Export the model again.")
    return manifest


def write(directory: str | os.PathLike, manifest: Mapping[str, Any]) -> None:
    """Writes `manifest` into the SavedModel in `directory`, whole or not at all."""
    file = path(directory)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(manifest, indent=2, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")
    os.replace(partial, file)


def add_step(directory: str | os.PathLike, step: Mapping[str, Any], **entries: Any) -> dict[str, Any]:
    """Appends `step` to the manifest's `steps`, sets `entries` at its top level, writes it and returns it."""
    manifest = read(directory) or new(task=None)
    manifest.setdefault("steps", []).append(dict(step))
    manifest.update(entries)
    write(directory, manifest)
    return manifest


def new(task: str | None, **entries: Any) -> dict[str, Any]:
    """A manifest's common part: what made it, with which versions."""
    return {"tfvllm": __version__, "task": task, "versions": versions(), "steps": [], **entries}


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that shape an export."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command_line(program: str, options: Mapping[str, Any], *, remark: str = "") -> str:
    """A line for the shell: `program` with `options` (flag to value) and, behind a #, what no option can say.

    None and False are left out, True is a bare flag, a list gives the flag once for each item.
    """
    words = [program]
    for flag, value in options.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is None or item is False:
                continue
            words.append(flag if item is True else f"{flag} {shlex.quote(str(item))}")
    return " ".join(words) + (f"  # {remark}" if remark else "")


def describe_source(model) -> dict[str, Any]:
    """What the manifest says about the Keras model an export came from: class, layers, parameters, config digest."""
    from tfvllm.files import digest

    source: dict[str, Any] = {"class": type(model).__name__, "module": type(model).__module__.split(".")[0]}
    backbone = getattr(model, "backbone", None)
    if backbone is not None:
        source["backbone"] = type(backbone).__name__
    with contextlib.suppress(AttributeError, ValueError):
        source["parameters"] = int(model.count_params())
    with contextlib.suppress(Exception):  # a subclassed model may have no config; then there is no digest of it
        source["config"] = digest(json.dumps(model.get_config(), sort_keys=True, default=repr))
    return source


def _plain(value: Any) -> Any:
    for convert in ("item", "tolist"):
        if hasattr(value, convert) and (convert != "item" or getattr(value, "size", 1) == 1):
            return getattr(value, convert)()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    raise TypeError(f"a manifest cannot hold a {type(value).__name__}")

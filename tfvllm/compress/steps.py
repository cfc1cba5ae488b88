"""The output folder of a run: each step's result under a key made of its parameters and its inputs' keys."""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfvllm.compress.console import Console
from tfvllm.errors import InputError, TfvllmError
from tfvllm.files import digest, new_directory, write_text

MARKER = "tfvllm-run.json"


@dataclass(frozen=True)
class StepResult:
    """A finished step: its key, its folder, what it reports, and whether it had been done before."""

    name: str
    key: str
    directory: Path
    result: dict[str, Any]
    cached: bool


class Workspace:
    """The output folder: finished steps in `steps/<name>-<key>/`, a step under way in `steps/<name>-<key>.work/`."""

    def __init__(self, out: Path, console: Console):
        self.out = out
        self.console = console
        self._under_way: list[list[str]] = []  # of each step that is being built, the steps that went into it

    def do(
        self,
        name: str,
        parameters: dict[str, Any],
        inputs: list[StepResult],
        build: Callable[[Path, Path], dict[str, Any]],
    ) -> StepResult:
        """Returns the step's earlier result, or builds it.

        Args:
            build: called with the new result's folder and a work folder that outlives an interruption; returns what
                the step reports (JSON-able). The folders of `inputs`, and of steps that it does itself, are kept beside
                that as `inputs`.
        """
        key = digest(name, json.dumps(parameters, sort_keys=True), [done.key for done in inputs])[:12]
        directory = self.out / "steps" / f"{name}-{key}"
        if self._under_way:
            self._under_way[-1].append(directory.name)
        if (directory / "result.json").is_file():
            self.console.line(f"{name}: done before, kept")
            return StepResult(name, key, directory, json.loads((directory / "result.json").read_text()), True)
        self.console.line(f"{name}: start")
        work = directory.with_name(directory.name + ".work")
        began = time.monotonic()
        try:
            with new_directory(directory, overwrite=True) as partial:
                work.mkdir(parents=True, exist_ok=True)
                self._under_way.append([done.directory.name for done in inputs])
                try:
                    result = build(partial, work)
                finally:
                    used = self._under_way.pop()
                result["inputs"] = list(dict.fromkeys(used))
                result["seconds"] = round(time.monotonic() - began, 1)
                result["settings"] = parameters
                (partial / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        except KeyboardInterrupt:
            raise TfvllmError(
                f"interrupted in step {name}; finished steps and epochs are kept in {self.out}: go on with --resume."
            ) from None
        shutil.rmtree(work, ignore_errors=True)
        return StepResult(name, key, directory, result, False)


@contextlib.contextmanager
def open_workspace(
    out: str | os.PathLike, console: Console, *, resume: bool = False, overwrite: bool = False
) -> Iterator[Workspace]:
    """Opens the output folder of a run, new or (with `resume`) an earlier one, for this process alone.

    `overwrite` removes an earlier run first, but only a folder that a run made.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: expected a folder for the run, found a file; choose another --out.")
    if out.is_dir() and any(out.iterdir()):
        ours = (out / MARKER).is_file()
        if not ours and (resume or overwrite):
            raise InputError(
                f"{out}: expected a new folder or an earlier run, found other files; choose another --out."
            )
        if not resume and not overwrite:
            way = "pass --resume to go on with it, --overwrite to start afresh" if ours else "choose another --out"
            raise InputError(f"{out} already exists and is not empty; {way}.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise InputError(f"cannot write into {out}: {error.strerror or error}; choose another --out.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{out} is in use by another run; wait for it or choose another --out.") from None
        if overwrite and not resume:
            for entry in out.iterdir():
                if entry.name != ".lock":
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        write_text(out / MARKER, json.dumps({"made_by": "tfvllm compress"}) + "\n")
        yield Workspace(out, console)

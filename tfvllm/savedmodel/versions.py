"""Version folders: `base/1/`, `base/2/`, … as TF Serving reads them; publish and roll back without half a version."""

import os
import re
import shutil
import tempfile
from pathlib import Path

from tfvllm.errors import InputError, TfvllmError
from tfvllm.files import new_directory

_RETIRED = ".retired-{}"


def find(base: str | os.PathLike) -> dict[int, Path]:
    """The versions under `base` that hold a SavedModel: number to folder. Other entries are left alone."""
    found = {}
    try:
        entries = list(os.scandir(os.fspath(base)))
    except OSError:
        return {}
    for entry in entries:
        if re.fullmatch(r"\d{1,18}", entry.name) and entry.is_dir() and _is_saved_model(Path(entry.path)):
            number = int(entry.name)
            if number not in found or entry.name == str(number):  # "1" wins over "01"
                found[number] = Path(entry.path)
    return found


def publish(source: str | os.PathLike, base: str | os.PathLike, version: int | None = None) -> Path:
    """Copies the SavedModel in `source` to `base/VERSION/`, where a running server finds it, whole at once.

    `version` defaults to one more than the highest ever used there. An existing version is never replaced: servers
    read a version once. Returns the new folder.
    """
    source, base = Path(source), Path(base)
    if not _is_saved_model(source):
        raise InputError(f"{source} holds no saved_model.pb; expected a SavedModel folder to publish.")
    if (base / "saved_model.pb").exists():
        raise InputError(f"{base} is a SavedModel itself; expected the folder above its versions.")
    if version is None:
        version = max([0, *find(base), *retired(base)]) + 1
    elif version in find(base) or version in retired(base):
        raise InputError(f"{base} has had a version {version} already. Publish under a higher number.")
    with new_directory(base / str(version)) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
    return base / str(version)


def retired(base: str | os.PathLike) -> dict[int, Path]:
    """The versions taken out of service by `rollback`."""
    folders = Path(base).glob(_RETIRED.format("*")) if Path(base).is_dir() else ()
    names = {folder: folder.name.rpartition("-")[2] for folder in folders}
    return {int(number): folder for folder, number in names.items() if number.isdigit()}


def rollback(base: str | os.PathLike, to: int | None = None) -> list[int]:
    """Takes the versions above `to` (default: only the highest) out of service; returns their numbers.

    Each is renamed at once to `base/.retired-N`, so that a server on TF Serving's default policy goes back to the
    highest version left, loading that one before it drops the other.
    """
    base = Path(base)
    found = find(base)
    if to is None:
        lower = sorted(found)[:-1]
        if not lower:
            raise InputError(f"{base} has {len(found)} version(s); expected an older one to go back to.")
        to = lower[-1]
    if to not in found:
        raise InputError(f"{base} has no version {to}; it has {', '.join(map(str, sorted(found))) or 'none'}.")
    taken = sorted((number for number in found if number > to), reverse=True)
    for number in taken:
        target = base / _RETIRED.format(number)
        if target.exists():
            target = Path(tempfile.mkdtemp(prefix=f".retired-again-{number}-", dir=base)) / str(number)
        try:
            os.rename(found[number], target)
        except OSError as error:
            raise TfvllmError(f"could not take version {number} of {base} out of service: {error.strerror}.") from error
    return taken


def restore(base: str | os.PathLike, version: int) -> Path:
    """Puts a version that was rolled back into service again."""
    folders = retired(base)
    if version not in folders:
        listed = ", ".join(map(str, sorted(folders))) or "none"
        raise InputError(f"{base} has no retired version {version}; retired are: {listed}.")
    target = Path(base) / str(version)
    if target.exists():
        raise InputError(f"{target} exists already.")
    os.rename(folders[version], target)
    return target


def _is_saved_model(folder: Path) -> bool:
    return (folder / "saved_model.pb").is_file()

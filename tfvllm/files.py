"""Inputs by where they are; outputs that are whole or absent: written beside their final name, then renamed."""

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tfvllm.errors import InputError, TfvllmError


def check_new(path: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Refuses an existing, non-empty `path` unless `overwrite`. Returns it as a `Path`."""
    path = Path(path)
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(
            f"{path} already exists; expected a new path. Pass --overwrite (overwrite=True) to replace it."
        )
    return path


@contextlib.contextmanager
def new_directory(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that becomes `path` when the block ends without an error.

    On an error (a full disk, Ctrl-C) the temporary folder is removed and an existing `path` is left as it was.
    """
    path = check_new(path, overwrite=overwrite)
    _make_parent(path)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    partial.chmod(0o755)
    try:
        yield partial
        _replace(partial, path)
    except OSError as error:
        raise TfvllmError(f"could not write {path}: {error.strerror or error}. Nothing was changed.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: str | os.PathLike, *, overwrite: bool = True) -> Iterator[Path]:
    """Yields a temporary file name beside `path` that becomes `path` when the block ends without an error."""
    path = check_new(path, overwrite=overwrite)
    _make_parent(path)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise TfvllmError(f"could not write {path}: {error.strerror or error}. Nothing was changed.") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 `text` to `path`, whole or not at all."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def digest(*parts: object) -> str:
    """A short, stable hash of `parts` (bytes as they are, a `Path` by its content, the rest by `repr`)."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                while chunk := file.read(1 << 20):
                    sha.update(chunk)
        else:
            sha.update(part if isinstance(part, bytes) else repr(part).encode())
        sha.update(b"\0")
    return sha.hexdigest()[:16]


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path.parent}: {error.strerror}.") from error


def _replace(partial: Path, path: Path) -> None:
    if not path.exists():
        os.rename(partial, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        os.rename(path, old / path.name)
        try:
            os.rename(partial, path)
        except OSError:
            os.rename(old / path.name, path)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def located(where: str | os.PathLike) -> Path | None:
    """The file or folder that `where` says; None for what can only be the name of a keras-nlp preset.

    Args:
        where: a path, or `PACKAGE:PATH`, a path inside an installed package, which is not imported; PATH may hold * for
            one name.
    Raises:
        InputError: there is nothing.
    """
    path = Path(where)
    if path.exists():
        return path
    package, colon, inside = str(where).partition(":")
    if re.match(r"\w+://", str(where)) or (not colon and re.fullmatch(r"\w+(\.\d\w*)*", str(where))):
        return None
    if not colon or not re.fullmatch(r"[A-Za-z_][\w.]*", package):
        raise InputError(
            f"no file {where}; expected a model saved by model.save('NAME.keras'), a preset folder, a GGUF file, "
            "PACKAGE:PATH or the name of a keras-nlp preset."
        )
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise InputError(f"{where}: no package {package} is installed; expected PACKAGE:PATH. pip install it.")
    root = Path(spec.origin).parent
    found = sorted(root.glob(inside)) if inside else [root]
    if len(found) == 1:
        return found[0]
    among = ", ".join(sorted(file.name for file in root.iterdir() if not file.name.startswith("_"))[:8])
    raise InputError(f"{where}: expected one file or folder in {package}, found {len(found)}; it holds {among}.")

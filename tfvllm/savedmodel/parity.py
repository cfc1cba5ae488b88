"""Does a SavedModel compute what its model computes? Asked in this process, or in a fresh one without Keras."""

import functools
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfvllm.errors import TfvllmError, VerificationError
from tfvllm.savedmodel import fresh as fresh_script
from tfvllm.savedmodel import text_ops


def check(
    directory: str | os.PathLike,
    *,
    signature: str,
    inputs: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    atol: float = 1e-5,
    rtol: float = 0.0,
    fresh: bool = False,
    run: Callable | None = None,
) -> dict[str, Any]:
    """Runs `signature` on `inputs` and compares the outputs named in `expected`.

    `run(requests)` is what answers; by default the SavedModel is loaded for this, in a `fresh` process or here.
    Numbers must agree to `atol + rtol * |expected|`, strings and whole numbers exactly; shapes must be equal.
    Returns `{"max_abs_error", "atol", "rtol", "signature", "process"}`. Raises VerificationError.
    """
    ask = functools.partial(run_fresh, directory) if fresh else run or loaded_here(directory)
    found = ask([(signature, inputs)])[0]
    worst = 0.0
    for name, value in expected.items():
        if name not in found:
            raise VerificationError(f"signature {signature!r} of {directory} gives no {name!r}; found {sorted(found)}.")
        worst = max(worst, _compare(f"{signature}/{name}", np.asarray(value), np.asarray(found[name]), atol, rtol))
    process = "fresh, TensorFlow and TensorFlow Text only" if fresh else "the exporting one"
    return {"max_abs_error": worst, "atol": atol, "rtol": rtol, "signature": signature, "process": process}


def run_here(directory: str | os.PathLike, requests: Sequence[tuple[str, Mapping]]) -> list[dict[str, np.ndarray]]:
    """Runs (signature, inputs) pairs in this process."""
    return loaded_here(directory)(requests)


def loaded_here(directory: str | os.PathLike) -> Callable[[Sequence], list[dict[str, np.ndarray]]]:
    """A function that runs (signature, inputs) pairs in this process, on a SavedModel loaded once, when asked."""

    @functools.cache
    def model():
        text_ops.load()
        return fresh_script.load(directory)

    return lambda requests: fresh_script.run(model(), requests)


def run_fresh(
    directory: str | os.PathLike, requests: Sequence[tuple[str, Mapping]], timeout: float = 600.0
) -> list[dict[str, np.ndarray]]:
    """Runs (signature, inputs) pairs in a new process from which Keras and tfvllm are hidden.

    Raises TfvllmError with the process's last words when it fails, and VerificationError when a hidden package was
    loaded after all.
    """
    return run_fresh_each([(directory, requests)], timeout)[0]


def run_fresh_each(
    asked: Sequence[tuple[str | os.PathLike, Sequence[tuple[str, Mapping]]]],
    timeout: float = 600.0,
    *,
    keep_errors: bool = False,
) -> list[list[dict[str, np.ndarray]]]:
    """The same for several SavedModels, one after the other in one new process: (directory, requests) of each.

    `keep_errors`: where one fails its TfvllmError stands in the place of its answers, and the others go on.
    """
    jobs = [(str(Path(where).resolve()), [(name, dict(inputs)) for name, inputs in each]) for where, each in asked]
    names = ", ".join(str(where) for where, _ in asked)
    with tempfile.TemporaryDirectory() as folder:
        request, result = Path(folder) / "request", Path(folder) / "result"
        request.write_bytes(pickle.dumps(jobs))
        command = [sys.executable, "-I", fresh_script.__file__, str(request), str(result)]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        process = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
        if process.returncode or not result.exists():
            raise _not_loading(names, (process.stderr.strip().splitlines() or ["no message"])[-1])
        found = pickle.loads(result.read_bytes())
    loaded = [name for name in fresh_script.HIDDEN if name in found["modules"]]
    if loaded:
        raise VerificationError(f"loading {names} imported {', '.join(loaded)}; expected TensorFlow alone.")
    answers: list[Any] = [
        _not_loading(where, answer) if isinstance(answer, str) else answer
        for (where, _), answer in zip(asked, found["answers"])
    ]
    for answer in answers:
        if isinstance(answer, TfvllmError) and not keep_errors:
            raise answer
    return answers


def _not_loading(where: object, words: str) -> TfvllmError:
    return TfvllmError(f"{where} does not load in a fresh process with TensorFlow alone: {words[:300]}")


def _compare(name: str, expected: np.ndarray, found: np.ndarray, atol: float, rtol: float) -> float:
    if expected.shape != found.shape:
        raise VerificationError(f"{name} has shape {found.shape}; the model gives {expected.shape}.")
    if expected.dtype.kind not in "fV" and str(expected.dtype) != "bfloat16":
        if expected.dtype.kind in "OSU":
            same = _bytes(expected) == _bytes(found)
        else:
            same = np.array_equal(expected, found)
        if not same:
            raise VerificationError(f"{name} differs from the model's own answer; expected it to be the same.")
        return 0.0
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    error = np.abs(expected - found)
    within = (error <= atol + rtol * np.abs(expected)) | (np.isnan(expected) & np.isnan(found)) | (expected == found)
    if not within.all():
        raise VerificationError(
            f"{name} differs from the model by {np.nanmax(error):.3g}; allowed is {atol:g} + {rtol:g} * |value|."
        )
    finite = error[np.isfinite(error)]
    return float(finite.max()) if finite.size else 0.0


def _bytes(array: np.ndarray) -> list[bytes]:
    return [value.encode() if isinstance(value, str) else bytes(value) for value in array.ravel().tolist()]

"""One SavedModel, some texts, answers: what `tfvllm predict` does."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfvllm.errors import InputError, TfvllmError
from tfvllm.serving import tensors
from tfvllm.serving.core import check_inputs, explained
from tfvllm.serving.servable import Servable, Signature, find_saved_model
from tfvllm.serving.status import ServingError


def predict(
    directory: str | os.PathLike,
    texts: Sequence[str],
    inputs: Mapping[str, Any] | None = None,
    *,
    signature: str = "serving_default",
    batch: int = 32,
) -> dict[str, Any]:
    """Runs a signature of the SavedModel in `directory` (or of its highest version).

    Args:
        texts: rows for the signature's text input (its only string input of one dimension), in runs of `batch`.
        inputs: the other inputs by name, as JSON-like values; a scalar goes to every run.

    Returns the outputs by name, as nested lists. Raises InputError for inputs that do not fit the signature.
    """
    servable = Servable(find_saved_model(directory))
    try:
        if signature not in servable.signatures:
            known = ", ".join(servable.signatures) or "none"
            raise InputError(f"{directory} has no signature {signature!r}; it has: {known}. Pass --signature NAME.")
        spec = servable.signatures[signature]
        for name in set(inputs or {}) - set(spec.inputs):
            if others := [other for other, found in servable.signatures.items() if name in found.inputs]:
                raise InputError(
                    f"signature {signature!r} has no input {name!r}; {' and '.join(others)} take it. "
                    f"Pass --signature {others[0]}."
                )
        try:
            requests = [
                check_inputs(spec, request) for request in _requests(spec, list(texts), dict(inputs or {}), batch)
            ]
        except ServingError as error:
            raise InputError(error.message) from None
        answers = []
        for request in requests:
            try:
                answers.append(servable.run(signature, request))
            except ServingError as error:
                kind = InputError if error.code in ("INVALID_ARGUMENT", "OUT_OF_RANGE") else TfvllmError
                reason = explained(error, spec, request).message
                raise kind(f"{directory} cannot run on this input: {reason}") from None
        joined: dict[str, Any] = {}
        for name in spec.outputs:
            parts = [answer[name] for answer in answers]
            if parts[0].ndim and len({part.shape[1:] for part in parts}) == 1:
                joined[name] = tensors.jsonable(np.concatenate(parts), name)
            elif parts[0].ndim:  # e.g. generated rows, padded to the longest of each run
                joined[name] = [row for part in parts for row in tensors.jsonable(part, name)]
            else:
                joined[name] = tensors.jsonable(parts[0], name)
        return joined
    finally:
        servable.close()


def _requests(spec: Signature, texts: list[str], inputs: dict[str, Any], batch: int) -> list[dict[str, np.ndarray]]:
    for name in inputs:
        if name not in spec.inputs:
            raise InputError(f"signature {spec.name!r} has no input {name!r}; it takes {_describe(spec)}.")
    given = {name: tensors.array_of(value, name, spec.inputs[name], "--input") for name, value in inputs.items()}
    if not texts:
        return [given]
    names = [
        name
        for name, item in spec.inputs.items()
        if item.dtype == "string" and item.shape is not None and len(item.shape) == 1
        if name not in given and name not in spec.defaults
    ]
    if len(names) != 1:
        raise InputError(
            f"signature {spec.name!r} has {len(names)} text inputs (string[?]); expected one. "
            f"It takes {_describe(spec)}."
        )
    rows = np.array([text.encode() for text in texts], object)
    return [{**given, names[0]: rows[i : i + batch]} for i in range(0, len(rows), batch)]


def _describe(spec: Signature) -> str:
    return ", ".join(f"{name}: {item.describe()}" for name, item in spec.inputs.items())

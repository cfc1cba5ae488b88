"""What a model is asked in practice: batch sizes and lengths of requests, recorded or given, and inputs like them.

A profile is a JSON-lines file, one kind of request a line:

    {"batch": 8, "length": 37, "count": 120}        120 requests of 8 rows, each of 37 tokens
    {"lengths": [12, 37, 9], "count": 5}            5 requests of 3 rows of 12, 37 and 9 tokens, padded to 37
    {"lengths": [12, 37, 9], "length": 64}          the same rows padded to 64; `count` is 1 where it is left out
    {"batch": 4}                                    for a model without a length, such as one of images
    {"inputs": {"text": ["good", "so bad"]}}        a real request: values by input name; `count` may stand beside it
    {"text": ["good", "so bad"]}                    the same, shorter

Tokens are counted as the model sees them, with the tokens that a tokenizer adds at the ends.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.graph import dims
from tfvllm.graph.ir import Graph, Value
from tfvllm.simplifier import example_inputs

MAX_KINDS = 12  # so many kinds of requests are measured; more are summed up
_LARGEST = 1 << 22  # tokens in one request: more is a mistake
_WORD = "the"  # one token in common vocabularies of English
_FIELDS = ("batch", "length", "lengths", "count", "inputs")


@dataclass(frozen=True)
class RequestShape:
    """One kind of request, and how many there are of it.

    `lengths` holds the tokens of each row, `length` what they are padded to; both are None for a model without a
    length. `inputs` is a real request: what is measured then, whatever its lengths are.
    """

    batch: int
    length: int | None = None
    lengths: tuple[int, ...] | None = None
    count: float = 1.0
    inputs: dict[str, Any] | None = None


def read(source: str | os.PathLike | Iterable[dict[str, Any]]) -> list[RequestShape]:
    """The kinds of requests of a profile: a JSON-lines file, or dicts like its lines.

    Raises:
        InputError: no such file, no line, or a line that is none of the forms above; it names the line.
    """
    where = "profile"
    if isinstance(source, (str, os.PathLike)):
        where = os.fspath(source)
        try:
            with open(source, encoding="utf-8") as file:
                lines = [(n, line) for n, line in enumerate(file, 1) if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{where}: expected a JSON-lines file of requests: {error}.") from None
        rows: list[tuple[int, Any]] = []
        for number, line in lines:
            try:
                rows.append((number, json.loads(line)))
            except ValueError as error:
                raise InputError(f"{where}, line {number}: expected one JSON object, found {error}.") from None
    else:
        rows = list(enumerate(source, 1))
    if not rows:
        raise InputError(f'{where}: expected a line such as {{"batch": 8, "length": 37, "count": 120}}, found none.')
    return [_kind(row, f"{where}, line {number}") for number, row in rows]


def _kind(row: Any, where: str) -> RequestShape:
    if not isinstance(row, dict) or not row:
        raise InputError(f"{where}: expected one JSON object, found {json.dumps(row, default=str)[:80]}.")
    count = row.get("count", 1)
    if isinstance(count, bool) or not isinstance(count, (int, float)) or not 0 < count < math.inf:
        raise InputError(f"{where}: count: expected a number above 0, found {count!r}.")
    if not {"batch", "lengths"} & set(row):
        inputs = row["inputs"] if "inputs" in row else {k: v for k, v in row.items() if k != "count"}
        if not isinstance(inputs, dict) or not inputs or "length" in inputs:
            raise InputError(
                f"{where}: expected batch (and length), lengths, or the inputs of a request, "
                f"found {', '.join(sorted(map(str, row)))}."
            )
        shapes = [np.shape(v) for v in inputs.values()]
        return RequestShape(next((s[0] for s in shapes if s), 1), count=float(count), inputs=inputs)
    unknown = sorted(set(row) - set(_FIELDS))
    if unknown:
        raise InputError(f"{where}: expected {', '.join(_FIELDS)}, found {unknown[0]!r}.")
    lengths = row.get("lengths")
    if lengths is not None:
        if not isinstance(lengths, list) or not lengths or not all(_whole(n) for n in lengths):
            raise InputError(f"{where}: lengths: expected a list of whole numbers above 0, found {lengths!r}.")
        batch, length = row.get("batch", len(lengths)), row.get("length", max(lengths))
        if batch != len(lengths) or not _whole(length) or length < max(lengths):
            raise InputError(
                f"{where}: expected batch {len(lengths)} and a length of {max(lengths)} or more for these lengths, "
                f"found batch {batch!r} and length {length!r}."
            )
    else:
        batch, length = row["batch"], row.get("length")
        if not _whole(batch) or not (length is None or _whole(length)):
            raise InputError(
                f"{where}: batch and length: expected whole numbers above 0, found {batch!r} and {length!r}."
            )
    if batch * (length or 1) > _LARGEST:
        raise InputError(f"{where}: expected at most {_LARGEST} tokens in one request, found {batch * length}.")
    return RequestShape(batch, length, None if lengths is None else tuple(lengths), float(count))


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def cluster(kinds: Sequence[RequestShape], most: int = MAX_KINDS) -> list[RequestShape]:
    """At most `most` kinds that stand for all, none forgotten.

    Kinds of the same batch, length and share of padding are one; where that leaves too many, those that are alike by a
    factor of √2 in both, then of 2, of 4, and so on. The middle one, by tokens, stands for its group.
    """

    def group(key: Callable[[RequestShape], Any]) -> list[list[RequestShape]]:
        found: dict[Any, list[RequestShape]] = {}
        for kind in kinds:
            found.setdefault(key(kind), []).append(kind)
        return list(found.values())

    groups = group(lambda k: (k.batch, k.length, _share(k)))
    octaves = 0.5

    def alike(kind: RequestShape) -> Any:
        return (
            round(math.log2(kind.batch) / octaves),
            round(math.log2(kind.length or 1) / octaves),
            _share(kind, octaves),
        )

    while len(groups) > most:
        groups = group(alike)
        octaves *= 2
    return sorted(map(_representative, groups), key=lambda k: (k.batch * (k.length or 1), k.batch))


def _share(kind: RequestShape, coarseness: float = 0.5) -> int:
    """How much of the request is padding: in quarters, or more coarsely."""
    if kind.lengths is None or not kind.length:
        return 0
    return round(2 * (1 - sum(kind.lengths) / (kind.batch * kind.length)) / coarseness)


def _representative(group: list[RequestShape]) -> RequestShape:
    """The middle one by tokens, each counted as often as it comes."""
    ordered = sorted(group, key=lambda k: (k.batch * (k.length or 1), k.batch))
    total, seen = sum(k.count for k in group), 0.0
    for kind in ordered:
        seen += kind.count
        if 2 * seen >= total:
            break
    return replace(kind, count=total)


# -------------------------------------------------------------------------------------------------------------- inputs


def sample(graph: Graph, kind: RequestShape, measured: Callable[[list[Any]], tuple[int, int | None]]) -> list[Any]:
    """A request of this kind: arrays in the order of the graph's inputs.

    Ids are random, masks 1 at a row's tokens and 0 after them, texts as many words as make the wanted tokens.

    Args:
        measured: (batch, length) of a request as the graph sees it; for texts, whose tokens only the graph can count.

    Raises:
        InputError: the request lacks an input, or an input's rank is unknown.
    """
    if kind.inputs is not None:
        if set(kind.inputs) != set(graph.inputs):
            raise InputError(
                f"profile: expected requests with the inputs {', '.join(graph.inputs)}, "
                f"found {', '.join(sorted(kind.inputs))}."
            )
        return [_array(kind.inputs[name], name, value) for name, value in graph.inputs.items()]
    rows = (kind.length,) * kind.batch if kind.lengths is None else kind.lengths
    if any(v.dtype == tf.string for v in graph.inputs.values()) and kind.length is not None and kind.batch:
        words: list[int] = [int(n or 1) for n in rows]
        made = _made(graph, kind, words)
        for _ in range(3):  # a tokenizer adds tokens at the ends, and may cut words
            found = measured(made)[1]
            if found is None or found == max(int(n or 1) for n in rows):
                break
            extra = found - max(int(n or 1) for n in rows)
            words = [max(1, n - extra) for n in words]
            made = _made(graph, kind, words)
        return made
    return _made(graph, kind, [int(n or 1) for n in rows])


def _array(given: Any, name: str, value: Value) -> Any:
    try:
        if value.dtype == tf.string:
            flat = np.asarray(given, dtype=object)
            return np.vectorize(lambda t: t if isinstance(t, bytes) else str(t).encode(), otypes=[object])(flat)
        return np.asarray(given).astype(value.dtype.as_numpy_dtype)
    except (ValueError, TypeError) as error:
        raise InputError(f"profile: input {name}: expected {value.dtype.name}: {error}.") from None


def _made(graph: Graph, kind: RequestShape, rows: list[int]) -> list[Any]:
    rng = np.random.default_rng(11)
    made = []
    for name, value in graph.inputs.items():
        if value.shape is None:
            raise InputError(f"profile: the rank of input {name} is unknown; give real requests, with their inputs.")
        shape = tuple(
            d if isinstance(d, int) else kind.batch if axis == 0 else (kind.length or 1)
            for axis, d in enumerate(value.shape)
        )
        if value.dtype == tf.string:
            made.append(example_inputs.made_up(rng, graph, value, shape, [" ".join([_WORD] * n) for n in rows]))
            continue
        array = example_inputs.made_up(rng, graph, value, shape)
        if len(shape) == 2 and len(rows) == shape[0] and isinstance(value.shape[1], dims.Dim):
            real = np.arange(shape[1])[None, :] < np.asarray(rows)[:, None]
            if value.dtype == tf.bool or "mask" in name:
                array = real.astype(value.dtype.as_numpy_dtype)
            elif value.dtype.is_integer:
                array = np.where(real, array, 0).astype(value.dtype.as_numpy_dtype)
        made.append(array)
    return made

"""Inputs made up for a graph: batches and lengths of several kinds, ids within bounds, masks, texts."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.graph.ir import Graph, Node, Value
from tfvllm.simplifier import composites

TEXTS = (
    "a gripping, beautifully acted film",
    "",
    "not bad, but far too long; I would not watch it again.",
    "这家酒店的服务很好，但是房间太小了。",
    "naïve café résumé — “quotes” … 😀",
    "x",
    "the the the the the the the the the the the the the the the the the the the the the the the the",
)
SIZES = ((1, 16), (3, 7), (2, 1), (5, 33))
LONG = ((2, 128), (1, 512))  # for models to which the others are too short


def generate(
    graph: Graph, seed: int = 7, sizes: Sequence[tuple[int, int]] = SIZES, specs: Any = None
) -> Iterable[list[Any]]:
    """Inputs of several batch and sequence sizes: batch 1, odd sizes, padded rows, the largest and smallest ids.

    `specs` tells which inputs are the components of ragged and sparse arguments.
    """
    rng = np.random.default_rng(seed)
    bounds = {name: _bound(graph, value) for name, value in graph.inputs.items()}
    made = set()
    for batch, length in sizes:
        sample = []
        for name, value in graph.inputs.items():
            if value.shape is None:
                return
            shape = tuple(
                d if isinstance(d, int) else batch if axis == 0 else length for axis, d in enumerate(value.shape)
            )
            sample.append(_array(rng, graph, value, shape, bounds[name]))
        _put_composites(rng, graph, specs, batch, length, sample)
        key = tuple(np.shape(a) for a in sample)
        if key not in made:
            made.add(key)
            yield sample
    if graph.inputs and all(key == k for k in made for key in made):  # nothing varies: other values, same shape
        yield [_array(rng, graph, v, np.shape(a), bounds[n]) for (n, v), a in zip(graph.inputs.items(), sample)]


def _put_composites(rng, graph: Graph, specs: Any, batch: int, length: int, sample: list[Any]) -> None:
    values, first = list(graph.inputs.values()), 0
    for spec in tf.nest.flatten(specs):
        if not isinstance(spec, tf.TypeSpec):
            continue
        inputs = values[first:]
        made = composites.components(
            *(spec, batch, length), functools.partial(lambda ins, i, shape: made_up(rng, graph, ins[i], shape), inputs)
        )
        if made is not None:
            sample[first : first + len(made)] = made
        first += len(tf.nest.flatten(spec, expand_composites=True))


def made_up(rng, graph: Graph, value: Value, shape: tuple[int, ...], texts: Sequence[str] = TEXTS) -> Any:
    """An array of the given shape for one of a graph's inputs, as `generate` makes them; strings take turns."""
    return _array(rng, graph, value, shape, _bound(graph, value), texts)


def _array(
    rng, graph: Graph, value: Value, shape: tuple[int, ...], bound: int | None, strings: Sequence[str] = TEXTS
) -> Any:
    dtype = value.dtype
    if dtype == tf.string:
        count = int(np.prod(shape, dtype=np.int64))
        texts = [strings[i % len(strings)].encode() for i in range(count)]
        parser = next((r for r in graph.uses(value) if r.op == "ParseExampleV2"), None)
        if parser is not None:
            texts = [_example(graph, parser, text) for text in texts]
        return np.array(texts, dtype=object).reshape(shape)
    if dtype == tf.bool:
        return _padding(shape).astype(bool)
    if dtype.is_integer:
        if bound is None or bound <= 2:
            mask = _padding(shape) if bound is None else rng.integers(0, bound, shape)
            return mask.astype(dtype.as_numpy_dtype)
        ids = rng.integers(0, bound, shape)
        if ids.size > 1:
            ids.flat[0], ids.flat[-1] = bound - 1, 0
        return ids.astype(dtype.as_numpy_dtype)
    return rng.standard_normal(shape).astype(dtype.as_numpy_dtype)


def _example(graph: Graph, parser: Node, text: bytes) -> bytes:
    """A serialised tf.Example with every dense feature the parser asks for."""
    keys = graph.constant(parser.inputs[3])
    example = tf.train.Example()
    for key, dtype in zip([] if keys is None else keys.ravel(), parser.attr("Tdense", [])):
        feature = example.features.feature[key.decode()]
        if dtype == tf.string:
            feature.bytes_list.value.append(text)
        elif dtype.is_floating:
            feature.float_list.value.append(0.5)
        else:
            feature.int64_list.value.append(1)
    return example.SerializeToString()


def _padding(shape: tuple[int, ...]) -> np.ndarray:
    """Ones with the ends of later rows zero, as a padding mask is."""
    mask = np.ones(shape, np.int64)
    if len(shape) >= 2:
        for row in range(shape[0]):
            mask[row, ..., max(1, shape[-1] - row * max(1, shape[-1] // 4)) :] = 0
    return mask


def _bound(graph: Graph, value: Value) -> int | None:
    """The number of rows of the smallest table that an integer input indexes; None where it indexes none."""
    if not value.dtype.is_integer:
        return None
    found: list[int] = []
    seen: set[Node] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        for reader, position in current.uses:
            if reader.op in ("GatherV2", "ResourceGather", "Gather", "GatherNd") and position == 1:
                table = reader.inputs[0].shape
                if reader.op == "ResourceGather":
                    capture = graph.captures.get(reader.inputs[0].node.name)
                    table = tuple(capture.owner.shape.as_list()) if capture and capture.owner is not None else None
                if table and isinstance(table[0], int):
                    found.append(table[0])
            elif reader not in seen and reader.op in (
                *("Cast", "SelectV2", "AddV2", "Identity", "Reshape", "ExpandDims", "Sub", "Maximum", "Minimum"),
                *("Squeeze", "StopGradient", "Bitcast", "Snapshot"),
            ):
                seen.add(reader)
                if reader.output.dtype.is_integer:
                    stack.append(reader.output)
    return min(found) if found else None

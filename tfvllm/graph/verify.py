"""The original against the rewritten graph, on the user's inputs or on generated ones.

The yardstick is the original itself, evaluated in float64: how far the original's own float32 rounding lies from it
says how far a graph that adds the same terms in another order may lie. Where the float64 evaluation is not possible
(an op without a float64 kernel), a fixed relative tolerance takes its place, and the report says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.graph import composites, convert, functions, memory, ops
from tfvllm.graph.arguments import pack
from tfvllm.graph.ir import Graph, Node, Value

TEXTS = (
    "a gripping, beautifully acted film",
    "",
    "not bad, but far too long; I would not watch it again.",
    "这家酒店的服务很好，但是房间太小了。",
    "naïve café résumé — “quotes” … 😀",
    "x",
    "the the the the the the the the the the the the the the the the the the the the the the the the",
)
ROUNDING = 16.0  # how many times the original's own rounding error a reordered result may be off
FLOOR = 32.0  # and never less than so many units in the last place of the largest result


@dataclass
class Comparison:
    """What the comparison found over all samples and outputs."""

    samples: int = 0
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0  # relative to the largest magnitude of the output
    tolerance: float = 0.0  # the absolute tolerance at the worst place
    yardstick: str = "float64"
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "max_abs_error": self.max_abs_error,
            "max_rel_error": self.max_rel_error,
            "tolerance": self.tolerance,
            "yardstick": self.yardstick,
            "ok": self.ok,
            "failures": self.failures[:10],
        }


class Verifier:
    """Holds one function's original, its samples and reference results; compares candidates with them.

    Args:
        graph: the original.
        specs: (args, kwargs) of TensorSpecs, as for `convert.to_concrete`.
        samples: lists of arrays, in the order of the graph's inputs; generated if None.
        rtol, atol: fixed tolerances in place of the float64 yardstick. rtol is relative to an output's largest
            magnitude.
        slack: allowed on top, relative to the largest magnitude: what approximate rules promise.
    """

    def __init__(
        self,
        graph: Graph,
        specs: tuple[tuple, dict],
        samples: Sequence[Sequence[Any]] | None = None,
        rtol: float | None = None,
        atol: float | None = None,
    ):
        self.graph, self.specs = graph, specs
        self.rtol, self.atol = rtol, atol
        self.original = convert.to_concrete(graph, specs, pack=list)
        given = samples is not None
        self.samples: list[list[Any]] = []
        self.references: list[list[np.ndarray]] = []
        first_error: Exception | None = None
        for sample in samples if given else generate(graph, specs=specs):  # type: ignore[union-attr]
            try:
                results = self.run(self.original, sample)
            except (tf.errors.OpError, ValueError) as error:
                if given:
                    raise InputError(f"the original model fails on the given input: {_line(error)}") from error
                first_error = first_error or error
                continue
            self.samples.append(list(sample))
            self.references.append(results)
        if not self.samples:
            raise InputError(
                "the original model fails on every generated input "
                f"({_line(first_error) if first_error else 'none could be made'}); "
                "pass real ones: --calibration FILE (calibration=[…])."
            )
        self.exact = self._float64()
        memory.trim()

    def run(self, function: Any, sample: Sequence[Any]) -> list[np.ndarray]:
        """The results of a function with this signature on a sample."""
        tensors = [tf.convert_to_tensor(a, v.dtype) for a, v in zip(sample, self.graph.inputs.values())]
        args, kwargs = self.specs
        packed = pack((args, kwargs), tensors)
        return [r.numpy() for r in function(*packed[0], **packed[1])]

    def _float64(self) -> list[list[np.ndarray]] | None:
        if self.rtol is not None or self.atol is not None:
            return None
        try:
            wide = to_float64(self.graph)
            function = convert.to_concrete(wide, _wide_specs(self.specs), pack=list)
            results = []
            for sample in self.samples:
                tensors = [
                    tf.convert_to_tensor(np.asarray(a, np.float64) if v.dtype == tf.float32 else a, w.dtype)
                    for a, v, w in zip(sample, self.graph.inputs.values(), wide.inputs.values())
                ]
                packed = pack(_wide_specs(self.specs), tensors)
                results.append([r.numpy() for r in function(*packed[0], **packed[1])])
            return results
        except (tf.errors.OpError, ValueError, TypeError, KeyError, InputError):
            return None

    def compare(self, graph: Graph, slack: float = 0.0) -> Comparison:
        """Runs a rewritten graph on every sample. `slack`: what approximate rules add, relative."""
        result = Comparison(yardstick="float64" if self.exact is not None else "fixed tolerance")
        function = convert.to_concrete(graph, self.specs, pack=list)
        for i, sample in enumerate(self.samples):
            result.samples += 1
            try:
                found = self.run(function, sample)
            except tf.errors.OpError as error:
                result.failures.append(f"the rewritten graph fails on sample {i}: {_line(error)}")
                continue
            wide = self.exact[i] if self.exact is not None else [None] * len(found)
            for name, new, old, exact in zip(self.graph.outputs, found, self.references[i], wide):
                self._compare(result, f"{name}, sample {i}", new, old, exact, slack)
        return result

    def calls(self, graph: Graph) -> list[Callable[[], Any]]:
        """For timing: one call for each sample, its arguments converted already."""
        function = convert.to_concrete(graph, self.specs, pack=list)
        made: list[Callable[[], Any]] = []
        for sample in self.samples:
            tensors = [tf.convert_to_tensor(a, v.dtype) for a, v in zip(sample, self.graph.inputs.values())]
            args, kwargs = pack(self.specs, tensors)
            made.append(functools.partial(function, *args, **kwargs))
        return made

    def _compare(self, result: Comparison, where: str, new, old, exact, slack: float) -> None:
        if new.shape != old.shape or new.dtype != old.dtype:
            result.failures.append(f"{where}: {new.dtype}{new.shape} instead of {old.dtype}{old.shape}")
            return
        if old.dtype.kind not in "fV" and old.dtype != tf.bfloat16.as_numpy_dtype:
            if not np.array_equal(new, old):
                result.failures.append(f"{where}: {int(np.sum(new != old))} of {old.size} values differ")
            return
        new, old = new.astype(np.float64), old.astype(np.float64)
        if not np.array_equal(np.isnan(new), np.isnan(old)):
            result.failures.append(f"{where}: NaN in other places")
            return
        infinite = np.isinf(old) | np.isinf(new)
        if not np.array_equal(new[infinite], old[infinite], equal_nan=True):
            result.failures.append(f"{where}: infinities in other places")
            return
        finite = np.isfinite(old) & np.isfinite(new)
        if not finite.any():
            return
        new, old = new[finite], old[finite]
        scale = float(np.max(np.abs(old)))
        tolerance = self._tolerance(old, exact[finite] if exact is not None else None, scale) + slack * scale
        reference = exact[finite] if exact is not None and np.all(np.isfinite(exact[finite])) else old
        error = float(np.max(np.abs(new - reference)))
        apart = float(np.max(np.abs(new - old)))
        result.max_abs_error = max(result.max_abs_error, apart)
        result.max_rel_error = max(result.max_rel_error, apart / scale if scale else 0.0)
        result.tolerance = max(result.tolerance, tolerance)
        if error > tolerance:
            result.failures.append(f"{where}: off by {error:.3g}, allowed {tolerance:.3g}")

    def _tolerance(self, old: np.ndarray, exact: np.ndarray | None, scale: float) -> float:
        if self.rtol is not None or self.atol is not None:
            return (self.atol or 0.0) + (self.rtol or 0.0) * scale
        eps = float(np.finfo(np.float32).eps)
        if exact is None or not np.all(np.isfinite(exact)):
            return 1e-4 * scale + 1e-7
        own = float(np.max(np.abs(old - exact)))
        return ROUNDING * own + FLOOR * eps * max(scale, float(np.finfo(np.float32).tiny))


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _wide_specs(specs):
    def widen(spec):
        if isinstance(spec, tf.TensorSpec) and spec.dtype == tf.float32:
            return tf.TensorSpec(spec.shape, tf.float64, spec.name)
        if isinstance(spec, tf.SparseTensorSpec) and spec.dtype == tf.float32:
            return tf.SparseTensorSpec(spec.shape, tf.float64)
        if isinstance(spec, tf.RaggedTensorSpec) and spec.dtype == tf.float32:
            return tf.RaggedTensorSpec(spec.shape, tf.float64, spec.ragged_rank, spec.row_splits_dtype)
        return spec

    return tf.nest.map_structure(widen, specs)


def to_float64(graph: Graph) -> Graph:
    """The same graph computed in float64: float32 constants, arguments and weights are widened, and every op's type."""
    wide = graph.copy()
    settled = _widen_weights(wide)
    for node in list(wide.nodes.values()):
        if any(a.WhichOneof("value") == "func" or a.list.func for a in node.attrs.values()):
            _widen_functions(wide, node)
        if node in settled:
            continue
        for key, attr in list(node.attrs.items()):
            if attr.WhichOneof("value") == "type" and attr.type == tf.float32.as_datatype_enum:
                node.attrs[key] = ops.python_to_attr(tf.float64, "type")
            elif attr.WhichOneof("value") == "list" and tf.float32.as_datatype_enum in attr.list.type:
                types = [tf.float64 if t == tf.float32.as_datatype_enum else t for t in attr.list.type]
                node.attrs[key] = ops.python_to_attr(types, "list(type)")
        if node.op == "Const" and node.output.dtype == tf.float32:
            node.attrs["value"] = ops.python_to_attr(node.attr("value").astype(np.float64), "tensor")
        for value in node.outputs:
            if value.dtype == tf.float32:
                value.dtype = tf.float64
    return wide


def _widen_weights(wide: Graph) -> set[Node]:
    """Puts a cast to float64 where a float32 weight is used; returns the nodes that stay in float32, and the casts.

    Each use has a cast of its own, which waits for its turn: all weights widened at once would be twice the model
    beside it. Of a table that is looked up in, only the rows found are widened.
    """
    settled: set[Node] = set()
    for node in list(wide.nodes.values()):
        if node.op not in ("ReadVariableOp", "ResourceGather") or node.output.dtype != tf.float32:
            continue
        weight = node.output
        found = [r for r, position in weight.readers if r.op == "GatherV2" and position == 0]
        settled.update((node, *found))
        for value in (weight, *(r.output for r in found)):
            uses = [use for use in value.readers if use[0] not in settled]
            for reader, position in uses:
                cast = wide.add(f"{value.node.name}/wide", "Cast", [value], {"SrcT": tf.float32, "DstT": tf.float64})
                wide.set_input(reader, position, cast.output)
                if value is weight:
                    _delay(wide, cast)
                settled.add(cast)
            for key in [k for k, v in wide.outputs.items() if v is value]:
                cast = wide.add(f"{value.node.name}/wide", "Cast", [value], {"SrcT": tf.float32, "DstT": tf.float64})
                wide.outputs[key] = cast.output
                settled.add(cast)
    return settled


def _widen_functions(wide: Graph, node: Node) -> None:
    """Widens the bodies of a loop or the branches of a choice; other functions cannot be widened."""
    if node.op not in functions.CONTROL_FLOW:
        raise ValueError(f"{node.op} calls a function in float32")
    shapes = functions.argument_shapes(node)
    for key in functions.CONTROL_FLOW[node.op]:
        renamed = {}
        for name in functions.names_in(node, key):
            inner = to_float64(functions.from_definition(wide, name, shapes))
            definition = functions.to_definition(inner, wide.library[name])
            wide.library.update(inner.library)
            wide.library[definition.signature.name] = definition
            renamed[name] = definition.signature.name
        functions.rename(node, key, renamed)


def _delay(graph: Graph, cast: Node) -> None:
    """Lets a weight be widened only when the other operand of what it goes into is there."""
    reader = graph.sole_reader(cast.output)
    while reader is not None and len(reader.outputs) == 1 and graph.is_static(reader.output):
        reader = graph.sole_reader(reader.output)
    if reader is not None:
        others = (v.node for v in reader.inputs if not graph.is_static(v))
        cast.controls = [n for n in others if n.op != "Placeholder"][:1]  # arguments are there from the start


# ------------------------------------------------------------------------------------------------------ made-up inputs


def generate(graph: Graph, seed: int = 7, specs: Any = None) -> Iterable[list[Any]]:
    """Inputs of several batch and sequence sizes: batch 1, odd sizes, padded rows, the largest and smallest ids.

    `specs` tells which inputs are the components of ragged and sparse arguments.
    """
    rng = np.random.default_rng(seed)
    bounds = {name: _bound(graph, value) for name, value in graph.inputs.items()}
    sizes = [(1, 16), (3, 7), (2, 1), (5, 33)]
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
        parser = next((r for r in graph.readers(value) if r.op == "ParseExampleV2"), None)
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
        for reader, position in current.readers:
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

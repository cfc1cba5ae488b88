"""What a simplified function may be called with: nested as the original's arguments, and checked tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError

REAL_INPUTS = "inputs=… (of a SavedModel: calibration=…)"
_NEXT = "Pass it so, or simplify the model with inputs=… of that kind."
_KINDS = {"b": 0, "u": 1, "i": 1, "f": 2, "c": 3}  # a kind holds the kinds before it


class Arguments:
    """The arguments of one function, and what callers may pass in their place.

    Args:
        specs: (args, kwargs) of `tf.TypeSpec`s, None and Python values, as `structured_input_signature` has them.
        names: the names of the positional arguments, under which they may be passed too.
        keras: whether to be as lenient as a Keras model: inputs by name, tensors of other numeric types, a last axis of
            one that is missing or too many.
    """

    def __init__(self, specs: tuple[tuple, dict], names: Sequence[str] = (), keras: bool = False):
        self.specs, self.names, self.keras = specs, tuple(names), keras

    @classmethod
    def of(cls, function: Any, keras: bool = False) -> Arguments:
        """Those of a `ConcreteFunction`."""
        parameters = getattr(getattr(function, "function_type", None), "parameters", {}).values()
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        return cls(function.structured_input_signature, positional, keras)

    def fit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The same arguments as tensors of the specs' dtypes, every one in its place.

        Raises InputError where one is missing, unknown, or of another structure, dtype or shape.
        """
        positional, named = self.specs
        kwargs = dict(kwargs)
        if self.keras and "training" not in named and not kwargs.get("training"):
            kwargs.pop("training", None)  # the graph is that of inference
        if not positional and len(named) == 1 and len(args) == 1 and not kwargs:
            kwargs = {next(iter(named)): args[0]}  # as signatures of one input are called
            args = ()
        if len(args) > len(positional):
            raise InputError(
                f"expected {len(positional)} positional arguments, found {len(args)}; the arguments are {self}."
            )
        given: list[Any] = list(args)
        for number in range(len(args), len(positional)):
            name = self.names[number] if number < len(self.names) else None
            given.append(self._named(kwargs, name or f"argument {number}", positional[number]))
        by_name = {name: self._named(kwargs, name, spec) for name, spec in named.items()}
        if kwargs:
            raise InputError(f"unexpected argument {next(iter(kwargs))!r}; the arguments are {self}.")
        labels = [*self.names, *(f"argument {n}" for n in range(len(self.names), len(positional)))]
        return (
            tuple(self._fit(s, g, label) for s, g, label in zip(positional, given, labels)),
            {name: self._fit(spec, by_name[name], name) for name, spec in named.items()},
        )

    def __str__(self) -> str:
        positional, named = self.specs
        labels = [*self.names, *(f"argument {n}" for n in range(len(self.names), len(positional)))]
        return ", ".join(f"{k}: {_describe_spec(s)}" for k, s in [*zip(labels, positional), *named.items()])

    def _named(self, kwargs: dict[str, Any], name: str, spec: Any) -> Any:
        if name in kwargs:
            return kwargs.pop(name)
        if any(isinstance(leaf, tf.TypeSpec) for leaf in tf.nest.flatten(spec)):
            raise InputError(f"{name} is missing; the arguments are {self}.")
        return spec  # None, or a Python value, that the graph was made with

    def _fit(self, spec: Any, given: Any, where: str) -> Any:
        if isinstance(spec, tf.TypeSpec):
            if self.keras and isinstance(given, Mapping) and spec.name in given:
                given = given[spec.name]
            elif self.keras and isinstance(given, (list, tuple)) and len(given) == 1 and tf.is_tensor(given[0]):
                given = given[0]
            return self._tensor(spec, given, where)
        if isinstance(spec, Mapping):
            if not isinstance(given, Mapping):
                raise self._unlike(spec, given, where)
            missing = [k for k in spec if k not in given]
            surplus = [] if self.keras else [k for k in given if k not in spec]
            if missing or surplus:
                what = f"no {missing[0]!r}" if missing else f"an unknown {surplus[0]!r}"
                raise InputError(f"{where}: expected {_describe_spec(spec)}, found {what}. {_NEXT}")
            return {k: self._fit(s, given[k], f"{where}[{k!r}]") for k, s in spec.items()}
        if isinstance(spec, (list, tuple)):
            if self.keras and isinstance(given, Mapping):
                names = [getattr(s, "name", None) for s in spec]
                if all(n in given for n in names):
                    given = [given[n] for n in names]
            if isinstance(given, Mapping) or not isinstance(given, (list, tuple)) or len(given) != len(spec):
                raise self._unlike(spec, given, where)
            items = [self._fit(s, g, f"{where}[{n}]") for n, (s, g) in enumerate(zip(spec, given))]
            return type(spec)(*items) if hasattr(spec, "_fields") else type(spec)(items)
        if given is spec or (type(given) is type(spec) and given == spec):
            return given
        raise InputError(
            f"{where}: the graph was made with {spec!r}, found {_describe(given)}; simplify the model with that value."
        )

    def _tensor(self, spec: tf.TypeSpec, given: Any, where: str) -> Any:
        tensor = None if given is None else self._convert(spec, given)
        if tensor is not None and self.keras and isinstance(spec, tf.TensorSpec):
            tensor = _with_rank(tensor, spec)
        if tensor is None or not spec.is_compatible_with(tensor):
            raise self._unlike(spec, given, where)
        return tensor

    def _convert(self, spec: tf.TypeSpec, given: Any) -> Any:
        """As a tensor of the spec's kind and dtype; None where it is no such thing."""
        if isinstance(spec, tf.RaggedTensorSpec):
            if not isinstance(given, tf.RaggedTensor):
                return None
            return given.with_row_splits_dtype(spec.row_splits_dtype)
        if not isinstance(spec, tf.TensorSpec) or isinstance(given, (tf.RaggedTensor, tf.SparseTensor)):
            return given if spec.is_compatible_with(given) else None
        if tf.is_tensor(given) or isinstance(given, tf.Variable):
            given = tf.convert_to_tensor(given)
            if given.dtype == spec.dtype:
                return given
            if not self.keras or not _holds(given.dtype, spec.dtype):
                return None
            array = given.numpy() if hasattr(given, "numpy") else None
            return None if array is not None and not _survives(array, spec.dtype) else tf.cast(given, spec.dtype)
        try:
            array = np.asarray(given)
            number = array.dtype.kind in _KINDS and spec.dtype != tf.string
            if number and not (_holds(tf.as_dtype(array.dtype), spec.dtype) and _survives(array, spec.dtype)):
                return None
            return tf.convert_to_tensor(given, spec.dtype)
        except (TypeError, ValueError, tf.errors.OpError):
            return None

    def _unlike(self, spec: Any, given: Any, where: str) -> InputError:
        return InputError(f"{where}: expected {_describe_spec(spec)}, found {_describe(given)}. {_NEXT}")


def spec_of(array: Any) -> tf.TypeSpec | None:
    """What a graph that is traced with `array` takes in its place: the first axis is free."""
    if array is None or isinstance(array, tf.TypeSpec):
        return array
    if isinstance(array, (tf.RaggedTensor, tf.SparseTensor)):
        spec = tf.type_spec_from_value(array)
        shape = [None, *spec.shape[1:]]
        if isinstance(spec, tf.SparseTensorSpec):
            return tf.SparseTensorSpec(shape, spec.dtype)
        return tf.RaggedTensorSpec(shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype)
    tensor = tf.convert_to_tensor(array)
    return tf.TensorSpec([None, *tensor.shape[1:]] if tensor.shape.rank else [], tensor.dtype)


def spec_of_input(tensor: Any) -> tf.TypeSpec:
    """What a Keras model's symbolic input stands for."""
    if getattr(tensor, "sparse", False):
        return tf.SparseTensorSpec(tensor.shape, tensor.dtype)
    if getattr(tensor, "ragged", False):
        rank, splits = getattr(tensor, "ragged_rank", None), getattr(tensor, "row_splits_dtype", None)
        return tf.RaggedTensorSpec(tensor.shape, tensor.dtype, rank or 1, splits or tf.int64)
    return tf.TensorSpec(tensor.shape, tensor.dtype, name=tensor.name.split(":")[0])


def pack(specs: Any, tensors: Sequence[Any]) -> Any:
    """The inputs of a graph, in order, nested as `specs`; what is no tensor there stays as it is."""
    given = iter(tensors)
    leaves = tf.nest.flatten(specs, expand_composites=True)
    filled = [next(given) if isinstance(leaf, tf.TypeSpec) else leaf for leaf in leaves]
    return tf.nest.pack_sequence_as(specs, filled, expand_composites=True)


def flat(inputs: Any) -> list[np.ndarray]:
    """The arrays of nested example inputs, ragged and sparse ones by their components, as a graph takes them."""
    return [np.asarray(t) for t in tf.nest.flatten(inputs, expand_composites=True) if t is not None]


def _holds(given: tf.DType, wanted: tf.DType) -> bool:
    """Whether numbers of one kind may become those of another: not fractions integers, and no numbers strings."""
    before, after = (_KINDS.get("f" if d.is_floating else np.dtype(d.as_numpy_dtype).kind) for d in (given, wanted))
    if before is None or after is None:
        return given == wanted
    return before <= after or (before == 1 and after == 0)


def _survives(array: np.ndarray, dtype: tf.DType) -> bool:
    """Whether integers are the same numbers in another integer type."""
    if dtype.is_floating or dtype.is_complex or np.asarray(array).dtype.kind not in "bui":
        return True
    return bool(np.array_equal(np.asarray(array).astype(dtype.as_numpy_dtype), array))


def _with_rank(tensor: tf.Tensor, spec: tf.TensorSpec) -> tf.Tensor:
    """With a last axis of one added, or taken away, where that is all that is missing."""
    if tensor.shape.rank is None or spec.shape.rank is None:
        return tensor
    if tensor.shape.rank == spec.shape.rank - 1 and spec.shape[-1] == 1:
        return tf.expand_dims(tensor, -1)
    if tensor.shape.rank == spec.shape.rank + 1 and tensor.shape[-1] == 1:
        return tf.squeeze(tensor, -1)
    return tensor


def _describe_spec(spec: Any) -> str:
    if isinstance(spec, tf.TypeSpec):
        kind = {tf.RaggedTensorSpec: "a ragged ", tf.SparseTensorSpec: "a sparse "}.get(type(spec), "")
        return kind + _describe_tensor(spec.dtype, spec.shape) if hasattr(spec, "shape") else str(spec)
    if isinstance(spec, Mapping):
        return "{" + ", ".join(f"{k!r}: {_describe_spec(s)}" for k, s in spec.items()) + "}"
    if isinstance(spec, (list, tuple)):
        return "[" + ", ".join(_describe_spec(s) for s in spec) + "]"
    return repr(spec)


def _describe(given: Any) -> str:
    if isinstance(given, (tf.RaggedTensor, tf.SparseTensor)):
        kind = "a ragged " if isinstance(given, tf.RaggedTensor) else "a sparse "
        return kind + _describe_tensor(given.dtype, given.shape)
    if tf.is_tensor(given) or isinstance(given, (np.ndarray, np.generic, tf.Variable)):
        return _describe_tensor(given.dtype, given.shape)
    if isinstance(given, Mapping):
        return "{" + ", ".join(f"{k!r}: {_describe(v)}" for k, v in given.items()) + "}"
    if isinstance(given, (list, tuple)) and any(tf.is_tensor(g) or isinstance(g, np.ndarray) for g in given):
        return "[" + ", ".join(_describe(g) for g in given) + "]"
    if isinstance(given, (list, tuple)):
        try:
            array = np.asarray(given)
            return "a list like " + _describe_tensor(array.dtype, array.shape)
        except ValueError:
            return "a list with rows of different lengths"
    return repr(given)[:80]


def _describe_tensor(dtype: Any, shape: Any) -> str:
    name = dtype.name if hasattr(dtype, "name") else str(dtype)
    shape = tf.TensorShape(shape)
    sizes = "…" if shape.rank is None else ", ".join("?" if d is None else str(d) for d in shape)
    return f"{name}[{sizes}]"

"""What a model's output is: logits, a distribution over classes, or a probability for each class by itself.

A name or the place of a layer does not tell. Two witnesses do: the operations that made the output, followed back as
far as they keep what the values mean, and the values on a few made-up inputs. Where they disagree, or neither knows,
the caller is asked.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError

Kind = Literal["logits", "softmax", "sigmoid"]

_TEXTS = ("a fine and moving film", "no", "", "很好")
_SMALLEST = 1e-37  # of a probability whose logarithm is taken
_BELOW_ONE = 1.0 - 2.0**-24
_TOLERANCE = {"bfloat16": 2.0**-5, "float16": 2.0**-8}  # of a sum to one: four units in the last place


class Head(NamedTuple):
    """What the last axis of a model's output holds.

    Attributes:
        kind: "logits", "softmax" (probabilities that sum to one) or "sigmoid" (each a probability by itself).
    """

    kind: Kind

    @property
    def independent(self) -> bool:
        """Whether each output is a yes or no of its own."""
        return self.kind == "sigmoid"

    def logits(self, answer: tf.Tensor) -> tf.Tensor:
        """The logits behind the output: as Keras keeps them, or else log p (softmax) or log p − log(1 − p) (sigmoid).

        Args:
            answer: the model's output, [..., classes].
        Returns:
            [..., classes]; float32 unless the model itself had them.
        """
        if self.kind == "logits":
            return answer
        known = getattr(answer, "_keras_logits", None)
        if known is not None and known.shape.rank == answer.shape.rank and known.shape[-1] == answer.shape[-1]:
            return known
        p = tf.cast(answer, tf.float32)
        if self.kind == "softmax":
            return tf.math.log(tf.maximum(p, _SMALLEST))
        p = tf.clip_by_value(p, _SMALLEST, _BELOW_ONE)
        return tf.math.log(p) - tf.math.log1p(-p)


@tf.autograph.experimental.do_not_convert
def head_of(
    model: keras.Model,
    inputs: Any = None,
    *,
    answer: Any = None,
    from_logits: bool | None = None,
    option: str = "from_logits={}",
) -> Head:
    """Finds out what the outputs of `model` are.

    Works eagerly and while a function is traced. The model is run on made-up inputs, in inference mode.

    Args:
        model: a Keras model with one output (or one named "logits") [..., classes].
        inputs: a batch, as tensors or arrays (only shapes and dtypes count); default: what the model says it reads.
        answer: the model's symbolic output for it, where it has one already; saves a trace.
        from_logits: what the caller says: True, logits; False, probabilities. It settles what cannot be told.
        option: how the caller spells it, for the messages; {} stands for the value.
    Raises:
        InputError: it cannot be told, the witnesses disagree, or `from_logits` contradicts them.
    """
    if from_logits not in (None, True, False):
        raise InputError(f"expected {_say(option, True)} for logits or False for probabilities, found {from_logits!r}.")

    def call(x: Any) -> tf.Tensor:
        return one_output(model(x, training=False), model)

    with tf.init_scope():
        specs = _specs(model) if inputs is None else tf.nest.map_structure(_spec, inputs)
        made, width = None, None
        if answer is not None and tf.is_symbolic_tensor(answer):
            made, width = meaning(answer), answer.shape[-1]
        if made is None:  # also where the answer was cut off from what made it
            made, width = _traced(call, specs)
        seen = _seen(call, specs)
    if width is None and seen is not None:
        width = seen.shape[-1]
    return Head(_decided(model.name, made, None if seen is None else look(seen), width, from_logits, option))


def one_output(answer: Any, model: keras.Model) -> tf.Tensor:
    """The one tensor in a model's answer, or the one named "logits".

    Raises:
        InputError: there are several.
    """
    if isinstance(answer, Mapping):
        if "logits" not in answer:
            raise InputError(
                f"{model.name} returns {sorted(answer)}; expected one tensor of logits, or one named 'logits'."
            )
        answer = answer["logits"]
    if isinstance(answer, (list, tuple)):
        if len(answer) != 1:
            raise InputError(f"{model.name} returns {len(answer)} tensors; expected one tensor of logits.")
        answer = answer[0]
    return answer


# --- the verdict ------------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """What a model's values look like.

    Attributes:
        range: "simplex" (in [0, 1], rows sum to one), "unit" (in [0, 1]) or "beyond".
        varied: whether the rows differ.
    """

    range: Literal["simplex", "unit", "beyond"]
    varied: bool


def look(values: np.ndarray) -> Look | None:
    """Looks at outputs [..., classes]; None where there is no finite row. Tolerances are those of the dtype."""
    tolerance = _TOLERANCE.get(str(values.dtype), 1e-4)
    rows = np.asarray(values, np.float64).reshape(-1, values.shape[-1])
    rows = rows[np.isfinite(rows).all(axis=1)]
    if not rows.size:
        return None
    varied = bool((np.ptp(rows, axis=0) > tolerance).any())
    if rows.min() < -tolerance or rows.max() > 1 + tolerance:
        return Look("beyond", varied)
    sums = bool(rows.shape[1] > 1 and np.abs(rows.sum(axis=1) - 1).max() <= tolerance)
    return Look("simplex" if sums else "unit", varied)


def _decided(
    name: str, made: str | None, seen: Look | None, width: int | None, from_logits: bool | None, option: str
) -> Kind:
    values = seen.range if seen is not None else None
    told = {
        "simplex": "its values lie in [0, 1] and sum to one",
        "unit": "its values lie in [0, 1] and do not sum to one",
        "beyond": "its values leave [0, 1]",
        None: "it could not be run on made-up inputs",
    }[values]
    if made == "softmax" and width == 1:
        raise InputError(
            f"{name} has a softmax over one class, which is always 1. Use a sigmoid for one class, or two classes."
        )
    if from_logits is True:
        if (made == "softmax" and values != "beyond") or (made == "sigmoid" and values != "beyond"):
            raise InputError(f"{_say(option, True)}, but {name} ends in a {made}: {told}. Leave it out.")
        return "logits"
    if from_logits is False:
        if values == "beyond":
            raise InputError(f"{_say(option, False)}, but {name} gives no probabilities: {told}. Leave it out.")
        if made in ("softmax", "sigmoid"):
            return made  # type: ignore[return-value]
        if values is None and width != 1:
            raise InputError(
                f"{name} gives probabilities, but of one class among all or of each by itself? {told}. Give the model "
                "a softmax or a sigmoid as its last operation."
            )
        return "softmax" if values == "simplex" else "sigmoid"
    ends = {None: "unknown operations", "mixed": "arithmetic on probabilities", "logits": "a product"}.get(
        made, f"a {made}"
    )
    if made == "softmax" and values in ("simplex", None):
        return "softmax"
    if made == "sigmoid" and values != "beyond":
        return "sigmoid"
    if made == "logits" and values != "simplex":
        return "logits"
    if made in (None, "mixed") and seen is not None and seen.range == "simplex" and seen.varied:
        return "softmax"
    if made is None and values == "beyond":
        return "logits"
    raise InputError(
        f"cannot tell whether {name} gives logits or probabilities: it ends in {ends}, and {told}. "
        f"Pass {_say(option, True)} for logits or {_say(option, False)} for probabilities."
    )


def _say(option: str, value: bool) -> str:
    return option.replace("{}", str(value))


# --- the values -------------------------------------------------------------------------------------------------------


def _spec(part: Any) -> Any:
    if isinstance(part, (tf.TensorSpec, tf.Tensor)):
        return tf.TensorSpec(part.shape, part.dtype)
    if isinstance(part, (tf.RaggedTensor, tf.SparseTensor)):
        return tf.type_spec_from_value(part)
    part = np.asarray(part)
    kind = tf.string if part.dtype.kind in "USO" else tf.as_dtype(part.dtype)
    return tf.TensorSpec([None, *part.shape[1:]], kind)


def _specs(model: keras.Model) -> Any:
    """What a model with symbolic inputs is called with; None where there are none."""
    try:
        structure = getattr(model, "_inputs_struct", None)
        if structure is None:
            known = list(model.inputs or ())
            structure = known[0] if len(known) == 1 else known or None
    except (AttributeError, ValueError):
        structure = None
    if structure is None:
        raise InputError(
            f"cannot tell what {model.name} gives without an input: it does not say what it reads. Make it a "
            "functional model: keras.Model(inputs, model(inputs))."
        )
    return keras.tree.map_structure(
        lambda tensor: tf.TensorSpec(tensor.shape, keras.backend.standardize_dtype(tensor.dtype)), structure
    )


def _seen(call: Callable[[Any], Any], specs: Any) -> np.ndarray | None:
    """The model's values [rows, classes] on made-up inputs, or None where it does not run on them."""
    rows = []
    scales = (1.0, 30.0) if any(spec.dtype.is_floating for spec in tf.nest.flatten(specs)) else (1.0,)
    for scale in scales:  # far inputs: numbers that only happen to lie in [0, 1] leave it
        try:
            found = call(tf.nest.map_structure(lambda spec, s=scale: _made_up(spec, s), specs)).numpy()
        except Exception:  # whatever the model does not like about made-up inputs
            continue
        rows.append(found.reshape(-1, found.shape[-1]))
    return np.concatenate(rows) if rows else None


def _made_up(spec: Any, scale: float) -> tf.Tensor:
    if not isinstance(spec, tf.TensorSpec) or spec.shape.rank is None:
        raise InputError("no made-up inputs of this kind")
    shape = [4, *(size or 5 for size in spec.shape[1:])] if spec.shape.rank else []
    count = math.prod(shape)
    if spec.dtype == tf.string:
        return tf.reshape(tf.constant([_TEXTS[i % len(_TEXTS)] for i in range(count)]), shape)
    if spec.dtype.is_floating:
        return tf.constant(np.random.default_rng(0).normal(0.0, scale, shape), spec.dtype)
    return tf.cast(tf.constant(np.random.default_rng(0).integers(0, 2, shape)), spec.dtype)


# --- the operations ---------------------------------------------------------------------------------------------------


def _traced(call: Callable[[Any], Any], specs: Any) -> tuple[str | None, int | None]:
    """(meaning, width) of the output of a fresh trace; unknown where the model cannot be traced."""
    try:
        output = tf.function(call).get_concrete_function(specs).outputs[0]
    except InputError:
        raise
    except Exception:
        return None, None
    return meaning(output), output.shape[-1] if output.shape.rank else None


# Operations after which the last axis holds what it held, where it has the same size.
_PASSING = {
    "Identity", "IdentityN", "StopGradient", "PreventGradient", "Snapshot", "CheckNumerics", "EnsureShape", "Cast",
    "Reshape", "Squeeze", "ExpandDims", "StridedSlice", "Slice", "GatherV2", "Transpose", "Mean", "BroadcastTo", "Tile",
    "GatherNd",
}  # fmt: skip
_PRODUCTS = {
    "MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "Conv2D", "Conv3D",
    "DepthwiseConv2dNative", "_FusedMatMul",
}  # fmt: skip
_SUMS = {"AddV2", "Add", "AddN", "BiasAdd"}
_RISING = {"Relu", "LeakyRelu", "Elu", "Selu"}  # unbounded: no probabilities come of them


class _Found(NamedTuple):
    """The meaning of a tensor, and for probabilities the mass that a row holds (1 for one distribution)."""

    kind: str | None
    mass: float = 1.0


def meaning(tensor: tf.Tensor) -> str | None:
    """What a symbolic tensor [..., classes] holds by the operations behind it.

    "logits": a product with weights, or the logarithm of a distribution. "softmax" and "sigmoid": the activation, as it
    is or averaged. "mixed": other arithmetic on probabilities. None: unknown.
    """
    found = _Walk().of(tensor)
    if found.kind in ("softmax", "sigmoid") and abs(found.mass - 1.0) > 1e-3:
        return "mixed"
    return found.kind


def _same_width(one: tf.Tensor, other: tf.Tensor) -> bool:
    """Whether both have a last axis of one known size."""
    return bool(one.shape.rank and other.shape.rank) and one.shape[-1] is not None and one.shape[-1] == other.shape[-1]


class _Walk:
    """Follows operations back. Each tensor is looked at once."""

    def __init__(self) -> None:
        self._known: dict[Any, _Found] = {}
        self._still: dict[Any, bool] = {}
        self._depth = 0

    def of(self, tensor: tf.Tensor) -> _Found:
        key = tensor.ref()
        if key not in self._known:
            if self._depth > 200:
                return _Found(None)
            self._depth += 1
            self._known[key] = self._look(tensor)
            self._depth -= 1
        return self._known[key]

    def _look(self, tensor: tf.Tensor) -> _Found:
        op = tensor.op
        kind, inputs = op.type, list(op.inputs)
        if kind == "Softmax":
            return _Found("softmax")
        if kind == "LogSoftmax":
            return _Found("logits")
        if kind == "Sigmoid":
            return _Found("sigmoid")
        if kind in _RISING:
            return _Found("logits")
        if kind in _PRODUCTS:
            return _Found("logits" if any(self.fixed(part) for part in inputs) else None)
        if kind == "Log":
            inner = self.of(inputs[0])
            return _Found("logits") if inner.kind == "softmax" else self._changed([inner])
        if kind in _PASSING:
            source = inputs[tensor.value_index if kind == "IdentityN" else 0]
            inner = self.of(source)
            return inner if _same_width(tensor, source) or inner.kind != "softmax" else _Found("mixed")
        if kind in ("Pack", "ConcatV2"):
            parts = [self.of(part) for part in inputs if kind == "Pack" or part is not inputs[-1]]
            if len({*parts}) == 1 and (_same_width(tensor, inputs[0]) or parts[0].kind != "softmax"):
                return parts[0]
            return self._changed(parts)
        if kind in ("Select", "SelectV2"):
            parts = [self.of(part) for part in inputs[1:] if not self.fixed(part)]
            return parts[0] if parts and len({*parts}) == 1 else self._changed(parts)
        if kind in _SUMS:
            return self._sum(inputs)
        if kind in ("Maximum", "Minimum", "ClipByValue"):
            parts = [self.of(part) for part in inputs if not self.fixed(part)]
            if len(parts) == 1 and parts[0].kind in ("softmax", "sigmoid"):
                return parts[0]  # clipped away from 0 and 1; the values tell if by more
            return self._changed(parts)
        if kind in ("Mul", "RealDiv"):
            return self._scaled(inputs, kind)
        return self._changed([self.of(part) for part in inputs if part.dtype.is_floating][:2])

    def _sum(self, inputs: list[tf.Tensor]) -> _Found:
        parts = [self.of(part) for part in inputs if not self.fixed(part)]
        kinds = {part.kind for part in parts}
        if kinds == {"logits"}:
            return _Found("logits")
        if kinds in ({"softmax"}, {"sigmoid"}) and len(parts) == len(inputs):
            return _Found(parts[0].kind, sum(part.mass for part in parts))
        return self._changed(parts)

    def _scaled(self, inputs: list[tf.Tensor], kind: str) -> _Found:
        moving = [part for part in inputs if not self.fixed(part)]
        if len(moving) == 1 and not (kind == "RealDiv" and moving[0] is inputs[1]):
            inner = self.of(moving[0])
            if inner.kind not in ("softmax", "sigmoid"):
                return inner
            factor = tf.get_static_value(next(part for part in inputs if part is not moving[0]))
            if factor is None or np.size(factor) != 1 or float(np.reshape(factor, ())) <= 0:
                return _Found("mixed")
            factor = float(np.reshape(factor, ()))
            return _Found(inner.kind, inner.mass * (factor if kind == "Mul" else 1.0 / factor))
        return self._changed([self.of(part) for part in moving])

    @staticmethod
    def _changed(parts: list[_Found]) -> _Found:
        """After an operation that is not known to keep the meaning."""
        return _Found("mixed" if any(part.kind in ("softmax", "sigmoid", "mixed") for part in parts) else None)

    def fixed(self, tensor: tf.Tensor, depth: int = 0) -> bool:
        """Whether a tensor comes of weights and constants alone."""
        key = tensor.ref()
        if key not in self._still:
            op = tensor.op
            if op.type in ("Const", "ReadVariableOp"):
                found = True
            elif op.type == "Placeholder":
                captured = getattr(tensor.graph, "captures", ())
                found = any(inner is tensor and not tf.is_symbolic_tensor(outer) for outer, inner in captured)
            else:
                found = bool(op.inputs) and depth < 24 and all(self.fixed(part, depth + 1) for part in op.inputs)
            self._still[key] = found
        return self._still[key]

"""JSON bodies to numpy arrays and back, as TF Serving's REST API reads and writes them.

Pure functions: bytes and specs in, arrays out, `ServingError` (INVALID_ARGUMENT) for everything that is not a
request. Nothing else may come out of them, whatever the bytes are; the fuzz tests hold that.
"""

import base64
import binascii
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from tfvllm.serving.servable import Signature, Spec, numpy_dtype
from tfvllm.serving.status import invalid

ROW, COLUMN = "row", "column"
_DEEPEST = 32  # more dimensions numpy does not know
_INTEGERS = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
_FLOATS = {"float16", "bfloat16", "float32", "float64"}


@dataclass
class PredictBody:
    """A parsed :predict body. `format` is ROW ("instances") or COLUMN ("inputs")."""

    signature_name: str
    inputs: dict[str, np.ndarray]
    format: str


@dataclass
class ExamplesBody:
    """A parsed :classify or :regress body: serialised `tf.Example`s."""

    signature_name: str
    examples: list[bytes] = field(default_factory=list)


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object from `body`."""
    if not body:
        raise invalid("JSON Parse error: The document is empty. Expected an object with 'instances' or 'inputs'.")
    try:
        document = json.loads(body)
    except UnicodeDecodeError as error:
        raise invalid(f"JSON Parse error: the body is not UTF-8 ({error.reason} at byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise invalid(f"JSON Parse error: {error.msg} at offset: {error.pos}") from None
    except RecursionError:
        raise invalid("JSON Parse error: the document is nested too deeply.") from None
    except ValueError as error:  # an integer of thousands of digits
        raise invalid(f"JSON Parse error: {str(error)[:200]}") from None
    if not isinstance(document, dict):
        raise invalid(f"JSON Value: {show(document)} Is not object. Expected an object with 'instances' or 'inputs'.")
    return document


def signature_name(document: Mapping[str, Any]) -> str:
    """The "signature_name" of a request, "" where there is none."""
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise invalid(f"JSON Value: {show(name)} not formatted correctly. 'signature_name' key must be a string value.")
    return name


def parse_predict(body: bytes, find_signature: Callable[[str], Signature]) -> PredictBody:
    """A :predict body. `find_signature` takes the name in the body ("" for the default one)."""
    document = parse_json(body)
    name = signature_name(document)
    signature = find_signature(name)
    if not signature.inputs:
        raise invalid(f"Failed to get input map for signature: {name or 'DEFAULT'}; it takes no inputs.")
    has_rows, has_columns = "instances" in document, "inputs" in document
    if has_rows and has_columns:
        raise invalid("Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist")
    if has_rows:
        return PredictBody(name, _from_rows(document["instances"], signature), ROW)
    if has_columns:
        return PredictBody(name, _from_columns(document["inputs"], signature), COLUMN)
    raise invalid("Missing 'inputs' or 'instances' key")


def _from_rows(rows: Any, signature: Signature) -> dict[str, np.ndarray]:
    inputs, required = signature.inputs, signature.required
    if not isinstance(rows, list):
        raise invalid(f"Expecting 'instances' to be an list/array; got {kind_of(rows)}")
    if not rows:
        raise invalid("No values in 'instances' array")
    if not _is_object(rows[0]):
        if len(required or inputs) != 1:
            raise invalid(
                "instances is a plain list, but expecting list of objects as multiple input tensors required: "
                f"{', '.join(required or inputs)}"
            )
        for i, row in enumerate(rows):
            if _is_object(row):
                raise invalid(f"Expecting value/list but got object at item {i} of input list")
        name = next(iter(required or inputs))
        return {name: array_of(rows, name, inputs[name], "instances")}
    given = set(rows[0])
    expected = given if set(required) <= given <= set(inputs) else set(inputs)
    for i, row in enumerate(rows):
        if not _is_object(row):
            found = "list" if isinstance(row, list) else kind_of(row)
            raise invalid(f"Expecting object but got {found} at item {i} of input list")
        if set(row) != expected:
            raise invalid(
                f"Failed to process element: {i} of 'instances' list. JSON object: {show(row)} "
                f"keys must be equal to: {','.join(inputs)}"
            )
    return {
        name: array_of([row[name] for row in rows], name, spec, "instances")
        for name, spec in inputs.items()
        if name in expected
    }


def _from_columns(value: Any, signature: Signature) -> dict[str, np.ndarray]:
    inputs, required = signature.inputs, signature.required
    if not _is_object(value):
        if len(required or inputs) != 1:
            raise invalid(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required: "
                f"{', '.join(required or inputs)}"
            )
        name = next(iter(required or inputs))
        return {name: array_of(value, name, inputs[name], "inputs")}
    arrays = {}
    for name, spec in inputs.items():
        if name not in value:
            if name in signature.defaults:
                continue
            raise invalid(f"Missing named input: {name} in 'inputs' object.")
        arrays[name] = array_of(value[name], name, spec, "inputs")
    extra = [name for name in value if name not in inputs]
    if extra:
        raise invalid(f"Unknown named input: {show(extra[0])} in 'inputs' object; expected {', '.join(inputs)}.")
    return arrays


def array_of(value: Any, name: str, spec: Spec, where: str) -> np.ndarray:
    """A JSON value (nested lists) as an array of the spec's dtype; refuses ragged lists and other types."""
    # Level by level, so that the loops over the values run in C.
    level: list[Any] = [value]
    shape: list[int] = []
    while True:
        kinds = set(map(type, level))
        if list not in kinds:
            break
        sizes = set(map(len, level)) if kinds == {list} else set()
        if len(sizes) != 1:
            raise invalid(f"Failed to process input {name!r} of '{where}': {_ragged(value, where)}. Pad the rows.")
        shape.append(sizes.pop())
        if len(shape) > _DEEPEST:
            raise invalid(f"Failed to process input {name!r} of '{where}': lists are nested too deeply.")
        if not shape[-1]:
            # Nothing below an empty list: the dims the spec knows stand, the others are empty.
            rest = spec.shape[len(shape) :] if spec.shape is not None else ()
            return np.empty([*shape, *(max(size, 0) for size in rest)], numpy_dtype(spec.dtype))
        level = list(chain.from_iterable(level))
    flat = _leaves(level, kinds, name, spec)
    try:
        return flat.reshape(shape)
    except ValueError:
        raise invalid(
            f"Failed to process input {name!r} of '{where}': {len(level)} values do not fill {shape}"
        ) from None


def _ragged(value: Any, where: str) -> str:
    """What makes nested lists no tensor, in TF Serving's words. A row counts as what its first elements say."""
    if where == "instances":
        expected = _first_shape(value[0])
        for i, row in enumerate(value):
            shape = _first_shape(row)
            if math.prod(shape) != math.prod(expected):
                return f"Expecting tensor size: {math.prod(expected)} but got: {math.prod(shape)}, at item {i}"
            if shape != expected:
                return f"Expecting shape {_joined(expected)} but got: {_joined(shape)}, at item {i}"
    shape = _first_shape(value)
    return _uneven(value, shape, 0) if len(shape) <= _DEEPEST else "lists are nested too deeply"


def _first_shape(value: Any) -> list[int]:
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        if not value:
            break
        value = value[0]
    return shape


def _joined(shape: list[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _uneven(value: Any, shape: list[int], level: int) -> str:
    if not isinstance(value, list):
        return (
            ""
            if level == len(shape)
            else (
                f"JSON Value: {show(value)} found at incorrect level: {level + 1} in the JSON DOM. "
                f"Expected at level: {len(shape)}"
            )
        )
    if level >= len(shape):
        return f"Encountered list at unexpected level: {level} expected < {len(shape)}"
    if len(value) != shape[level]:
        return f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}"
    return next(filter(None, (_uneven(item, shape, level + 1) for item in value)), "")


def _leaves(values: list, kinds: set[type], name: str, spec: Spec) -> np.ndarray:
    dtype = spec.dtype
    if dtype == "string":
        out = np.empty(len(values), object)
        for i, value in enumerate(values):
            out[i] = bytes_of(value, name)
        return out
    if dtype in _FLOATS:
        allowed = {int, float}
    elif dtype in _INTEGERS:
        allowed = {int}
    elif dtype == "bool":
        allowed = {bool}
    else:
        raise invalid(f"Conversion of JSON values to type {dtype} (input {name!r}) is not supported")
    if not kinds <= allowed:
        wrong = next(value for value in values if type(value) not in allowed)
        raise invalid(
            f"JSON Value: {show(wrong)} Type: {kind_of(wrong)} is not of expected type: {dtype} (input {name!r})"
        )
    if dtype in _FLOATS:
        return narrow_floats(values, dtype, name)
    try:
        return np.array(values, numpy_dtype(dtype))
    except OverflowError:
        raise invalid(f"A value of input {name!r} does not fit in {dtype}.") from None


def narrow_floats(values: list, dtype: str, name: str) -> np.ndarray:
    """Numbers as an array of a float `dtype`. What is beyond its range becomes infinity, as in TF Serving."""
    try:
        wide = np.array(values, np.float64)
    except OverflowError:  # an integer of hundreds of digits
        raise invalid(f"A value of input {name!r} does not fit in float64.") from None
    with np.errstate(over="ignore"):
        return wide.astype(numpy_dtype(dtype), copy=False)


def bytes_of(value: Any, name: str) -> bytes:
    if type(value) is str:
        try:
            return value.encode()
        except UnicodeEncodeError:
            raise invalid(f"input {name!r} holds half a surrogate pair; expected valid Unicode text.") from None
    if is_b64(value):
        try:
            text = value["b64"].encode("ascii")
            # TF Serving also takes the URL-safe alphabet and missing padding.
            text = text.translate(_URL_SAFE)
            return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
        except (UnicodeEncodeError, binascii.Error):
            raise invalid(f"Unable to base64 decode a value of input {name!r}") from None
    if isinstance(value, dict):
        raise invalid(f"JSON Value: {show(value)} not formatted correctly for base64 data")
    raise invalid(f"JSON Value: {show(value)} Type: {kind_of(value)} is not of expected type: string (input {name!r})")


_URL_SAFE = bytes.maketrans(b"-_", b"+/")


# --- answers ----------------------------------------------------------------------------------------------------------


def predict_answer(outputs: Mapping[str, np.ndarray], format: str) -> bytes:
    """The body of a :predict answer: "predictions" for ROW, "outputs" for COLUMN."""
    if not outputs:
        raise invalid("Cannot convert empty tensor map to JSON")
    if format == COLUMN:
        values = {name: jsonable(array, name) for name, array in outputs.items()}
        return dumps({"outputs": values if len(values) > 1 else next(iter(values.values()))})
    sizes = {}
    for name, array in outputs.items():
        if array.ndim == 0:
            raise invalid(
                f"Tensor name: {name} has no shape information: it is one value for the whole batch. "
                "Ask in the column format ('inputs' instead of 'instances')."
            )
        sizes[name] = array.shape[0]
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise invalid(
            f"Outputs have inconsistent batch sizes ({found}). "
            "Ask in the column format ('inputs' instead of 'instances')."
        )
    columns = {name: jsonable(array, name) for name, array in outputs.items()}
    if len(columns) == 1:
        return dumps({"predictions": next(iter(columns.values()))})
    return dumps({"predictions": [dict(zip(columns, row)) for row in zip(*columns.values())]})


def jsonable(array: np.ndarray, name: str = "") -> Any:
    """An array as nested lists. Names ending in `_bytes` give {"b64": …}; floats keep the shortest exact digits."""
    if array.dtype == object or array.dtype.kind in "SU":
        as_bytes = name.endswith("_bytes")
        flat = [_text(value, as_bytes) for value in array.ravel().tolist()]
    elif array.dtype == np.float64 or array.dtype.kind in "iub":
        return array.tolist()
    elif array.dtype.name in ("int4", "uint4"):
        return array.astype(np.int8).tolist()
    elif array.dtype.kind == "f" or numpy_float(array.dtype):
        # 0.2 in float32 is written 0.2, not 0.20000000298023224
        flat = list(map(float, map(str, array.astype(np.float32).ravel())))
    else:
        raise invalid(f"Failed to write JSON value for tensor type: {array.dtype}")
    return _nest(flat, array.shape)


def numpy_float(dtype: np.dtype) -> bool:
    """Whether `dtype` is one of the small floats numpy itself does not know (bfloat16, float8)."""
    return dtype.name.startswith(("bfloat", "float8"))


def _nest(flat: list, shape: tuple[int, ...]) -> Any:
    if not shape:
        return flat[0]
    if len(shape) == 1:
        return flat
    for size in reversed(shape[1:]):
        count = len(flat) // size if size else 0
        flat = [flat[i * size : (i + 1) * size] for i in range(count)] if size else flat
    if 0 in shape[1:]:
        return np.empty(shape, np.float64).tolist()
    return flat


def _text(value: Any, as_bytes: bool) -> Any:
    if isinstance(value, str):
        value = value.encode()
    if as_bytes:
        return {"b64": base64.b64encode(value).decode()}
    return value.decode("utf-8", "replace")


def dumps(value: Any) -> bytes:
    """Compact JSON in UTF-8. NaN and Infinity are written as TF Serving writes them."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def error_body(message: str) -> bytes:
    """`{"error": message}`."""
    return dumps({"error": message.encode("utf-8", "replace").decode()})


def is_b64(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get("b64"), str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and not is_b64(value)


def kind_of(value: Any) -> str:
    names = {dict: "Object", list: "Array", str: "String", bool: str(value), type(None): "Null"}
    return names.get(type(value), "Number")


def show(value: Any) -> str:
    text = repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 100 else text[:97] + "..."

"""`tf.Example` requests: JSON of :classify and :regress to serialised Examples, and outputs to their results."""

from typing import Any

import numpy as np

from tfvllm.serving.servable import CLASSIFY, REGRESS, Signature
from tfvllm.serving.status import ServingError, invalid
from tfvllm.serving.tensors import ExamplesBody, _bytes, _is_b64, _kind, _show, parse_json, signature_name


def parse_examples(body: bytes, method: str) -> ExamplesBody:
    """A :classify or :regress body: {"signature_name", "context", "examples"}."""
    document = parse_json(body)
    name = signature_name(document)
    context = _example(document["context"]) if "context" in document else b""
    if "examples" not in document:
        raise invalid(f"When method is {method}, key 'examples' is expected and was not found")
    rows = document["examples"]
    if not isinstance(rows, list):
        raise invalid(f"Expecting 'examples' value to be an list/array; got {_kind(rows)}")
    if not rows:
        raise invalid("'examples' value is an empty array")
    # Serialised messages merge by concatenation: the example's own features win over the context's.
    return ExamplesBody(name, [context + _example(row) for row in rows])


def _example(value: Any) -> bytes:
    from tensorflow.core.example import example_pb2

    if not isinstance(value, dict) or _is_b64(value):
        raise invalid(f"Example must be JSON object but got JSON {_kind(value)}")
    example = example_pb2.Example()
    for name, content in value.items():
        try:
            feature = example.features.feature[name]
        except (ValueError, UnicodeEncodeError):
            raise invalid("A feature's name holds half a surrogate pair; expected valid Unicode text.") from None
        _fill(feature, name, content if isinstance(content, list) else [content])
    return example.SerializeToString(deterministic=True)


def _fill(feature, name: str, values: list) -> None:
    kinds = {_feature_kind(value, name) for value in values}
    if len(kinds) > 1:
        raise invalid(f"Unexpected element type in feature: {_show(name)}: {' and '.join(sorted(kinds))} are mixed")
    for kind in kinds:
        if kind == "bytes":
            feature.bytes_list.value.extend(_bytes(value, name) for value in values)
        elif kind == "float":
            if any(np.isfinite(value) and abs(value) > np.finfo(np.float32).max for value in values):
                raise invalid(
                    f"Feature: {_show(name)} has a value that does not fit in float without loss of precision"
                )
            feature.float_list.value.extend(values)
        else:
            try:
                feature.int64_list.value.extend(int(value) for value in values)
            except ValueError:
                raise invalid(f"Feature: {_show(name)} has an element that does not fit in int64.") from None


def _feature_kind(value: Any, name: str) -> str:
    if isinstance(value, str) or _is_b64(value):
        return "bytes"
    if isinstance(value, bool | int):
        return "int64"
    if isinstance(value, float):
        return "float"
    raise invalid(f"Feature: {_show(name)} has element with unexpected JSON type: {_kind(value)}")


def check_signature(signature: Signature, method: str) -> str:
    """Checks that `signature` may be asked for `method` ("classify" or "regress"); returns its input's name."""
    wanted = CLASSIFY if method == "classify" else REGRESS
    if signature.method != wanted:
        word = "classification" if method == "classify" else "regression"
        raise invalid(f"Expected {word} signature method_name to be {wanted}. Was: {signature.method}")
    if list(signature.inputs) != ["inputs"]:
        raise ServingError(
            "FAILED_PRECONDITION", f"Expected one input Tensor, 'inputs'; found {list(signature.inputs)}"
        )
    outputs = {"classes", "scores"} if method == "classify" else {"outputs"}
    if not outputs & set(signature.outputs):
        found = ", ".join(signature.outputs)
        raise ServingError(
            "FAILED_PRECONDITION", f"Expected {method} outputs {' or '.join(sorted(outputs))}; found {found}"
        )
    return "inputs"


def classifications(outputs: dict[str, np.ndarray], count: int) -> list[list[tuple[str, float]]]:
    """`classes` string[count, n] and/or `scores` float32[count, n] to count lists of (label, score)."""
    classes, scores = outputs.get("classes"), outputs.get("scores")
    for name, array in (("classes", classes), ("scores", scores)):
        if array is not None and (array.ndim != 2 or array.shape[0] != count):
            raise invalid(f"Expected {name} of shape [{count} num_classes] but got {list(array.shape)}")
    if classes is not None and scores is not None and classes.shape != scores.shape:
        raise invalid(f"classes and scores should have the same shape; got {classes.shape} and {scores.shape}")
    width = next(array.shape[1] for array in (classes, scores) if array is not None)
    labels = [[""] * width] * count if classes is None else [[_label(c) for c in row] for row in classes]
    numbers = np.zeros((count, width), np.float32) if scores is None else scores.astype(np.float32)
    return [list(zip(row, values)) for row, values in zip(labels, numbers)]


def regressions(outputs: dict[str, np.ndarray], count: int) -> list[np.floating]:
    """`outputs` float32[count] or [count, 1] to count numbers."""
    values = outputs["outputs"]
    if values.shape not in ((count,), (count, 1)):
        raise invalid(
            f"Expected output Tensor shape to be either [{count}] or [{count} 1] but got {list(values.shape)}"
        )
    return list(values.reshape(count).astype(np.float32))


def _label(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

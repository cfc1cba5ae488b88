"""`tf.Example` requests: JSON of :classify and :regress to serialised Examples, and outputs to their results."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfvllm.serving.servable import CLASSIFY, Signature
from tfvllm.serving.status import invalid
from tfvllm.serving.tensors import (
    ExamplesBody,
    bytes_of,
    dumps,
    is_b64,
    kind_of,
    narrow_floats,
    parse_json,
    signature_name,
)

INPUT = "inputs"  # the one input of a classify or regress signature


def parse_examples(body: bytes, method: str) -> ExamplesBody:
    """A :classify or :regress body: {"signature_name", "context", "examples"}."""
    document = parse_json(body)
    name = signature_name(document)
    context = _example(document["context"]) if "context" in document else b""
    if "examples" not in document:
        raise invalid(f"When method is {method}, key 'examples' is expected and was not found")
    rows = document["examples"]
    if not isinstance(rows, list):
        raise invalid(f"Expecting 'examples' value to be an list/array; got {kind_of(rows)}")
    if not rows:
        raise invalid("'examples' value is an empty array")
    # Serialised messages merge by concatenation: the example's own features win over the context's.
    return ExamplesBody(name, [context + _example(row) for row in rows])


def _example(value: Any) -> bytes:
    from tensorflow.core.example import example_pb2

    if not isinstance(value, dict) or is_b64(value):
        raise invalid(f"Example must be JSON object but got JSON {kind_of(value)}")
    example = example_pb2.Example()
    for name, content in value.items():
        try:
            feature = example.features.feature[name]
        except (ValueError, UnicodeEncodeError):
            raise invalid("A feature's name holds half a surrogate pair; expected valid Unicode text.") from None
        _fill(feature, name[:100], content if isinstance(content, list) else [content])
    return example.SerializeToString(deterministic=True)


def _fill(feature, name: str, values: list) -> None:
    kinds = [_feature_kind(value, name) for value in values]
    for kind in kinds:
        if kind != kinds[0]:
            raise invalid(f"Unexpected element type in feature: {name} expecting type: {kinds[0]}, got {kind}")
    if not kinds:
        return
    if kinds[0] == "bytes":
        feature.bytes_list.value.extend(bytes_of(value, name) for value in values)
    elif kinds[0] == "float":
        feature.float_list.value.extend(narrow_floats(values, "float32", name).tolist())
    elif all(value < 2**63 for value in values):
        feature.int64_list.value.extend(int(value) for value in values)
    else:
        raise invalid(f"Feature: {name} has uint64_t element. Only int64_t is supported.")


def _feature_kind(value: Any, name: str) -> str:
    if isinstance(value, str) or is_b64(value):
        return "bytes"
    if isinstance(value, bool):
        return "int64"
    if isinstance(value, int):
        # As RapidJSON, which reads what is beyond its integers as a float.
        return "int64" if -(2**63) <= value < 2**64 else "float"
    if isinstance(value, float):
        return "float"
    raise invalid(f"Feature: {name} has element with unexpected JSON type: {kind_of(value)}")


def check_signature(signature: Signature, method: str, *, by_name: bool) -> None:
    """Raises ServingError unless `signature` may be asked for `method` (CLASSIFY or REGRESS).

    `by_name`: whether its method name must say so too.
    """
    word = "classification" if method == CLASSIFY else "regression"
    if by_name and signature.method != method:
        raise invalid(f"Expected {word} signature method_name to be {method}. Was: {signature.method}")
    inputs, outputs = list(signature.inputs), list(signature.outputs)
    if len(inputs) != 1:
        raise invalid(f"Expected one input Tensor. Signature {signature.name!r} has: {', '.join(inputs) or 'none'}")
    if INPUT not in inputs:
        raise invalid(
            f"No {word} inputs found in SignatureDef: expected {INPUT!r}, {signature.name!r} has {inputs[0]!r}"
        )
    found = f"signature {signature.name!r} has: {', '.join(outputs) or 'none'}"
    if method == CLASSIFY:
        if len(outputs) not in (1, 2):
            raise invalid(f"Expected one or two output Tensors, found {len(outputs)}; {found}")
        if not {"classes", "scores"} & set(outputs):
            raise invalid(
                f'Expected classification signature outputs to contain at least one of "classes" or "scores"; {found}'
            )
    elif len(outputs) != 1:
        raise invalid(f"Expected one output Tensor; {found}")
    elif "outputs" not in outputs:
        raise invalid(f"No regression outputs found in SignatureDef: expected 'outputs'; {found}")


def classifications(outputs: dict[str, np.ndarray], count: int) -> list[list[tuple[str, float]]]:
    """`classes` string[count, n] and/or `scores` float32[count, n] to count lists of (label, score)."""
    classes, scores = outputs.get("classes"), outputs.get("scores")
    for name, array, dtype, word in (
        ("classes", classes, object, "DT_STRING"),
        ("scores", scores, np.float32, "DT_FLOAT"),
    ):
        if array is None:
            continue
        if array.ndim != 2:
            raise invalid(f"Expected Tensor shape: [batch_size num_classes] but got {list(array.shape)} for {name}")
        if array.dtype != dtype:
            raise invalid(f"Expected {name} Tensor of {word}. Got: {array.dtype}")
        if array.shape[0] != count:
            raise invalid(f"Expected {name} output batch size of {count}. Got: {array.shape[0]}")
    if classes is not None and scores is not None and classes.shape != scores.shape:
        raise invalid(
            f"Tensors class and score should match in dim_size(1). Got {classes.shape[1]} vs. {scores.shape[1]}"
        )
    width = next(array.shape[1] for array in (classes, scores) if array is not None)
    labels = [[""] * width] * count if classes is None else [[_label(c) for c in row] for row in classes]
    numbers = np.zeros((count, width), np.float32) if scores is None else scores
    return [list(zip(row, values)) for row, values in zip(labels, numbers)]


def regressions(outputs: dict[str, np.ndarray], count: int) -> list[np.floating]:
    """`outputs` float32[count] or [count, 1] to count numbers."""
    values = outputs["outputs"]
    if not (values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1)):
        raise invalid(
            f"Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got {list(values.shape)}"
        )
    if values.shape[0] != count:
        raise invalid(f"Input batch size did not match output batch size: {count} vs. {values.shape[0]}")
    if values.dtype != np.float32:
        raise invalid(f"Expected output Tensor of DT_FLOAT.  Got: {values.dtype}")
    return list(values.reshape(count))


def results_answer(results: Sequence) -> bytes:
    """The body of a :classify or :regress answer: each result a number, or a list of (label, score)."""
    rows = [
        [[label, float(str(score))] for label, score in row] if isinstance(row, list) else float(str(row))
        for row in results
    ]
    return dumps({"results": rows})


def _label(value: bytes) -> str:
    return value.decode("utf-8", "replace")

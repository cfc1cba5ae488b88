"""Warm-up requests: `assets.extra/tf_serving_warmup_requests`, a TFRecord of PredictionLog messages.

TF Serving replays them before a version goes live. The messages are declared here with the few fields they need, so
that an export needs no tensorflow-serving-api; a test holds them against the real ones.
"""

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from tfvllm.errors import TfvllmError

NAME = "assets.extra/tf_serving_warmup_requests"
LIMIT = 1000  # TF Serving refuses a file with more records

# message -> fields: (name, number, type, repeated). TensorProto travels as bytes: the same on the wire.
_MESSAGES: dict[str, list[tuple[str, int, str, bool]]] = {
    "ModelSpec": [("name", 1, "string", False), ("signature_name", 3, "string", False)],
    "Input": [("key", 1, "string", False), ("value", 2, "bytes", False)],
    "PredictRequest": [("model_spec", 1, "ModelSpec", False), ("inputs", 2, "Input", True)],
    "PredictLog": [("request", 1, "PredictRequest", False)],
    "PredictionLog": [("predict_log", 6, "PredictLog", False)],
}


@functools.cache
def _prediction_log():
    file = descriptor_pb2.FileDescriptorProto(name="tfvllm_warmup.proto", package="tfvllm_warmup", syntax="proto3")
    for message, fields in _MESSAGES.items():
        declared = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            field = declared.field.add(name=name, number=number)
            field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if kind in _MESSAGES:
                field.type, field.type_name = field.TYPE_MESSAGE, f".tfvllm_warmup.{kind}"
            else:
                field.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tfvllm_warmup.PredictionLog"))


def path(directory: str | os.PathLike) -> Path:
    """Where TF Serving looks for the warm-up requests of the SavedModel in `directory`."""
    return Path(directory) / NAME


def write(directory: str | os.PathLike, examples: Iterable[Mapping[str, Any]], *, replay_them: bool = True) -> dict:
    """Writes `examples` (`{"signature_name", "inputs"}`) as warm-up requests and, to be sure, replays them.

    Returns `{"records", "replayed"}` for the manifest. Raises TfvllmError when a record does not run.
    """
    examples = list(examples)[:LIMIT]
    file = path(directory)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    with tf.io.TFRecordWriter(str(partial)) as writer:
        for example in examples:
            log = _prediction_log()()
            request = log.predict_log.request
            request.model_spec.signature_name = example["signature_name"]
            for key, value in example["inputs"].items():
                request.inputs.add(key=key, value=tf.make_tensor_proto(value).SerializeToString())
            writer.write(log.SerializeToString())
    os.replace(partial, file)
    replayed = replay(directory) if replay_them else 0
    return {"records": len(examples), "replayed": replayed}


def read(directory: str | os.PathLike) -> list[tuple[str, dict[str, np.ndarray]]]:
    """The warm-up requests of the SavedModel in `directory`, as (signature name, inputs); [] where there are none.

    Requests other than Predict (which tfvllm does not write) are left out.
    """
    file = path(directory)
    if not file.exists():
        return []
    requests = []
    try:
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            log = _prediction_log().FromString(record)
            if not log.HasField("predict_log"):
                continue
            request = log.predict_log.request
            inputs = {item.key: _tensor(item.value) for item in request.inputs}
            requests.append((request.model_spec.signature_name or "serving_default", inputs))
    except Exception as error:
        raise TfvllmError(f"{file} is no TFRecord of PredictionLog: {' '.join(str(error).split())[:200]}") from error
    return requests


def replay(directory: str | os.PathLike, requests: Sequence | None = None) -> int:
    """Runs the warm-up requests against the SavedModel; returns how many ran. Raises TfvllmError when one fails."""
    from tfvllm.export import parity

    requests = read(directory) if requests is None else list(requests)
    try:
        return len(parity.run_here(directory, requests))
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        raise TfvllmError(f"a warm-up request does not run on {directory}: {line}. Export again.") from error


def _tensor(serialised: bytes) -> np.ndarray:
    from tensorflow.core.framework import tensor_pb2

    return tf.make_ndarray(tensor_pb2.TensorProto.FromString(serialised))

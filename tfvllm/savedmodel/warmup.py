"""Warm-up requests: `assets.extra/tf_serving_warmup_requests`, a TFRecord of PredictionLog messages.

TF Serving replays them before a version goes live. The messages are declared here with the few fields they need, so
that an export needs no tensorflow-serving-api; a test holds them against the real ones.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import TfvllmError
from tfvllm.savedmodel import messages
from tfvllm.savedmodel.warm_requests import NAME

LIMIT = 1000  # TF Serving refuses a file with more records

# TensorProto and tf.Example travel as bytes: the same on the wire.
_MESSAGES: dict[str, list[messages.Field]] = {
    "ModelSpec": [("name", 1, "string", False), ("signature_name", 3, "string", False)],
    "Tensor": [("key", 1, "string", False), ("value", 2, "bytes", False)],
    "PredictRequest": [("model_spec", 1, "ModelSpec", False), ("inputs", 2, "Tensor", True)],
    "PredictLog": [("request", 1, "PredictRequest", False)],
    "ExampleList": [("examples", 1, "bytes", True)],
    "Input": [("example_list", 1, "ExampleList", False)],
    "ExamplesRequest": [("model_spec", 1, "ModelSpec", False), ("input", 2, "Input", False)],
    "ExamplesLog": [("request", 1, "ExamplesRequest", False)],
    "PredictionLog": [
        ("classify_log", 2, "ExamplesLog", False),
        ("regress_log", 3, "ExamplesLog", False),
        ("predict_log", 6, "PredictLog", False),
    ],
}


@functools.cache
def _prediction_log():
    return messages.declare("tfvllm_warmup", _MESSAGES)["PredictionLog"]


def path(directory: str | os.PathLike) -> Path:
    """Where TF Serving looks for the warm-up requests of the SavedModel in `directory`."""
    return Path(directory) / NAME


def write(
    directory: str | os.PathLike,
    examples: Iterable[Mapping[str, Any]],
    *,
    replay_them: bool = True,
    run: Callable | None = None,
) -> dict:
    """Writes `examples` as warm-up requests and, to be sure, replays them.

    An example is `{"signature_name", "inputs"}` (a Predict request) or `{"signature_name", "examples", "method"}`,
    where `examples` are serialised tf.Examples and `method` is "classify" or "regress". One with `"replay": False` is
    written only: where an answer takes long, a request for more rows than one before it shows nothing new.

    Returns `{"records", "replayed"}` for the manifest. Raises TfvllmError when a record does not run.
    """
    examples = list(examples)[:LIMIT]
    file = path(directory)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    with tf.io.TFRecordWriter(str(partial)) as writer:
        for example in examples:
            log = _prediction_log()()
            if "examples" in example:
                request = getattr(log, f"{example['method']}_log").request
                request.input.example_list.examples.extend(example["examples"])
            else:
                request = log.predict_log.request
                for key, value in example["inputs"].items():
                    request.inputs.add(key=key, value=tf.make_tensor_proto(value).SerializeToString())
            request.model_spec.signature_name = example["signature_name"]
            writer.write(log.SerializeToString())
    os.replace(partial, file)
    replayed = 0
    if replay_them:
        wanted = [request for request, example in zip(read(directory), examples) if example.get("replay", True)]
        replayed = replay(directory, wanted, run=run)
    return {"records": len(examples), "replayed": replayed}


def read(directory: str | os.PathLike) -> list[tuple[str, dict[str, np.ndarray]]]:
    """The warm-up requests of the SavedModel in `directory`, as (signature name, inputs); [] where there are none.

    MultiInference and session requests (which tfvllm does not write) are left out.
    """
    file = path(directory)
    if not file.exists():
        return []
    requests = []
    try:
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            log = _prediction_log().FromString(record)
            if log.HasField("predict_log"):
                request = log.predict_log.request
                inputs = {item.key: _tensor(item.value) for item in request.inputs}
            elif log.HasField("classify_log") or log.HasField("regress_log"):
                request = (log.classify_log if log.HasField("classify_log") else log.regress_log).request
                rows = np.empty(len(request.input.example_list.examples), object)
                rows[:] = list(request.input.example_list.examples)
                inputs = {"inputs": rows}
            else:
                continue
            requests.append((request.model_spec.signature_name or "serving_default", inputs))
    except Exception as error:
        raise TfvllmError(f"{file} is no TFRecord of PredictionLog: {' '.join(str(error).split())[:200]}") from error
    return requests


def replay(directory: str | os.PathLike, requests: Sequence | None = None, *, run: Callable | None = None) -> int:
    """Runs the warm-up requests against the SavedModel, or against `run(requests)` where it is loaded already.

    Returns how many ran. Raises TfvllmError when one fails.
    """
    from tfvllm.savedmodel import parity

    requests = read(directory) if requests is None else list(requests)
    try:
        return len((run or parity.loaded_here(directory))(requests))
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        raise TfvllmError(f"a warm-up request does not run on {directory}: {line}. Export again.") from error


def _tensor(serialised: bytes) -> np.ndarray:
    from tensorflow.core.framework import tensor_pb2

    return tf.make_ndarray(tensor_pb2.TensorProto.FromString(serialised))

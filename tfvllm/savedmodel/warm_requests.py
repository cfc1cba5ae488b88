"""The warm-up requests that a SavedModel carries, by the signature they ask."""

import functools
import os
from collections.abc import Iterable
from pathlib import Path

from tfvllm.savedmodel import messages

NAME = "assets.extra/tf_serving_warmup_requests"

# Of TF Serving's PredictionLog only what says which signature is asked; all else stays as it is in the record.
_MESSAGES: dict[str, list[messages.Field]] = {
    "ModelSpec": [("signature_name", 3, "string", False)],
    "Request": [("model_spec", 1, "ModelSpec", False)],
    "Log": [("request", 1, "Request", False)],
    "PredictionLog": [
        ("classify_log", 2, "Log", False),
        ("regress_log", 3, "Log", False),
        ("predict_log", 6, "Log", False),
    ],
}


@functools.cache
def _prediction_log():
    return messages.declare("tfvllm_warm_requests", _MESSAGES)["PredictionLog"]


def keep(directory: str | os.PathLike, signatures: Iterable[str]) -> int:
    """Leaves the requests to `signatures` in the SavedModel in `directory`: TF Serving refuses a version with one that
    fails. Returns how many went.
    """
    import tensorflow as tf

    file, wanted = Path(directory) / NAME, set(signatures)
    if not file.is_file():
        return 0
    records = list(tf.data.TFRecordDataset(str(file)).as_numpy_iterator())
    kept = [record for record in records if _asked(record) is None or _asked(record) in wanted]
    if len(kept) == len(records):
        return 0
    file.unlink()
    if kept:
        with tf.io.TFRecordWriter(str(file)) as writer:
            for record in kept:
                writer.write(record)
    return len(records) - len(kept)


def _asked(record: bytes) -> str | None:
    """The signature that a record asks; None for kinds of requests that are not looked into."""
    log = _prediction_log().FromString(record)
    for name in ("predict_log", "classify_log", "regress_log"):
        if log.HasField(name):
            return getattr(log, name).request.model_spec.signature_name or "serving_default"
    return None

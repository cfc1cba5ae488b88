"""The saved_model.pb of a SavedModel folder: reading it, replacing it whole, setting method names."""

import os
from collections.abc import Mapping
from pathlib import Path

from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.saved_model import fingerprinting_utils


def read_proto(directory: str | os.PathLike) -> saved_model_pb2.SavedModel:
    """The `saved_model.pb` of `directory`."""
    return saved_model_pb2.SavedModel.FromString((Path(directory) / "saved_model.pb").read_bytes())


def write_proto(directory: str | os.PathLike, proto: saved_model_pb2.SavedModel) -> None:
    """Replaces the `saved_model.pb` of `directory`, whole or not at all, and renews its fingerprint."""
    path = Path(directory) / "saved_model.pb"
    partial = path.with_name(".saved_model.pb.partial")
    partial.write_bytes(proto.SerializeToString(deterministic=True))
    os.replace(partial, path)
    if path.with_name("fingerprint.pb").exists():
        fingerprinting_utils.write_fingerprint(str(directory))


def set_method_names(directory: str | os.PathLike, method_names: Mapping[str, str]) -> None:
    """Sets the method name of some signatures of the SavedModel in `directory`."""
    proto = read_proto(directory)
    for graph in proto.meta_graphs:
        for name, method in method_names.items():
            if name in graph.signature_def:
                graph.signature_def[name].method_name = method
    write_proto(directory, proto)

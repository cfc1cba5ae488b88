"""Which ops a TF Serving of some version knows: TensorFlow's own, TensorFlow Text's and TF Decision Forests'.

`serving_ops.json` holds, per version, what the libraries of that version register. `python -m tfvllm.export.ops`
prints the same for the TensorFlow installed here, to add another version.
"""

import ctypes
import functools
import json
from pathlib import Path
from typing import Any

from tfvllm.errors import InputError

DEFAULT_VERSION = "2.20"  # the official server's pinned TensorFlow Text


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("serving_ops.json").read_text(encoding="utf-8"))


def versions() -> list[str]:
    """The versions of TF Serving whose ops are known, oldest first."""
    return list(_table()["versions"])


def check_version(version: str | None) -> str:
    """`version` as "2.20" (a patch level is dropped); the default for None. Raises InputError for an unknown one."""
    if version is None:
        return DEFAULT_VERSION
    short = ".".join(str(version).lstrip("v").split(".")[:2])
    if short not in versions():
        raise InputError(
            f"no op list for TF Serving {version}; known are {', '.join(versions())}. "
            "Pass the nearest one with --serving-version."
        )
    return short


def served(version: str) -> set[str]:
    """The ops that a TF Serving of `version` knows."""
    table = _table()
    order = {name: i for i, name in enumerate(table["versions"])}
    at = order[version]
    core = {
        name
        for name in table["core"]
        if order[table["since"].get(name, table["versions"][0])] <= at
        and order[table["until"].get(name, table["versions"][-1])] >= at
    }
    return core | set(table["text"]) | set(table["decision_forests"])


def since(op: str) -> str | None:
    """The first version that knows `op`; None where none does."""
    table = _table()
    if op in table["since"]:
        return table["since"][op]
    known = op in table["core"] or op in table["text"] or op in table["decision_forests"]
    return table["versions"][0] if known else None


def registered() -> dict[str, Any]:
    """The ops that the TensorFlow and TensorFlow Text libraries installed here register."""
    from tensorflow.core.framework import op_def_pb2

    from tfvllm import textops
    from tfvllm.quietly import import_tensorflow

    tensorflow = import_tensorflow()

    class Buffer(ctypes.Structure):
        _fields_ = (("data", ctypes.c_void_p), ("length", ctypes.c_size_t), ("deallocator", ctypes.c_void_p))

    library = ctypes.CDLL(str(Path(tensorflow.__file__).with_name("libtensorflow_cc.so.2")))
    library.TF_GetAllOpList.restype = ctypes.POINTER(Buffer)

    def names() -> set[str]:
        buffer = library.TF_GetAllOpList().contents
        return {op.name for op in op_def_pb2.OpList.FromString(ctypes.string_at(buffer.data, buffer.length)).op}

    core = names()
    textops.load()
    return {"version": tensorflow.__version__, "core": sorted(core), "text": sorted(names() - core)}


if __name__ == "__main__":
    print(json.dumps(registered(), indent=1))

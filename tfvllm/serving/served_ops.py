"""Which ops a TF Serving of some version knows: TensorFlow's own, TensorFlow Text's and TF Decision Forests'.

`served_ops.json` holds, per version, what the libraries of that version register. `python -m tfvllm.serving.served_ops`
prints the same for the TensorFlow installed here, to add another version.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tfvllm.errors import InputError

DEFAULT_VERSION = "2.20"  # the official server's pinned TensorFlow Text


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("served_ops.json").read_text(encoding="utf-8"))


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


# Run in a process without Python's TensorFlow, which registers ops of its own tests.
_LIST_OPS = """
import ctypes, sys
class Buffer(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("length", ctypes.c_size_t), ("deallocator", ctypes.c_void_p))
ctypes.CDLL(sys.argv[1] + "/libtensorflow_framework.so.2", mode=ctypes.RTLD_GLOBAL)
library = ctypes.CDLL(sys.argv[1] + "/libtensorflow_cc.so.2", mode=ctypes.RTLD_GLOBAL)
library.TF_GetAllOpList.restype = ctypes.POINTER(Buffer)
library.TF_NewStatus.restype = ctypes.c_void_p
library.TF_LoadLibrary.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
def write():
    found = library.TF_GetAllOpList().contents
    sys.stdout.buffer.write(found.length.to_bytes(8, "little") + ctypes.string_at(found.data, found.length))
    sys.stdout.flush()
write()
for path in sys.argv[2:]:
    library.TF_LoadLibrary(path.encode(), library.TF_NewStatus())
write()
"""


def registered() -> dict[str, Any]:
    """The ops that the TensorFlow and TensorFlow Text libraries installed here register."""
    from tfvllm.quietly import import_tensorflow
    from tfvllm.savedmodel import text_ops

    tensorflow = import_tensorflow()
    from tensorflow.core.framework import op_def_pb2

    folder, libraries = Path(tensorflow.__file__).parent, map(str, text_ops.libraries())
    command = [sys.executable, "-I", "-c", _LIST_OPS, str(folder), *libraries]
    listed = subprocess.run(command, capture_output=True, check=True).stdout
    size = 8 + int.from_bytes(listed[:8], "little")
    core, both = (
        {op.name for op in op_def_pb2.OpList.FromString(ops).op} for ops in (listed[8:size], listed[size + 8 :])
    )
    return {"version": tensorflow.__version__, "core": sorted(core), "text": sorted(both - core)}


if __name__ == "__main__":
    print(json.dumps(registered(), indent=1))

"""Builds run_saved_model.c once and runs SavedModels with it: a process with TensorFlow's C++ runtime and no Python.

Other tests may use it for any task: `from tests.capi.loader import run`.
"""

import atexit
import functools
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tfvllm.savedmodel import protos, text_ops


@functools.cache
def program() -> Path:
    """The compiled loader; skips the test where there is no C compiler."""
    import tensorflow as tf

    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    root = Path(tf.__file__).parent
    libraries = [root / "libtensorflow_cc.so.2", root / "libtensorflow_framework.so.2"]
    if not all(library.exists() for library in libraries):
        pytest.skip("this TensorFlow has no libtensorflow_cc.so.2")
    folder = Path(tempfile.mkdtemp(prefix="tfvllm-capi-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target, source = folder / "run_saved_model", Path(__file__).with_name("run_saved_model.c")
    # Linked against an empty library of the same names, as the linker takes ten seconds to read the real one's symbols;
    # at run time the loader finds the real ones.
    names = sorted(set(re.findall(r"\b(TF_[A-Za-z]+)\(", source.read_text())))
    (folder / "empty.c").write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    for library in libraries:
        soname = f"-Wl,-soname,{library.name}"
        make = [compiler, "-shared", "-fPIC", str(folder / "empty.c"), soname, "-o", str(folder / library.name)]
        subprocess.run(make, check=True)
    flags = ["-O1", f"-I{root / 'include'}", f"-Wl,-rpath,{root}", "-Wl,--no-as-needed"]
    linked = [str(folder / library.name) for library in libraries]
    subprocess.run([compiler, str(source), *flags, *linked, "-o", str(target)], check=True)
    return target


def run(directory, signature: str, inputs: dict[str, np.ndarray], outputs=None, **variables) -> dict[str, np.ndarray]:
    """Runs one signature through the C API, under further environment `variables`.

    Raises AssertionError with the loader's message when it fails.
    """
    import tensorflow as tf

    definition = protos.read_proto(directory).meta_graphs[0].signature_def[signature]
    names = sorted(definition.outputs) if outputs is None else list(outputs)
    request = struct.pack("<i", len(inputs))
    for key, value in inputs.items():
        info = definition.inputs[key]
        request += _text(info.name.encode()) + _tensor(np.asarray(value), info.dtype)
    request += struct.pack("<i", len(names)) + b"".join(_text(definition.outputs[name].name.encode()) for name in names)
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request", Path(folder) / "answer"
        asked.write_bytes(request)
        command = [program(), str(directory), str(asked), str(answered), *map(str, text_ops.libraries())]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **variables}
        process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert process.returncode == 0, process.stderr[-2000:]
        data = answered.read_bytes()
    answers, at = {}, 0
    for name in names:
        dtype, rank = struct.unpack_from("<ii", data, at)
        shape = struct.unpack_from(f"<{rank}q", data, at + 8)
        at += 8 + 8 * rank
        (size,) = struct.unpack_from("<q", data, at)
        at += 8
        if dtype == tf.string.as_datatype_enum:
            values = np.empty(int(np.prod(shape)), object)
            for i in range(len(values)):
                (length,) = struct.unpack_from("<q", data, at)
                values[i] = data[at + 8 : at + 8 + length]
                at += 8 + length
        else:
            values = np.frombuffer(data[at : at + size], tf.as_dtype(dtype).as_numpy_dtype)
            at += size
        answers[name] = values.reshape(shape)
    return answers


def _text(text: bytes) -> bytes:
    return struct.pack("<q", len(text)) + text


def _tensor(array: np.ndarray, dtype: int) -> bytes:
    import tensorflow as tf

    if dtype == tf.string.as_datatype_enum:
        data = b"".join(_text(v if isinstance(v, bytes) else v.encode()) for v in array.ravel().tolist())
    else:
        data = np.ascontiguousarray(array, tf.as_dtype(dtype).as_numpy_dtype).tobytes()
    head = struct.pack(f"<ii{array.ndim}qq", dtype, array.ndim, *array.shape, len(data))
    return head + data

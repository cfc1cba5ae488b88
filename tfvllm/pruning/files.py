"""Sparse weights on disk: a bitmask and the values that are not zero.

Format "tfvllm-sparse 1", one file:

    8 bytes   the letters TFVSPRS1
    8 bytes   length of the header, unsigned little-endian
    header    JSON, UTF-8: {"weights": [{"name", "shape", "dtype", "encoding", "offset", "bytes", "nonzeros"}, …]}
    data      at `offset` from the end of the header:
              encoding "dense": the values, C order, little-endian
              encoding "bitmask": ceil(size / 8) bytes, bit i % 8 (least significant first) of byte i // 8 set where
              value i is stored, then the stored values in C order

A value is stored unless all its bits are zero, so -0.0 and NaN survive: the file is lossless. A weight is written as
bitmask where that is smaller.
"""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tfvllm import files
from tfvllm.errors import InputError

MAGIC = b"TFVSPRS1"


def save_sparse(model: Any, path: Any) -> int:
    """Writes the weights of a Keras model to `path`; the number of bytes written.

    Weights are named by their order and path, so any model with the same weights can load them.

    Example:
        >>> model = keras.Sequential([keras.Input([64]), keras.layers.Dense(64, use_bias=False)])
        >>> shares = tfvllm.pruning.sparsify(model, 0.9, method="magnitude")
        >>> path = tfvllm.pruning.save_sparse(model, folder / "sparse.npz")
        >>> restored = tfvllm.pruning.load_sparse(keras.models.clone_model(model), folder / "sparse.npz")
    """
    return write_sparse([(f"{i}:{v.path}", np.asarray(v)) for i, v in enumerate(stored_variables(model))], path)


def load_sparse(model: Any, path: Any) -> None:
    """Reads weights written by `save_sparse` into a model with the same weights.

    Raises:
        InputError: not such a file, or other weights in number, order or shape.

    Example:
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(4)])
        >>> path = tfvllm.pruning.save_sparse(model, folder / "small.npz")
        >>> copy = keras.models.clone_model(model)
        >>> found = tfvllm.pruning.load_sparse(copy, folder / "small.npz")
        >>> bool(np.all(np.asarray(copy.layers[0].kernel) == np.asarray(model.layers[0].kernel)))
        True
    """
    stored = list(read_sparse(path).items())
    variables = stored_variables(model)
    if len(stored) != len(variables):
        raise InputError(
            f"{path} holds {len(stored)} weights, the model has {len(variables)}. Build the model it was saved from."
        )
    for (name, value), variable in zip(stored, variables):
        if value.shape != tuple(variable.shape):
            raise InputError(
                f"{path}: {name} has shape {value.shape}, the model's {variable.path} {tuple(variable.shape)}."
            )
    for (_, value), variable in zip(stored, variables):
        variable.assign(value)


def stored_variables(model: Any) -> list[Any]:
    return [
        v for v in model.variables if "seed_generator" not in v.path and not getattr(v, "tfvllm_pruning_state", False)
    ]


def write_sparse(weights: list[tuple[str, np.ndarray]], path: Any) -> int:
    """Writes named arrays in the format above, whole or not at all; the number of bytes."""
    entries, chunks, offset = [], [], 0
    for name, value in weights:
        encoding, nonzeros, data = _encode(np.ascontiguousarray(value))
        entries.append(
            {
                "name": name,
                "shape": list(value.shape),
                "dtype": str(value.dtype),
                "encoding": encoding,
                "offset": offset,
                "bytes": len(data),
                "nonzeros": nonzeros,
            }
        )
        chunks.append(data)
        offset += len(data)
    header = json.dumps({"weights": entries}).encode()
    with files.new_file(Path(path)) as partial, partial.open("wb") as file:
        file.write(MAGIC + struct.pack("<Q", len(header)) + header)
        for chunk in chunks:
            file.write(chunk)
    return len(MAGIC) + 8 + len(header) + offset


def _encode(value: np.ndarray) -> tuple[str, int, bytes]:
    flat = value.reshape(-1)
    raw = flat.view(np.uint8).reshape(flat.size, value.dtype.itemsize) if flat.size else np.zeros((0, 1), np.uint8)
    stored = raw.any(axis=1)
    nonzeros = int(stored.sum())
    if (flat.size + 7) // 8 + nonzeros * value.dtype.itemsize >= value.nbytes:
        return "dense", nonzeros, value.tobytes()
    return "bitmask", nonzeros, np.packbits(stored, bitorder="little").tobytes() + raw[stored].tobytes()


def sparse_size(value: np.ndarray) -> int:
    """Bytes of one weight in this format, without the header."""
    return len(_encode(np.ascontiguousarray(value))[2])


def read_sparse(path: Any) -> dict[str, np.ndarray]:
    """Named arrays of a file in the format above.

    Raises:
        InputError: not such a file, or a damaged one.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Expected a file written by save_sparse.") from error
    if data[: len(MAGIC)] != MAGIC:
        raise InputError(f"{path} does not begin with {MAGIC.decode()}; expected a file written by save_sparse.")
    try:
        (length,) = struct.unpack_from("<Q", data, len(MAGIC))
        start = len(MAGIC) + 8
        header = json.loads(data[start : start + length])
        return {entry["name"]: _decode(entry, data, start + length) for entry in header["weights"]}
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}. Write it again with save_sparse.") from error


def _decode(entry: dict[str, Any], data: bytes, start: int) -> np.ndarray:
    dtype = np.dtype(getattr(ml_dtypes, entry["dtype"], entry["dtype"]))
    begin = start + entry["offset"]
    chunk = data[begin : begin + entry["bytes"]]
    if len(chunk) != entry["bytes"]:
        raise ValueError(f"{entry['name']} is cut short")
    size = int(np.prod(entry["shape"]))
    if entry["encoding"] == "dense":
        return np.frombuffer(chunk, dtype).reshape(entry["shape"]).copy()
    bits = (size + 7) // 8
    stored = np.unpackbits(np.frombuffer(chunk[:bits], np.uint8), count=size, bitorder="little").astype(bool)
    flat = np.zeros(size, dtype)
    flat[stored] = np.frombuffer(chunk[bits:], dtype)
    return flat.reshape(entry["shape"])

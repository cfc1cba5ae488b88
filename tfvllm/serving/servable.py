"""One SavedModel, loaded as TF Serving loads it: a session of its own, run by tensor names from its signatures.

A session owns its variables and tables, so that closing it gives their memory back: versions come and go.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tfvllm.errors import InputError
from tfvllm.serving.status import CODES, ServingError, invalid

PREDICT = "tensorflow/serving/predict"
CLASSIFY = "tensorflow/serving/classify"
REGRESS = "tensorflow/serving/regress"


@dataclass(frozen=True)
class Spec:
    """A tensor of a signature: its name in the graph, dtype ("float32", "string", …), shape (-1 unknown, None any)."""

    tensor: str
    dtype: str
    shape: tuple[int, ...] | None

    def describe(self) -> str:
        """Such as `int32[batch, ?]`."""
        if self.shape is None:
            return f"{self.dtype}[...]"
        return f"{self.dtype}[{', '.join('?' if size < 0 else str(size) for size in self.shape)}]"

    def accepts(self, shape: Sequence[int]) -> bool:
        """Whether `shape` is as declared. Other shapes may be fed too: the graph judges them."""
        if self.shape is None:
            return True
        return len(shape) == len(self.shape) and all(own in (-1, size) for own, size in zip(self.shape, shape))


@dataclass(frozen=True)
class Signature:
    """A signature: name, method name, inputs and outputs by their public names; `proto` is its SignatureDef.

    Inputs in `defaults` may be left out. They steer the whole request (a temperature, stop strings) and are no rows.
    """

    name: str
    method: str
    inputs: Mapping[str, Spec]
    outputs: Mapping[str, Spec]
    proto: bytes = field(repr=False, default=b"")
    defaults: Mapping[str, np.ndarray] = field(repr=False, default_factory=dict)

    @property
    def required(self) -> list[str]:
        """The inputs that must be given."""
        return [name for name in self.inputs if name not in self.defaults]


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a TensorFlow dtype name (strings are `object`).

    Raises ServingError (UNIMPLEMENTED) for those no request can carry, such as `resource` and `variant`.
    """
    if name == "string":
        return np.dtype(object)
    import ml_dtypes

    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        raise ServingError("UNIMPLEMENTED", f"tensors of type {name} cannot be sent or answered") from None


def find_saved_model(directory: str | os.PathLike) -> Path:
    """`directory` itself if it is a SavedModel, else its highest version folder. Raises InputError."""
    from tfvllm.savedmodel import versions

    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"no folder {directory}; expected a SavedModel, or a folder with versions 1/, 2/, …")
    if (directory / "saved_model.pb").exists():
        return directory
    found = versions.find(directory)
    if not found:
        raise InputError(
            f"{directory} holds no saved_model.pb and no version folder (1/, 2/, …) with one. "
            "Export a model there first: tfvllm export MODEL.keras DST --task classify"
        )
    return found[max(found)]


class Servable:
    """A loaded SavedModel. `run` may be called from several threads at once.

    Raises TfvllmError's InputError when the folder holds no loadable SavedModel.
    """

    def __init__(self, directory: str | os.PathLike, *, intra_op_threads: int = 0, inter_op_threads: int = 0):
        from tfvllm.quietly import import_tensorflow
        from tfvllm.savedmodel import text_ops

        tf = import_tensorflow()
        text_ops.load()
        self.directory = Path(directory)
        config = tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=intra_op_threads, inter_op_parallelism_threads=inter_op_threads
        )
        self._graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=self._graph, config=config)
        self._callables: dict[tuple, object] = {}
        self._lock = threading.Lock()
        try:
            with self._graph.as_default():
                meta = _quietly(tf.compat.v1.saved_model.loader.load, self._session, ["serve"], str(directory))
        except Exception as error:
            self._session.close()
            line = " ".join(str(error).split())[:300]
            raise InputError(
                f"{directory} does not load as a SavedModel: {line}. Try: tfvllm lint {directory}"
            ) from error
        self.signatures = {
            name: _signature(name, definition)
            for name, definition in sorted(meta.signature_def.items())
            if name not in ("__saved_model_init_op", "__saved_model_train_op")
        }
        self._op_error = tf.errors.OpError

    def run(
        self, signature: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Runs a signature. `inputs` must be complete; `outputs` picks some (default: all).

        Raises ServingError with TensorFlow's own code when the graph refuses the inputs.
        """
        spec = self.signatures[signature]
        names = tuple(spec.outputs) if outputs is None else tuple(outputs)
        feeds = tuple(sorted(inputs))
        for name in names:
            numpy_dtype(spec.outputs[name].dtype)
        try:
            values = self._callable(signature, feeds, names)(*(inputs[name] for name in feeds))
        except self._op_error as error:
            raise ServingError(CODES.get(error.error_code, "UNKNOWN"), _short(error.message)) from None
        except (ValueError, TypeError) as error:
            raise invalid(_short(str(error))) from None
        except RuntimeError as error:
            raise ServingError("UNAVAILABLE", _short(str(error))) from None
        return {name: _array(value) for name, value in zip(names, values)}

    def close(self) -> None:
        """Frees the session, its variables and tables."""
        with self._lock:
            self._callables.clear()
        self._session.close()

    def _callable(self, signature: str, feeds: tuple[str, ...], names: tuple[str, ...]):
        key = (signature, feeds, names)
        found = self._callables.get(key)
        if found is None:
            from tensorflow.core.protobuf import config_pb2

            with self._lock:
                spec = self.signatures[signature]
                options = config_pb2.CallableOptions(
                    feed=[spec.inputs[name].tensor for name in feeds],
                    fetch=[spec.outputs[name].tensor for name in names],
                )
                # As TF Serving's Session::Run: `make_callable` would hold arrays to the shapes of the graph's tensors,
                # which are hints there (a tensor [?, 1] takes [3]).
                found = self._session._make_callable_from_options(options)
                self._callables[key] = found
        return found


def _array(value) -> np.ndarray:
    # A scalar comes as a bare number or bytes; a bare `bytes` array would be padded to a fixed width.
    return np.asarray(value, object) if isinstance(value, bytes) else np.asarray(value)


def _quietly(load, *arguments):
    import logging

    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return load(*arguments)
    finally:
        logger.setLevel(level)


def _signature(name: str, definition) -> Signature:
    import tensorflow as tf

    def spec(info) -> Spec:
        shape = info.tensor_shape
        sizes = None if shape.unknown_rank else tuple(dim.size if dim.size >= 0 else -1 for dim in shape.dim)
        if info.WhichOneof("encoding") != "name":  # sparse and ragged ones have several tensors, and no dtype of TF's
            return Spec("", info.WhichOneof("encoding") or "none", sizes)
        return Spec(info.name, tf.as_dtype(info.dtype).base_dtype.name, sizes)

    return Signature(
        name,
        definition.method_name,
        {key: spec(definition.inputs[key]) for key in sorted(definition.inputs)},
        {key: spec(definition.outputs[key]) for key in sorted(definition.outputs)},
        definition.SerializeToString(deterministic=True),
        {key: _default(definition.defaults[key]) for key in sorted(definition.defaults) if key in definition.inputs},
    )


def _default(proto) -> np.ndarray:
    import tensorflow as tf

    array = np.asarray(tf.make_ndarray(proto))
    return array.astype(object) if array.dtype.kind in "SU" else array


def _short(message: str) -> str:
    # One line says what is wrong; what is around it (where in which Python file the node was made) helps no client.
    lines = [line.strip() for line in message.split("\n\t [[")[0].splitlines() if line.strip()]
    if lines and lines[0].startswith("Graph execution error"):
        nodes = [i for i, line in enumerate(lines) if line.startswith("Node: ")]
        lines = lines[nodes[-1] + 1 :] if nodes else lines[-1:]
    return (lines[0] if lines else "no message")[:1000]

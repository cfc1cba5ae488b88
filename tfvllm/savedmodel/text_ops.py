"""TensorFlow Text's op libraries, loaded without importing the Python package (which would import Keras).

This file imports nothing of tfvllm, so that a fresh process may load it by its path.
"""

import importlib.util
from pathlib import Path


def libraries() -> list[Path]:
    """The op libraries of the installed tensorflow_text; an empty list where it is not installed."""
    spec = importlib.util.find_spec("tensorflow_text")
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(next(iter(spec.submodule_search_locations)))
    return sorted(root.glob("python/*/_*.so"))


def load() -> int:
    """Registers the ops and kernels of tensorflow_text in this process; returns how many libraries were loaded."""
    import tensorflow as tf

    loaded = libraries()
    for library in loaded:
        tf.load_op_library(str(library))
    return len(loaded)

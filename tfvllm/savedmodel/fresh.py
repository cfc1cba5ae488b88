"""Runs signatures of SavedModels with TensorFlow alone. Executed by its path in a fresh process; imports no tfvllm.

    python fresh.py REQUEST RESULT

Both are pickles: REQUEST a list of (directory, requests), RESULT for each the outputs, or words where it failed.
Keras and tfvllm are hidden from the process, as on a server that lacks them.
"""

import gc
import importlib.machinery
import importlib.util
import pickle
import sys
from pathlib import Path

HIDDEN = ("keras", "keras_hub", "keras_nlp", "tf_keras", "tfvllm", "tensorflow_model_optimization")


def hide(names=HIDDEN) -> None:
    """Makes `import` find none of `names`, as where they are not installed."""

    def hiding(finder):
        class Hiding:
            @staticmethod
            def find_spec(name, path=None, target=None):
                return None if name.split(".")[0] in names else finder.find_spec(name, path, target)

        return Hiding

    sys.meta_path[:] = [hiding(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]


def load(directory):
    """The SavedModel in `directory`."""
    return _by_path("read").load(directory)


def run(model, requests) -> list[dict]:
    """`requests`: list of (signature name, inputs); the outputs of each as numpy arrays."""
    import tensorflow as tf

    results = []
    for name, inputs in requests:
        signature = model.signatures[name]
        specs = signature.structured_input_signature[1]
        tensors = {key: tf.constant(value, specs[key].dtype) for key, value in inputs.items()}
        results.append({key: value.numpy() for key, value in signature(**tensors).items()})
    return results


def _by_path(name):
    """A file of tfvllm that imports nothing of it, as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(request: str, result: str) -> None:
    gc.set_threshold(50_000, 5, 5)  # as the command line: imports leave many objects and no garbage
    hide()
    _by_path("text_ops").load()
    answers: list = []
    for directory, requests in pickle.loads(Path(request).read_bytes()):
        try:
            answers.append(run(load(directory), requests))
        except Exception as error:
            answers.append(" ".join(f"{type(error).__name__}: {error}".split()))
    loaded = sorted({name.split(".")[0] for name in sys.modules})
    found = [name for name in HIDDEN if name in loaded]
    assert not found, f"{found} must not be imported here"
    Path(result).write_bytes(pickle.dumps({"answers": answers, "modules": loaded}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Importing TensorFlow without its start-up noise, and without Keras where only SavedModels are run."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def no_stderr() -> Iterator[None]:
    """Sends file descriptor 2 to nowhere: TensorFlow's C++ logs before its log level can be set.

    Python's own tracebacks are not lost: an exception leaves the block as usual.
    """
    try:
        sys.stderr.flush()
        saved = os.dup(2)
    except (OSError, ValueError, AttributeError):  # no such descriptor: nothing to keep quiet
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def import_tensorflow(*, without_keras: bool = False):
    """`import tensorflow`, quietly.

    `without_keras` hides Keras from the import, which TensorFlow would load to fill `tf.keras`: over a second saved,
    for processes that only run SavedModels. It has no effect where either is loaded already.
    """
    if "tensorflow" in sys.modules:
        return sys.modules["tensorflow"]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with no_stderr():
        if without_keras and "keras" not in sys.modules:
            finders = list(sys.meta_path)
            from tfvllm.savedmodel.fresh import hide

            hide(("keras", "tf_keras"))
            try:
                import tensorflow
            finally:
                sys.meta_path[:] = finders
        else:
            import tensorflow
        tensorflow.constant(0)  # the runtime's own messages come with its first use
    return tensorflow

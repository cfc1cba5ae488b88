"""The one door to TensorFlow Model Optimization.

Importing TFMOT sets TF_USE_LEGACY_KERAS=1, after which `tf.keras`, if nobody touched it before, becomes Keras 2. So:
touch `tf.keras` first, import late, put the variable back.
"""

import functools
import os
from typing import Any, NamedTuple


class Tfmot(NamedTuple):
    """TFMOT's own modules: schedules, mask update, its helpers."""

    schedule: Any
    impl: Any
    utils: Any


@functools.cache
def tfmot() -> Tfmot:
    """Imports TFMOT's sparsity modules and leaves `keras`, `tf.keras` and the environment as they were."""
    import tensorflow as tf

    _ = tf.keras.Model  # settles which Keras tf.keras is
    before = os.environ.get("TF_USE_LEGACY_KERAS")
    try:
        from tensorflow_model_optimization.python.core.sparsity.keras import (
            pruning_impl,
            pruning_schedule,
            pruning_utils,
        )
    finally:
        if before is None:
            os.environ.pop("TF_USE_LEGACY_KERAS", None)
        else:
            os.environ["TF_USE_LEGACY_KERAS"] = before
    return Tfmot(pruning_schedule, pruning_impl, pruning_utils)

"""Numbers that may change while training: a constant, or a function of the training step."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfvllm.errors import InputError

Scheduled = float | Callable[[Any], Any]


def check_scheduled(value: Scheduled, name: str, *, positive: bool = False) -> Scheduled:
    """Returns a number as float and a schedule as it is. Raises `InputError` for anything else."""
    if callable(value):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{name} must be a number or a schedule of the training step, found {value!r}.")
    if value < 0 or (positive and value == 0):
        raise InputError(f"{name} must be {'above zero' if positive else 'zero or above'}, found {value}.")
    return float(value)


def value_at(value: Scheduled, step: int | tf.Tensor) -> float | tf.Tensor:
    """The value at `step`: a Python float for a constant, a float32 scalar for a schedule."""
    if not callable(value):
        return value
    return tf.cast(value(tf.cast(step, tf.int32)), tf.float32)


def serialize(value: Scheduled) -> Any:
    """A JSON-able form of `value`; schedules must be Keras objects or registered functions."""
    return value if isinstance(value, float) else keras.saving.serialize_keras_object(value)


def deserialize(value: Any) -> Scheduled:
    """The inverse of `serialize`."""
    return keras.saving.deserialize_keras_object(value) if isinstance(value, dict) else value

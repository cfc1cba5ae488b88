"""Models that compute in less than float32: how exact they are, and what they would answer in float32.

A model in bfloat16 or float16 is wrong by more than an export of it in float32 may be; so it is no measure for one.
"""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.families import adapter_for


def coarsest_type(model) -> tf.DType:
    """The floating type with the fewest digits in which a layer of `model` computes or holds weights.

    A model that says nothing of types computes in float32.
    """
    layers = model._flatten_layers() if hasattr(model, "_flatten_layers") else []
    names = {name for layer in layers for name in (layer.compute_dtype, layer.variable_dtype)}
    floating = [dtype for dtype in map(tf.as_dtype, names - {None}) if dtype.is_floating]
    return max(floating, key=epsilon, default=tf.float32)


def epsilon(dtype: tf.DType) -> float:
    """The step from 1 to the next number of a floating type: 2^-23 for float32, 2^-10 float16, 2^-7 bfloat16."""
    return float(np.spacing(dtype.as_numpy_dtype(1)))


def tolerance(model, exact: float = 1e-5, steps: float = 4.0) -> dict[str, float]:
    """`{"atol", "rtol"}` for `tfvllm.savedmodel.parity.check` of what computes in the model's own types.

    Args:
        model: a Keras model or layer.
        exact: the absolute tolerance for a model that computes in float32 throughout; the relative one is 0.
        steps: of the coarsest type, for one that does not: both tolerances are so many times its `epsilon`.
    """
    dtype = coarsest_type(model)
    if dtype.size >= 4:
        return {"atol": exact, "rtol": 0.0}
    return {"atol": max(exact, steps * epsilon(dtype)), "rtol": steps * epsilon(dtype)}


def in_float32(model) -> Any | None:
    """`model` itself where it computes in float32; else the same model with the same weights that does.

    model: a keras-nlp backbone, or a task made of one; a task comes back without its preprocessor.
    None where the model cannot be built from its config a second time.
    """
    if coarsest_type(model).size >= 4:
        return model
    backbone = getattr(model, "backbone", None)
    usual = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")  # a task takes it from here, whatever its backbone has
    try:
        if backbone is not None:
            twin = type(model)(backbone=_rebuilt(backbone), preprocessor=None)
        else:
            twin = _rebuilt(model)
    except Exception:  # whatever a user's own class says: there is no second one to compare with
        return None
    finally:
        keras.config.set_dtype_policy(usual)
    own, new = model.weights, twin.weights
    if [tuple(weight.shape) for weight in own] != [tuple(weight.shape) for weight in new]:
        return None
    for weight, value in zip(new, own):
        weight.assign(keras.ops.cast(value, weight.dtype))
    return twin if coarsest_type(twin).size >= 4 else None


def _rebuilt(backbone):
    config = backbone.get_config()
    with contextlib.suppress(InputError):  # a family that tfvllm knows nothing more of
        config = adapter_for(backbone).complete_config(config, backbone)
    return type(backbone).from_config({**config, "dtype": "float32"})


def answer(model, inputs: dict[str, np.ndarray], steps: float = 8.0) -> tuple[np.ndarray, bool]:
    """(what `model` answers to `inputs` as float32, whether that was computed in float32).

    A second model built from a config that forgets something would be another one: where its answer is further from
    the model's own than `steps` of the model's coarsest type, at the largest number in it, the model's own counts.
    """
    own = tf.cast(model(inputs, training=False), tf.float32).numpy()
    twin = in_float32(model)
    if twin is None or twin is model:
        return own, twin is model
    wide = twin(inputs, training=False).numpy()
    finite = np.isfinite(own)  # float16 ends at 65504
    allowed = steps * epsilon(coarsest_type(model)) * np.max(np.abs(wide), initial=0.0)
    return (wide, True) if np.all(np.abs(own - wide)[finite] <= allowed) else (own, False)

"""Functions that all signatures of a SavedModel share."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import tensorflow as tf

from tfvllm.generation.cache import relaxed_shapes


class SharedFunctions:
    """Traces each function once, and calls it from then on.

    A SavedModel then holds each of these large pieces once, however many signatures and loops read it: it is smaller
    and loaded sooner. TensorFlow puts the pieces back in line when it prepares to run a signature.

    What is called for every layer and takes long beside a call is better left out of line: TensorFlow then prepares it
    once. With the attention of 30 layers to long prompts in line a first prompt took twice as long.
    """

    def __init__(self) -> None:
        self._traced: dict[tuple, Any] = {}

    def __call__(self, function, *tensors, key: Hashable = None, inline: bool = True, **chosen):
        """`function(*tensors, **chosen)`.

        Args:
            function: told by its name.
            tensors: nested tensors; all but the last axis of floating-point ones may have another size at each call.
            key: what else the function depends on.
            inline: whether TensorFlow puts it in line.
            chosen: hashable.
        """
        specs = tf.nest.map_structure(lambda t, shape: tf.TensorSpec(shape, t.dtype), tensors, relaxed_shapes(tensors))
        name = function.__name__.strip("_")
        known = (name, key, *tf.nest.flatten(specs), *chosen.items())
        if known not in self._traced:

            def shared(*tensors):
                return function(*tensors, **chosen)

            shared.__name__ = name
            kept = None if inline else {"_noinline": True}
            traced = tf.function(shared, input_signature=specs, autograph=False, experimental_attributes=kept)
            self._traced[known] = traced.get_concrete_function()  # one, inside and outside of saving
        return self._traced[known](*tensors)

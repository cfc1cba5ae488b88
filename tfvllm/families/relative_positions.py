"""DeBERTa's relative positions in a graph, as the model has them outside of one.

It puts distances into buckets by `ceil(log(d / m) / log(n / m) * (m - 1))`, whose inside is a whole number at the
largest distance n. A graph rounds it in another way (its optimiser turns the division into a product), so that the ends
of the longest text are a bucket further apart. Here the buckets come from a table that was computed outside of the
graph.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.families.taps import hooked


@contextlib.contextmanager
def exact_positions(model: Any, longest: int | None = None) -> Iterator[None]:
    """While it lasts, graphs traced of `model` have the relative positions that it has eagerly.

    Args:
        model: any Keras model; one without DeBERTa's attention is left alone.
        longest: what no text will be longer than, in tokens. None: longer ones than the model was made for may come,
            and are computed as keras-nlp does.
    """
    with contextlib.ExitStack() as taps:
        for layer in model._flatten_layers():
            if type(layer).__name__ == "DisentangledSelfAttention":
                taps.enter_context(
                    hooked(layer, "_get_rel_pos", _from_table(int(layer.max_position_embeddings), longest))
                )
        yield


def _from_table(limit: int, longest: int | None) -> Callable[..., Any]:
    def hook(method: Callable[[Any], Any], length: Any) -> Any:
        if not tf.inside_function():
            return method(length)
        size = longest or limit
        with tf.init_scope():
            buckets = np.asarray(method(size))[0, 0]
        # Of -(size - 1) … size - 1: the last column upwards, then the first one downwards.
        by_distance = np.concatenate([buckets[0, :0:-1], buckets[:, 0]])

        places = tf.range(length)
        distances = places[:, tf.newaxis] - places[tf.newaxis]
        known = tf.gather(by_distance, tf.clip_by_value(distances + (size - 1), 0, 2 * size - 2))
        if longest is None:
            known = tf.cond(
                tf.less_equal(length, size),
                lambda: known,
                lambda: tf.where(tf.abs(distances) < size, known, tf.cast(method(length)[0, 0], known.dtype)),
            )
        return known[tf.newaxis, tf.newaxis]

    return hook

"""On-policy distillation: teacher and student compared on what the student itself writes.

Generalised knowledge distillation (GKD), Agarwal et al. 2024, arXiv:2306.13649: a student that is trained on the data's
texts alone meets its own mistakes for the first time when it is used. A share of the batches keeps the data's prompts,
and the student writes the rest.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.distillation.inputs import dataset_of, has_strings, preprocess_of
from tfvllm.errors import InputError

# (features, seed) -> (token ids int32[batch, length], padding mask bool of that shape): rows whose padding mask says
# what is given (`decoder_padding_mask` of a sequence-to-sequence model), continued up to their length.
Write = Callable[[dict[str, Any], int], tuple[Any, Any]]
# The number of tokens that are given; or from (x, y, sample_weight) to that of each row, int[batch].
Prompt = int | Callable[[Any, Any, Any], Any] | None


class OnPolicy:
    """Has the student write a share of the batches (the λ of GKD), deterministically.

    In such a batch each row keeps its prompt, and `write` continues it to the row's length or an end token. Teacher and
    student are compared where the student chose; the task's loss does not see the batch, whose labels mean nothing.
    All batches come out as `(x, y, {"task": weights, "divergence": weights})`, which a `Distiller` takes.

    Args:
        write: `tfvllm.rollouts.Rollouts(student)`, or any other function of that kind.
        share: of the batches, in [0, 1].
        prompt: how many tokens of each row are given: a number, or a function of (x, y, sample_weight) to int[batch].
            None: those before the first label of weight above 0, which is the prompt of rows made of prompt and
            completion. At least 1, and no more than the row has.
        seed: of all that is drawn: which batches, and what is written.
    Raises:
        InputError: settings that make no sense.

    Example:
        >>> repeat = lambda features, seed: (features["token_ids"][:, [0] * 6], np.ones([16, 6], bool))
        >>> policy = tfvllm.distillation.OnPolicy(repeat, share=1.0, prompt=2)
        >>> rows, labels, weights = policy.change({"token_ids": ids, "padding_mask": 0 * ids + 1}, ids, None, (0, 0))
        >>> bool((rows["token_ids"] == ids[:, :1]).all()), weights["divergence"][0].tolist()
        (True, [0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    """

    def __init__(self, write: Write, share: float = 0.5, *, prompt: Prompt = None, seed: int = 0):
        if not callable(write):
            raise InputError(
                f"write must be a function such as tfvllm.rollouts.Rollouts(student), found {type(write).__name__}."
            )
        if not 0.0 <= share <= 1.0:
            raise InputError(f"share must be between 0 and 1, found {share}.")
        if not callable(prompt) and prompt is not None and (isinstance(prompt, bool) or prompt < 1):
            raise InputError(f"prompt must be at least 1 token, a function, or None, found {prompt!r}.")
        self.write, self.share, self.prompt, self.seed = write, float(share), prompt, int(seed)

    def dataset(self, data: tf.data.Dataset, distiller: keras.Model) -> tf.data.Dataset:
        """`data` for `distiller.fit`: each batch is written when it is asked for, by the student as it then is.

        What is drawn depends on `seed` and on how many steps the optimizer has made, so that training which is resumed
        (`keras.callbacks.BackupAndRestore`) goes on with the very rollouts. Nothing may come between: no `prefetch`.

        Args:
            data: batches (x, y) or (x, y, sample_weight) of a causal or sequence-to-sequence language model, or of raw
                strings that the student's preprocessor makes into such.
            distiller: the compiled `tfvllm.Distiller` that is to be fitted.
        Raises:
            InputError: `write` writes with another model than the student; batches of another kind; a Distiller that
                is not compiled, or that takes several batches at once.
        """
        writes_with = getattr(self.write, "model", distiller.student)
        if writes_with is not distiller.student:
            raise InputError(
                f"write writes with {writes_with.name}, but the Distiller trains {distiller.student.name}; expected "
                "the same model. Make it of distiller.student."
            )
        if getattr(distiller, "optimizer", None) is None:
            raise InputError("rollouts are told by the optimizer's steps; the Distiller has none: compile it first.")
        if has_strings(data):
            data = dataset_of(data, None, None, None, preprocess_of(distiller.student), shuffle=False)
        signature = self._signature(data.element_spec)

        def batches() -> Iterator[tuple]:
            step, again = -1, 0
            for batch in data.as_numpy_iterator():
                if distiller.steps_per_execution != 1:
                    raise InputError(
                        f"steps_per_execution is {distiller.steps_per_execution}; expected 1, or later batches of a "
                        "call would be written before the student has learned from the earlier ones."
                    )
                now = int(distiller.optimizer.iterations)
                step, again = now, again + 1 if now == step else 0  # one step of gradients may take several batches
                x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
                changed = self.change(x, y, sample_weight, at=(now, again))
                yield tf.nest.map_structure(
                    lambda spec, part: np.asarray(part, spec.dtype.as_numpy_dtype), signature, changed
                )

        found = tf.data.Dataset.from_generator(batches, output_signature=signature)
        options = tf.data.Options()
        options.experimental_optimization.inject_prefetch = False
        return found.apply(tf.data.experimental.assert_cardinality(data.cardinality())).with_options(options)

    def change(self, x: Any, y: Any, sample_weight: Any, at: tuple[int, ...]) -> tuple[dict, np.ndarray, dict]:
        """One batch, written by the student or as it was.

        Args:
            x: features by name, of keras-nlp: token_ids and padding_mask int[batch, length], padded on the right; with
                `decoder_` before them where an encoder's are there too.
            y: the next token of each position, int[batch, length], or None: the task's loss then sees none of them.
            sample_weight: float [batch, length], [batch] or None (all positions that are no padding).
            at: where in the training this is, such as (epoch, step): the same place draws the same.
        Returns:
            (x, y, {"task": float32[batch, length], "divergence": float32[batch, length]}).
        Raises:
            InputError: rows that are padded on the left, or features of another kind.
        """
        names = _names(x)
        ids, mask = (np.asarray(x[name]) for name in names)
        real = mask.astype(bool)
        weights = _weights(real, sample_weight)
        random = np.random.default_rng((self.seed, *at))
        chosen, seed = random.random() < self.share, int(random.integers(2**31 - 1))
        if not chosen:
            task = np.zeros_like(weights) if y is None else weights
            return dict(x), _next_of(ids) if y is None else y, {"task": task, "divergence": weights}
        lengths = real.sum(axis=1)
        if not np.array_equal(real, np.arange(ids.shape[1]) < lengths[:, np.newaxis]):
            raise InputError("a row is padded on the left or inside; expected rows padded on the right.")
        given = np.arange(ids.shape[1]) < self._prompts(x, y, sample_weight, lengths)[:, np.newaxis]
        asked = {**x, names[0]: np.where(given, ids, 0), names[1]: given.astype(mask.dtype)}
        new, known = (np.asarray(part) for part in self.write(asked, seed))
        written = _next_of(known.astype(bool) & ~given).astype("float32")
        rows = {**x, names[0]: new.astype(ids.dtype), names[1]: known.astype(mask.dtype)}
        return rows, _next_of(new), {"task": np.zeros_like(weights), "divergence": written}

    def _prompts(self, x: Any, y: Any, sample_weight: Any, lengths: np.ndarray) -> np.ndarray:
        if callable(self.prompt):
            found = np.asarray(self.prompt(x, y, sample_weight))
        elif self.prompt is not None:
            found = np.full_like(lengths, self.prompt)
        elif np.ndim(sample_weight) == 2:
            found = np.argmax(np.asarray(sample_weight) > 0, axis=1) + 1
        else:
            found = np.ones_like(lengths)
        return np.minimum(np.maximum(found, 1), lengths)

    def _signature(self, spec: Any) -> tuple:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(spec)
        ids = x[_names(x)[0]]
        if ids.shape.rank != 2 or (y is not None and y.shape.rank != 2):
            raise InputError(
                f"expected batches of token ids and labels [batch, length], found {ids.shape} and "
                f"{None if y is None else y.shape}. Batch the rows first."
            )
        if isinstance(self.prompt, int) and ids.shape[1] is not None and self.prompt >= ids.shape[1]:
            raise InputError(f"prompt={self.prompt} leaves nothing to write in rows of {ids.shape[1]}. Pass less.")
        weights = tf.TensorSpec(ids.shape, tf.float32)
        return x, ids if y is None else y, {"task": weights, "divergence": weights}


def _names(x: Any) -> tuple[str, str]:
    """What the tokens and the padding mask of the side that is written are called."""
    for side in ("decoder_", ""):
        names = f"{side}token_ids", f"{side}padding_mask"
        if isinstance(x, Mapping) and set(names) <= set(x):
            return names
    raise InputError(
        f"the batch has {sorted(x) if isinstance(x, Mapping) else type(x).__name__}; expected token_ids and "
        "padding_mask of a language model, or decoder_token_ids and decoder_padding_mask. Use its preprocessor."
    )


def _next_of(rows: np.ndarray) -> np.ndarray:
    """Each position's next: one to the left, 0 at the end."""
    return np.pad(rows[:, 1:], [(0, 0), (0, 1)])


def _weights(real: np.ndarray, sample_weight: Any) -> np.ndarray:
    """float32[batch, length]."""
    if sample_weight is None:
        return real.astype("float32")
    weights = np.asarray(sample_weight, "float32")
    return np.broadcast_to(weights if weights.ndim == 2 else weights[:, np.newaxis], real.shape).copy()

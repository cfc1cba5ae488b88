"""The general path: keras-nlp's own decode step inside tfvllm's loop, for families that no reader knows.

`CausalLM.generate_step` of every family fills its caches its own way and then hands a function `next(prompt, cache,
index)` to the model's sampler. The loop below takes the sampler's place: it knows nothing of the caches, so that
key-value caches, states of recurrent layers and mixtures of both go the same way. All rows stand at one index; a row
whose prompt is longer than others' reads on in its prompt while those answer already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tfvllm.generation import sampling
from tfvllm.generation.loop import EMPTY, LENGTH, RUNNING, STOP, Result, bucketed
from tfvllm.generation.sampling import SamplingParams


def generate(
    model: Any,
    ids: tf.Tensor,
    lengths: tf.Tensor,
    max_new_tokens: tf.Tensor,
    *,
    controls: SamplingParams | None = None,
    stop_ids: tuple[int, ...] = (),
    stops=None,
    max_length: int | None = None,
    fixed: bool = False,
    log_probs: bool = False,
    pad_id: int = 0,
) -> Result:
    """Generates up to `max_new_tokens` tokens for each prompt.

    Arguments and result are those of `tfvllm.generation.loop.generate`, and beside them:

    Args:
        model: a keras-nlp `CausalLM` that reads text alone.
        fixed: rows are `max_length` long whatever comes, for models that must know how long; else as long as needed.
    """
    with tf.control_dependencies([] if controls is None else sampling.valid(controls)):
        max_new_tokens = tf.maximum(max_new_tokens, 0)
    batch = tf.shape(ids)[0]
    room = tf.fill([batch], max_new_tokens)
    if max_length is not None:
        room = tf.clip_by_value(max_length - lengths, 0, max_new_tokens)
    room = tf.where(lengths > 0, room, 0)
    uniform = tf.zeros([batch, 0]) if controls is None else sampling.uniforms(controls.seed, batch, max_new_tokens)
    # Models may reduce over rows: an empty batch gets one to compute with.
    spare = tf.cast(batch == 0, tf.int32)
    ids, read = bucketed(tf.pad(ids, [[0, spare], [0, 0]]), tf.pad(lengths, [[0, spare]]), pad_id)
    lengths, room = tf.pad(lengths, [[0, spare]]), tf.pad(room, [[0, spare]])
    uniform = tf.pad(uniform, [[0, spare], [0, 0]])
    ids = tf.where(tf.sequence_mask(read, tf.shape(ids)[1]), ids, pad_id)
    steps = tf.reduce_max(room)
    if fixed:
        assert max_length is not None, "a fixed length must be known"
        ids = tf.pad(ids[:, :max_length], [[0, 0], [0, max_length - tf.minimum(tf.shape(ids)[1], max_length)]])
        ids = tf.ensure_shape(ids, [None, max_length])
    loop = _Loop(ids, lengths, read, room, steps, max_new_tokens, uniform, controls, stop_ids, stops, log_probs, pad_id)
    with sampled_by(model, loop):
        model.generate_step(features(model)(ids, read, steps, fixed), stop_token_ids=None)
    found = loop.result
    assert found is not None, "the model did not ask its sampler"
    return Result(
        token_ids=found.token_ids[:batch],
        lengths=found.lengths[:batch],
        reasons=found.reasons[:batch],
        log_probs=None if found.log_probs is None else found.log_probs[:batch],
    )


@contextlib.contextmanager
def sampled_by(model: Any, sampler: Any) -> Iterator[None]:
    """`model` with another sampler, while it is traced."""
    own = model.sampler
    model.sampler = sampler
    try:
        yield
    finally:
        model.sampler = own


def features(model: Any) -> Callable[..., dict[str, tf.Tensor]]:
    """What makes the inputs of `model.generate_step`.

    It takes ids int32[rows, length], lengths int32[rows] (at least 1), steps int32[] (how many new tokens there must be
    room for) and whether the length is fixed (then the room is in it).
    """
    names = [base.__name__ for base in type(model).__mro__]
    return _two_sequences if "RWKV7CausalLM" in names else _one_sequence


def _one_sequence(ids: tf.Tensor, lengths: tf.Tensor, steps: tf.Tensor, fixed: bool) -> dict[str, tf.Tensor]:
    """Prompts in front, room behind."""
    mask = tf.sequence_mask(lengths, tf.shape(ids)[1])
    if not fixed:
        ids, mask = (tf.pad(part, [[0, 0], [0, steps]]) for part in (ids, mask))
    return {"token_ids": ids, "padding_mask": tf.ensure_shape(mask, ids.shape)}


def _two_sequences(ids: tf.Tensor, lengths: tf.Tensor, steps: tf.Tensor, fixed: bool) -> dict[str, tf.Tensor]:
    """A state has no room: what is read to fill it, at the right edge, and what is written, from the last token on."""
    rows, width = tf.shape(ids)[0], tf.shape(ids)[1]
    last = tf.gather(ids, lengths - 1, batch_dims=1)
    count = tf.maximum(lengths - 1, 1)  # of a single token's prompt keras-nlp reads a 0
    place = tf.range(width) - (width - count[:, tf.newaxis])
    known = tf.where(lengths[:, tf.newaxis] > 1, ids, 0)
    read = tf.where(place >= 0, tf.gather(known, tf.maximum(place, 0), batch_dims=1), 0)
    read = tf.ensure_shape(read, ids.shape)
    return {
        "token_ids": read,
        "input_padding_mask": tf.ensure_shape(place >= 0, ids.shape),
        "predict_token_ids": tf.pad(last[:, tf.newaxis], [[0, 0], [0, steps]]),
        "padding_mask": tf.pad(tf.ones([rows, 1], tf.bool), [[0, 0], [0, steps]]),
    }


class _Loop:
    """In the place of a keras-nlp sampler: the loop over new tokens. `result` is what it found."""

    def __init__(
        self, ids, lengths, read, room, steps, max_new_tokens, uniform, controls, stop_ids, stops, log_probs, pad_id
    ):
        self.ids, self.lengths, self.read, self.room, self.steps = ids, lengths, read, room, steps
        self.max_new_tokens, self.uniform, self.controls = max_new_tokens, uniform, controls
        self.stop_ids, self.stops, self.log_probs, self.pad_id = stop_ids, stops, log_probs, pad_id
        self.result: Result | None = None

    def __call__(self, next, prompt, cache=None, index=0, mask=None, **_):
        rows, width = tf.shape(prompt)[0], tf.shape(prompt)[1]
        # How far a row's prompt goes in what this model steps over, which need not be the prompt alone.
        behind = tf.reduce_sum(tf.cast(mask, tf.int32), axis=-1)
        every = tf.range(rows)
        running = tf.where(self.lengths > 0, tf.where(self.room > 0, RUNNING, LENGTH), EMPTY)
        state = {
            "reasons": running,
            "counts": tf.zeros([rows], tf.int32),
            "tails": tf.fill([rows], ""),
            "tokens": tf.fill([self.max_new_tokens, rows], self.pad_id),
            "scores": tf.zeros([self.max_new_tokens, rows] if self.log_probs else [0, 0]),
            "history": tf.pad(self.ids, [[0, 0], [0, self.max_new_tokens]]) if self.controls else tf.zeros([rows, 0]),
        }

        def unfinished(index, prompt, cache, state):
            return (index < width) & tf.reduce_any(state["reasons"] == RUNNING)

        def advance(index, prompt, cache, state):
            state = dict(state)
            logits, _, cache = next(prompt, cache, index)
            logits = tf.cast(logits, tf.float32)
            step = index - behind  # int32[rows], below 0 while a row's prompt is read
            place = tf.clip_by_value(step, 0, tf.maximum(self.max_new_tokens - 1, 0))
            answering = (step >= 0) & (state["reasons"] == RUNNING)
            tokens = self._next_tokens(logits, place, state["history"])
            written = tf.where(answering, tokens, self.pad_id)
            cell = tf.stack([place, every], axis=1)
            kept = tf.gather_nd(state["tokens"], cell)
            state["tokens"] = tf.tensor_scatter_nd_update(state["tokens"], cell, tf.where(answering, written, kept))
            if self.log_probs:
                score = sampling.log_probability(logits, tokens)
                kept = tf.gather_nd(state["scores"], cell)
                score = tf.where(answering, score, kept)
                state["scores"] = tf.tensor_scatter_nd_update(state["scores"], cell, score)
            if self.controls is not None:
                cell = tf.stack([every, self.read + place], axis=1)
                kept = tf.gather_nd(state["history"], cell)
                changed = tf.where(answering, written, kept)
                state["history"] = tf.tensor_scatter_nd_update(state["history"], cell, changed)
            state["counts"] += tf.cast(answering, tf.int32)
            ended = tf.zeros_like(answering)
            for stop in self.stop_ids:
                ended |= tokens == stop
            if self.stops is not None:
                found, tails = self.stops.found(state["tails"], tokens)
                state["tails"] = tf.where(answering, tails, state["tails"])
                ended |= found
            reason = tf.where(ended, STOP, tf.where(step + 1 >= self.room, LENGTH, RUNNING))
            state["reasons"] = tf.where(answering, reason, state["reasons"])
            here = tf.range(width) == index
            new = tf.where(step >= 0, written, prompt[:, index])
            prompt = tf.where(here, tf.cast(new, prompt.dtype)[:, tf.newaxis], prompt)
            cache = tf.nest.map_structure(_shaped_as, cache, first_cache)
            return index + 1, prompt, cache, state

        first_cache = () if cache is None else cache
        variables = (tf.cast(index, tf.int32), prompt, first_cache, state)
        _, prompt, _, state = tf.while_loop(unfinished, advance, variables)
        self.result = Result(
            token_ids=tf.transpose(state["tokens"]),
            lengths=state["counts"],
            reasons=state["reasons"],
            log_probs=tf.transpose(state["scores"]) if self.log_probs else None,
        )
        return prompt

    def _next_tokens(self, logits, place, history):
        if self.controls is None:
            return tf.argmax(logits, axis=-1, output_type=tf.int32)
        changed = sampling.apply_penalties(logits, history, self.read + place, self.controls)
        uniform = tf.gather(self.uniform, place, batch_dims=1)
        return sampling.sample_next(changed, uniform, self.controls)


def _shaped_as(new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
    """A model may lose sight of sizes that its cache keeps."""
    return tf.ensure_shape(new, old.shape)

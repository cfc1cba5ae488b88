"""The general path: keras-nlp's own decode step inside tfvllm's loop, for families that no reader knows.

`generate_step` of every family's `CausalLM` or `Seq2SeqLM` fills its caches its own way and then hands a function
`next(prompt, cache, index)` to the model's sampler. The loop below takes the sampler's place: it knows nothing of the
caches, so that key-value caches, states of recurrent layers and mixtures of both go the same way. All rows stand at one
index; a row whose prompt is longer than others' reads on in its prompt while those answer already.

Where a family's cached step computes something else than the model does, its forward pass over the whole row stands in
for it (`cached=False`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from tfvllm.generation import sampling
from tfvllm.generation.loop import (
    LENGTH,
    RUNNING,
    STOP,
    Result,
    asked_for,
    bucketed,
    first_reasons,
    is_one_of,
    room_for,
)
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
    limit: tf.Tensor | None = None,
    fixed: bool = False,
    cached: bool = True,
    log_probs: bool = False,
    pad_id: int = 0,
    context: tuple[tf.Tensor, tf.Tensor] | None = None,
) -> Result:
    """Generates up to `max_new_tokens` tokens for each prompt.

    Arguments and result are those of `tfvllm.generation.loop.generate`, and beside them:

    Args:
        model: a keras-nlp `CausalLM` or `Seq2SeqLM` that reads text alone.
        fixed: rows are `max_length` long whatever comes, for models that must know how long; else as long as needed.
        cached: by the model's own step and its caches; else each token by a forward pass.
        context: for a `Seq2SeqLM` the sources, ids int32 and padding mask bool[batch, source]; prompts are then what
            its decoder starts from.
    """
    max_new_tokens = asked_for(max_new_tokens, controls)
    batch = tf.shape(ids)[0]
    # Models may reduce over rows: an empty batch gets one to compute with.
    spare = tf.cast(batch == 0, tf.int32)
    ids, lengths = tf.pad(ids, [[0, spare], [0, 0]]), tf.pad(lengths, [[0, spare]])
    source = None if context is None else tuple(tf.pad(part, [[0, spare], [0, 0]]) for part in context)
    room = room_for(lengths, max_new_tokens, max_length, limit)
    uniform = None if controls is None else sampling.uniforms(controls.seed, batch + spare, max_new_tokens)
    ids, read = bucketed(ids, lengths, pad_id)
    ids = tf.where(tf.sequence_mask(read, tf.shape(ids)[1]), ids, pad_id)
    if fixed:
        assert max_length is not None, "a fixed length must be known"
        ids = tf.pad(ids[:, :max_length], [[0, 0], [0, max_length - tf.minimum(tf.shape(ids)[1], max_length)]])
        ids = tf.ensure_shape(ids, [None, max_length])
    loop = _Loop(
        start=_State(
            reasons=first_reasons(lengths, room),
            counts=tf.zeros_like(lengths),
            tails=tf.fill(tf.shape(lengths), ""),
            scores=tf.zeros([batch + spare, max_new_tokens if log_probs else 0]),
            history=ids[:, :0] if controls is None else tf.pad(ids, [[0, 0], [0, max_new_tokens]]),
        ),
        read=read,
        room=room,
        most=max_new_tokens,
        uniform=uniform,
        controls=controls,
        stop_ids=stop_ids,
        stops=stops,
        log_probs=log_probs,
        pad_id=pad_id,
    )
    if cached:
        with sampled_by(model, loop):
            inputs = features(model)(ids, read, tf.reduce_max(room), fixed)
            model.generate_step(inputs if source is None else of_two_stacks(inputs, source), stop_token_ids=None)
    else:
        inputs = _one_sequence(ids, read, tf.reduce_max(room), fixed)
        mask = inputs["padding_mask"]
        start = tf.reduce_min(tf.reduce_sum(tf.cast(mask, tf.int32), axis=-1))
        loop(functools.partial(_forward, model, source), inputs["token_ids"], index=start, mask=mask)
    end = loop.end
    assert end is not None and loop.tokens is not None, "the model did not ask its sampler"
    return Result(
        token_ids=loop.tokens[:batch],
        lengths=end.counts[:batch],
        reasons=end.reasons[:batch],
        log_probs=end.scores[:batch] if log_probs else None,
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


def _forward(model: Any, source, prompt: tf.Tensor, cache: Any, index: tf.Tensor) -> tuple[tf.Tensor, None, tuple]:
    """As a model's own `next`: logits of the token at `index`, after those before it in `prompt` int32[rows, width]."""
    seen = tf.broadcast_to(tf.range(tf.shape(prompt)[1]) < index, tf.shape(prompt))
    logits = model(model_inputs(model, prompt, tf.ensure_shape(seen, prompt.shape), source), training=False)
    return logits[:, index - 1], None, ()


def model_inputs(
    model: Any, ids: tf.Tensor, mask: tf.Tensor, context: tuple[tf.Tensor, tf.Tensor] | None = None
) -> dict[str, tf.Tensor] | list[tf.Tensor]:
    """What a keras-nlp language model is called with.

    Args:
        model: of text alone.
        ids: int32[rows, length].
        mask: bool of that shape: which of them count.
        context: for a `Seq2SeqLM` the same two of its encoder; the others are then its decoder's.
    """
    named = {"token_ids": ids * tf.cast(mask, ids.dtype), "padding_mask": mask}
    if context is not None:
        named = of_two_stacks(named, context)
    names = input_names(model)
    if "position_ids" in names:
        named["position_ids"] = tf.zeros_like(ids) + tf.range(tf.shape(ids)[1])
    return named if isinstance(model.input, dict) else [named[name] for name in names]


def input_names(model: Any) -> list[str]:
    """What a Keras model's inputs are called; nothing for what has none."""
    inputs = getattr(model, "input", None)
    return list(inputs) if isinstance(inputs, dict) else [tensor.name for tensor in inputs or ()]


def features(model: Any) -> Callable[..., dict[str, tf.Tensor]]:
    """What makes the inputs of `model.generate_step`.

    It takes ids int32[rows, length], lengths int32[rows] (at least 1), steps int32[] (how many new tokens there must be
    room for) and whether the length is fixed (then the room is in it).
    """
    names = [base.__name__ for base in type(model).__mro__]
    return _two_sequences if "RWKV7CausalLM" in names else _one_sequence


def of_two_stacks(inputs: dict[str, tf.Tensor], source: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
    """The inputs of a `Seq2SeqLM`: `inputs` are its decoder's, and `source` its encoder's."""
    ids, mask = source
    named = {f"decoder_{name}": value for name, value in inputs.items()}
    return {**named, "encoder_token_ids": ids, "encoder_padding_mask": mask}


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


class _State(NamedTuple):
    """What is known of the rows: reasons, counts int32[rows]; tails string[rows], as `stops` wants them.

    scores float32, [rows, max_new_tokens] or [rows, 0], of the answers; history int32, [rows, room] or [rows, 0]:
    prompts and answers.
    """

    reasons: tf.Tensor
    counts: tf.Tensor
    tails: tf.Tensor
    scores: tf.Tensor
    history: tf.Tensor


@dataclasses.dataclass
class _Loop:
    """In the place of a keras-nlp sampler: the loop over at most `most` new tokens, from `start` to `end`.

    tokens int32[rows, most]: the answers, taken out of what the model has stepped over.
    """

    start: _State
    read: tf.Tensor
    room: tf.Tensor
    most: tf.Tensor
    uniform: tf.Tensor | None
    controls: SamplingParams | None
    stop_ids: tuple[int, ...]
    stops: Any
    log_probs: bool
    pad_id: int
    end: _State | None = None
    tokens: tf.Tensor | None = None

    def __call__(self, next, prompt, cache=None, index=0, mask=None, **_):
        width = tf.shape(prompt)[1]
        # How far a row's prompt goes in what this model steps over, which need not be the prompt alone.
        behind = tf.reduce_sum(tf.cast(mask, tf.int32), axis=-1)
        first_cache = () if cache is None else cache

        def unfinished(index, prompt, cache, state):
            return (index < width) & tf.reduce_any(state.reasons == RUNNING)

        def advance(index, prompt, cache, state):
            logits, _, cache = next(prompt, cache, index)
            step = index - behind  # int32[rows], below 0 while a row's prompt is read
            tokens, state = self._record(tf.cast(logits, tf.float32), step, state)
            new = tf.where(step >= 0, tokens, tf.cast(prompt[:, index], tf.int32))
            prompt = tf.where(tf.range(width) == index, tf.cast(new, prompt.dtype)[:, tf.newaxis], prompt)
            return index + 1, prompt, tf.nest.map_structure(_shaped_as, cache, first_cache), state

        variables = (tf.cast(index, tf.int32), prompt, first_cache, self.start)
        _, prompt, _, self.end = tf.while_loop(unfinished, advance, variables)
        step = tf.range(self.most)
        places = tf.minimum(behind[:, tf.newaxis] + step, width - 1)
        found = tf.cast(tf.gather(prompt, places, batch_dims=1), tf.int32)
        self.tokens = tf.where(step < self.end.counts[:, tf.newaxis], found, self.pad_id)
        return prompt

    def _record(self, logits: tf.Tensor, step: tf.Tensor, state: _State) -> tuple[tf.Tensor, _State]:
        """The next tokens int32[rows] of the rows that are answering, and what is known of the rows with them."""
        answering = (step >= 0) & (state.reasons == RUNNING)
        place = tf.clip_by_value(step, 0, tf.maximum(self.most - 1, 0))
        tokens = self._next_tokens(logits, place, state.history)
        changed: dict[str, tf.Tensor] = {"counts": state.counts + tf.cast(answering, tf.int32)}
        if self.log_probs:
            changed["scores"] = _put(state.scores, place, sampling.log_probability(logits, tokens), answering)
        if self.controls is not None:
            changed["history"] = _put(state.history, self.read + place, tokens, answering)
        ended = is_one_of(tokens, self.stop_ids)
        if self.stops is not None:
            found, tails = self.stops.found(state.tails, tokens)
            changed["tails"] = tf.where(answering, tails, state.tails)
            ended |= found
        reason = tf.where(ended, STOP, tf.where(step + 1 >= self.room, LENGTH, RUNNING))
        changed["reasons"] = tf.where(answering, reason, state.reasons)
        return tf.where(answering, tokens, self.pad_id), state._replace(**changed)

    def _next_tokens(self, logits, place, history):
        if self.controls is None:
            return tf.argmax(logits, axis=-1, output_type=tf.int32)
        changed = sampling.apply_penalties(logits, history, self.read + place, self.controls)
        uniform = tf.gather(self.uniform, place, batch_dims=1)
        return sampling.sample_next(changed, uniform, self.controls)


def _put(table: tf.Tensor, place: tf.Tensor, values: tf.Tensor, where: tf.Tensor) -> tf.Tensor:
    """`table` [rows, room] with values [rows] in the columns place [rows] of the rows where bool[rows] says so."""
    here = (tf.range(tf.shape(table)[1]) == place[:, tf.newaxis]) & where[:, tf.newaxis]
    return tf.where(here, values[:, tf.newaxis], table)


def _shaped_as(new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
    """A model may lose sight of sizes that its cache keeps."""
    return tf.ensure_shape(new, old.shape)

"""The generation loop: prefill once, then one step for each new token, each row from its own end.

Two nested loops. The inner one only steps. The outer one runs when a quarter of the rows have finished, or when the
caches are full: it drops the finished rows (compaction) and widens the caches, so that neither finished rows nor
room for tokens that never come cost time.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import tensorflow as tf

from tfvllm.generation import sampling
from tfvllm.generation.cache import EncoderOutput, allocate, grow_caches, relaxed_shapes, to_context, to_parts
from tfvllm.generation.kernels import Portable
from tfvllm.generation.network import Network
from tfvllm.generation.sampling import SamplingParams

# Lengths are rounded up to a multiple of this: fewer distinct shapes, fewer kernels to prepare.
BUCKET = 16
# How many positions the caches grow by. Attention reads the whole cache, so too much room costs time at every step.
GROWTH = 64

# Why a row ended, as codes in the loop and as words outside.
RUNNING, LENGTH, STOP, EMPTY = 0, 1, 2, 3
FINISH_REASONS = ("running", "length", "stop", "empty")


@dataclasses.dataclass
class Result:
    """What was generated; the batch's rows in their first order.

    token_ids: int32[batch, max_new_tokens], right-padded with `pad_id`; an end token is included.
    lengths: int32[batch], how many of them count.
    reasons: int32[batch], an index into `FINISH_REASONS`.
    log_probs: float32[batch, max_new_tokens] of each token, 0 beyond `lengths`; None unless asked for.
    """

    token_ids: tf.Tensor
    lengths: tf.Tensor
    reasons: tf.Tensor
    log_probs: tf.Tensor | None


def generate(
    network: Network,
    ids: tf.Tensor,
    lengths: tf.Tensor,
    max_new_tokens: tf.Tensor,
    *,
    controls: SamplingParams | None = None,
    stop_ids: tuple[int, ...] = (),
    stops=None,
    max_length: int | None = None,
    limit: tf.Tensor | None = None,
    context: EncoderOutput | None = None,
    log_probs: bool = False,
    pad_id: int = 0,
) -> Result:
    """Generates up to `max_new_tokens` tokens for each prompt.

    Args:
        network: the model.
        ids: int32[batch, length] prompts, each row's tokens first.
        lengths: int32[batch]. A row of length 0 has nothing to go on: it gets no tokens and the reason "empty".
        max_new_tokens: int32[]; less than 1 gives none.
        controls: how to choose tokens; None is plain greedy and leaves all else out of the graph.
        stop_ids: tokens that end a row.
        stops: a `tfvllm.generation.stops.StopStrings`, or None.
        max_length: a row ends when prompt and new tokens together are this long; None: the model's limit alone.
        limit: int32[], the same, known only when it runs.
        context: what `Network.encode` returned. Prompts are then what the decoder starts from.
        log_probs: whether to return log-probabilities.
        pad_id: fills what is beyond a row's length.
    """
    loop = DecodeLoop(
        *(network, ids, lengths, max_new_tokens),
        controls=controls,
        stop_ids=stop_ids,
        stops=stops,
        max_length=max_length,
        limit=limit,
        log_probs=log_probs,
        pad_id=pad_id,
    )
    state = loop.run(context)
    return Result(
        token_ids=tf.transpose(state.tokens),
        lengths=state.counts,
        reasons=_settled(state),
        log_probs=tf.transpose(state.scores) if log_probs else None,
    )


class State(NamedTuple):
    """What is known of the rows. Finished ones leave the loop: [active] counts those that are still in it.

    rows: int32[active], which row of the batch each one is.
    lengths: int32[active], of the prompts.
    last: int32[active], the last token.
    reasons: int32[active].
    history: int32[active, room], prompt and answer where they are looked at; else [active, 0].
    tails: string[active], the ends of the answers as `stops` wants them.
    tokens: int32[max_new_tokens, batch].
    scores: float32[max_new_tokens, batch], log-probabilities where they are asked for; else [0, 0].
    counts: int32[batch], how many tokens a row has got.
    final: int32[batch], the reasons of those that have left.
    """

    rows: tf.Tensor
    lengths: tf.Tensor
    last: tf.Tensor
    reasons: tf.Tensor
    history: tf.Tensor
    tails: tf.Tensor
    tokens: tf.Tensor
    scores: tf.Tensor
    counts: tf.Tensor
    final: tf.Tensor


_OF_ACTIVE = ("rows", "lengths", "last", "reasons", "history", "tails")


class DecodeLoop:
    """The loops of one call of `generate`, which has the same arguments.

    Attributes:
        max_new_tokens: int32[], not less than 0.
        room: int32[batch], how many tokens each row may get.
        steps: int32[], the most of these.
        uniform: float32[batch, max_new_tokens], what is drawn for each token; None where nothing is.
    """

    def __init__(
        self,
        network: Network,
        ids: tf.Tensor,
        lengths: tf.Tensor,
        max_new_tokens: tf.Tensor,
        *,
        controls: SamplingParams | None,
        stop_ids: tuple[int, ...],
        stops: Any,
        max_length: int | None,
        limit: tf.Tensor | None,
        log_probs: bool,
        pad_id: int,
    ):
        self.network, self.ids, self.lengths = network, ids, lengths
        self.controls, self.stop_ids, self.stops = controls, stop_ids, stops
        self.log_probs, self.pad_id = log_probs, pad_id
        self.max_new_tokens = asked_for(max_new_tokens, controls)
        self.batch = tf.shape(ids)[0]
        self.room = room_for(lengths, self.max_new_tokens, least(max_length, network.max_positions), limit)
        self.steps = tf.reduce_max(tf.concat([self.room, [0]], 0))
        self.uniform: Any = None
        if controls is not None:
            self.uniform = sampling.uniforms(controls.seed, self.batch, self.max_new_tokens)

    def run(self, context: EncoderOutput | None) -> State:
        """The state after the last token."""
        ids, lengths = self.ids, self.lengths
        if context is None:
            ids, lengths = bucketed(ids, lengths, self.pad_id)
        hidden, keys, values = self.network.prefill(ids, lengths, context)
        start = self._start(ids, lengths)

        def first():
            tokens, scores = self._next_tokens(hidden, start, lengths, 0)
            return self._record(start, tokens, scores, 0)

        state = tf.cond(self.steps > 0, first, lambda: start)
        capacity = _round_up(tf.shape(ids)[1] + tf.minimum(tf.maximum(self.steps - 1, 0), GROWTH))
        caches = allocate(keys, values, capacity)

        def unfinished(step, capacity, state, caches, parts):
            return (step < self.steps) & tf.reduce_any(state.reasons == RUNNING)

        def renew_and_step(step, capacity, state, caches, parts):
            capacity, state, caches, parts = self._renew(step, capacity, state, caches, parts)
            step, state, caches = self._step_on(step, capacity, state, caches, to_context(parts))
            return step, capacity, state, caches, parts

        variables = (tf.constant(1), capacity, state, caches, to_parts(context))
        shapes = relaxed_shapes(variables)
        _, _, state, _, _ = tf.while_loop(unfinished, renew_and_step, variables, shape_invariants=shapes)
        return state

    def _start(self, ids: tf.Tensor, lengths: tf.Tensor) -> State:
        """The state before the first token; prompts as they are read."""
        history = tf.zeros([self.batch, 0], tf.int32)
        if self.controls is not None:
            history = tf.pad(ids, [[0, 0], [0, self.max_new_tokens]])
        reasons = first_reasons(self.lengths, self.room)
        return State(
            rows=tf.range(self.batch),
            lengths=lengths,
            last=tf.zeros([self.batch], tf.int32),
            reasons=reasons,
            history=history,
            tails=tf.fill([self.batch], ""),
            tokens=tf.fill([self.max_new_tokens, self.batch], self.pad_id),
            scores=tf.zeros([self.max_new_tokens, self.batch] if self.log_probs else [0, 0]),
            counts=tf.zeros([self.batch], tf.int32),
            final=reasons,
        )

    def _renew(self, step, capacity, state: State, caches: list[tf.Tensor], parts: list[tf.Tensor]):
        """Without the rows that have finished, and with wider caches where they are full."""
        running = state.reasons == RUNNING
        final = _settled(state)
        kept = tf.reshape(tf.cast(tf.where(running), tf.int32), [-1])
        full = _longest(state) + step > capacity
        wider = tf.where(full, _round_up(capacity + tf.minimum(self.steps - step, GROWTH)), capacity)

        def renewed():
            fields = {name: tf.gather(getattr(state, name), kept) for name in _OF_ACTIVE}
            fresh = grow_caches(caches, self.network.cache_shapes, capacity, wider, kept)
            return fields, fresh, [tf.gather(part, kept) for part in parts]

        def same():
            return {name: getattr(state, name) for name in _OF_ACTIVE}, list(caches), list(parts)

        crowded = tf.shape(kept)[0] < tf.shape(running)[0]
        fields, caches, parts = tf.cond(crowded | full, renewed, same)
        return wider, state._replace(final=final, **fields), caches, parts

    def _step_on(self, step, capacity, state: State, caches: list[tf.Tensor], context: EncoderOutput | None):
        """Steps until the caches are full, a quarter of the rows have finished, or nothing is left to do."""
        total = tf.shape(state.rows)[0]
        reach = _longest(state)

        def unhindered(step, state, caches):
            running = tf.reduce_sum(tf.cast(state.reasons == RUNNING, tf.int32))
            return (step < self.steps) & (running > 0) & (4 * running > 3 * total) & (reach + step <= capacity)

        def by(kernels):
            def advance(step, state, caches):
                position = state.lengths + step - 1  # where the last chosen token stands
                within = tf.minimum(position, capacity - 1)
                hidden, caches = self.network.step(state.last, within, list(caches), capacity, context, kernels=kernels)
                tokens, scores = self._next_tokens(hidden, state, position + 1, step, kernels)
                return step + 1, self._record(state, tokens, scores, step), caches

            dtype = self.network.loop_dtype(kernels)
            variables = (step, state, [tf.cast(cache, dtype) for cache in caches])
            shapes = relaxed_shapes(variables)
            ended, after, held = tf.while_loop(
                unhindered, advance, variables, shape_invariants=shapes, maximum_iterations=self.steps
            )
            return ended, after, [tf.cast(cache, self.network.dtype) for cache in held]

        return self.network.by_rows(total, by)

    def _next_tokens(self, hidden, state: State, position, step, kernels: Portable | None = None):
        """Tokens [active], their log-probabilities; position int32[active] is where the token will stand."""
        logits = self.network.logits(hidden, kernels)
        if self.controls is None:
            tokens = tf.argmax(logits, axis=-1, output_type=tf.int32)
        else:
            changed = sampling.apply_penalties(logits, state.history, position, self.controls)
            tokens = sampling.sample_next(changed, tf.gather(self.uniform[:, step], state.rows), self.controls)
        if self.log_probs:
            return tokens, sampling.log_probability(logits, tokens)
        return tokens, tf.zeros([tf.shape(state.rows)[0], 0])

    def _record(self, state: State, tokens: tf.Tensor, scores: tf.Tensor, step) -> State:
        """With the tokens of this step, and who has finished by them."""
        rows, running = state.rows, state.reasons == RUNNING
        place = tf.stack([tf.fill(tf.shape(rows), step), rows], axis=1)
        changed: dict[str, tf.Tensor] = {"last": tokens}
        kept = tf.where(running, tokens, self.pad_id)
        changed["tokens"] = tf.tensor_scatter_nd_update(state.tokens, place, kept)
        if self.log_probs:
            kept = tf.where(running, scores, tf.zeros_like(scores))
            changed["scores"] = tf.tensor_scatter_nd_update(state.scores, place, kept)
        added = tf.cast(running, tf.int32)
        changed["counts"] = tf.tensor_scatter_nd_add(state.counts, rows[:, tf.newaxis], added)
        ended = is_one_of(tokens, self.stop_ids)
        if self.stops is not None:
            found, changed["tails"] = self.stops.found(state.tails, tokens)
            ended |= found
        full = step + 1 >= tf.gather(self.room, rows)
        new = tf.where(ended, STOP, tf.where(full, LENGTH, RUNNING))
        changed["reasons"] = tf.where(running, new, state.reasons)
        if self.controls is not None:
            place = tf.stack([tf.range(tf.shape(rows)[0]), state.lengths + step], axis=1)
            changed["history"] = tf.tensor_scatter_nd_update(state.history, place, tokens)
        return state._replace(**changed)


def least(*limits: int | None) -> int | None:
    """The smallest of several limits; None where there is none."""
    return min((limit for limit in limits if limit is not None), default=None)


def asked_for(max_new_tokens: tf.Tensor, controls: SamplingParams | None) -> tf.Tensor:
    """int32[]: not less than 0, and only once the controls make sense."""
    with tf.control_dependencies([] if controls is None else sampling.valid(controls)):
        return tf.maximum(max_new_tokens, 0)


def room_for(lengths: tf.Tensor, max_new_tokens: tf.Tensor, *limits: tf.Tensor | int | None) -> tf.Tensor:
    """int32[batch]: how many tokens each prompt may get within all `limits`; one without tokens gets none."""
    room = tf.fill(tf.shape(lengths), max_new_tokens)
    for limit in limits:
        if limit is not None:
            room = tf.clip_by_value(limit - lengths, 0, room)
    return tf.where(lengths > 0, room, 0)


def first_reasons(lengths: tf.Tensor, room: tf.Tensor) -> tf.Tensor:
    """int32[batch]: why rows have ended before the first token, or that they are running."""
    return tf.where(lengths > 0, tf.where(room > 0, RUNNING, LENGTH), EMPTY)


def is_one_of(tokens: tf.Tensor, stop_ids: tuple[int, ...]) -> tf.Tensor:
    """bool, of the shape of `tokens`."""
    found = tf.zeros_like(tokens, tf.bool)
    for stop in stop_ids:
        found |= tokens == stop
    return found


def bucketed(ids: tf.Tensor, lengths: tf.Tensor, pad_id: int = 0) -> tuple[tf.Tensor, tf.Tensor]:
    """Cuts or pads ids [batch, length] to the longest row's length, rounded up to `BUCKET`; lengths are at least 1."""
    lengths = tf.maximum(lengths, 1)
    longest = tf.reduce_max(tf.concat([lengths, [1]], 0))
    wanted = _round_up(longest)
    ids = ids[:, :longest]
    return tf.pad(ids, [[0, 0], [0, wanted - tf.shape(ids)[1]]], constant_values=pad_id), lengths


def marked(ids: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    """ids [batch, length] with -1 where a row has ended."""
    return tf.where(tf.sequence_mask(lengths, tf.shape(ids)[1]), ids, -1)


def left_aligned(ids: tf.Tensor, padding_mask: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Moves each row's tokens to its front, wherever the padding was. -> (ids, same shape; lengths int32[batch])."""
    real = tf.cast(padding_mask, tf.bool)
    order = tf.argsort(tf.cast(tf.logical_not(real), tf.int32), axis=-1, stable=True)
    return tf.gather(ids, order, batch_dims=1), tf.reduce_sum(tf.cast(real, tf.int32), axis=-1)


def last_tokens(ids: tf.Tensor, lengths: tf.Tensor, most: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Keeps the last `most` tokens of rows that are longer."""
    kept = tf.minimum(lengths, most)
    places = tf.minimum((lengths - kept)[:, tf.newaxis] + tf.range(tf.shape(ids)[1]), tf.shape(ids)[1] - 1)
    return tf.gather(ids, tf.maximum(places, 0), batch_dims=1), kept


def _round_up(length: tf.Tensor) -> tf.Tensor:
    return (length + BUCKET - 1) // BUCKET * BUCKET


def _longest(state: State) -> tf.Tensor:
    """Of the prompts still in the loop."""
    return tf.reduce_max(tf.concat([state.lengths, [0]], 0))


def _settled(state: State) -> tf.Tensor:
    """The batch's reasons with those of the rows still in the loop written in."""
    return tf.tensor_scatter_nd_update(state.final, state.rows[:, tf.newaxis], state.reasons)

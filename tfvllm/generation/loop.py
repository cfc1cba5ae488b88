"""The generation loop: prefill once, then one step for each new token, each row from its own end.

Two nested loops. The inner one only steps. The outer one runs when a quarter of the rows have finished, or when the
caches are full: it drops the finished rows (compaction) and widens the caches, so that neither finished rows nor
room for tokens that never come cost time.
"""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from tfvllm.generation import sampling
from tfvllm.generation.cache import EncoderOutput, allocate, grow_caches, relaxed_shapes, to_context, to_parts
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
        context: what `Network.encode` returned. Prompts are then what the decoder starts from: all of one length.
        log_probs: whether to return log-probabilities.
        pad_id: fills what is beyond a row's length.
    """
    with tf.control_dependencies([] if controls is None else sampling.valid(controls)):
        max_new_tokens = tf.maximum(max_new_tokens, 0)
    batch = tf.shape(ids)[0]
    limits = [limit for limit in (max_length, network.max_positions) if limit is not None]
    room = tf.fill([batch], max_new_tokens)
    if limits:
        room = tf.clip_by_value(min(limits) - lengths, 0, max_new_tokens)
    room = tf.where(lengths > 0, room, 0)
    steps = tf.reduce_max(tf.concat([room, [0]], 0))
    penalised = controls is not None
    uniform = sampling.uniforms(controls.seed, batch, max_new_tokens) if controls is not None else tf.zeros([batch, 0])

    ids, lengths_read = bucketed(ids, lengths, pad_id) if context is None else (ids, lengths)
    hidden, keys, values = network.prefill(ids, lengths_read, context)
    prompt = tf.shape(ids)[1]
    history = tf.zeros([batch, 0], tf.int32)
    if penalised:
        history = tf.pad(ids, [[0, 0], [0, max_new_tokens]])

    def next_tokens(hidden, rows, history, position, step):
        """Tokens [rows], their log-probabilities; position int32[rows] is where the token will stand."""
        logits = network.logits(hidden)
        if controls is None:
            tokens = tf.argmax(logits, axis=-1, output_type=tf.int32)
        else:
            changed = sampling.apply_penalties(logits, history, position, controls)
            tokens = sampling.sample_next(changed, tf.gather(uniform[:, step], rows), controls)
        return tokens, sampling.log_probability(logits, tokens) if log_probs else tf.zeros([tf.shape(rows)[0], 0])

    def record(state, tokens, scores, step):
        """Writes the tokens of this step and finds out who has finished."""
        rows = state["rows"]
        place = tf.stack([tf.fill(tf.shape(rows), step), rows], axis=1)
        running = state["reasons"] == RUNNING
        kept = tf.where(running, tokens, pad_id)
        state["tokens"] = tf.tensor_scatter_nd_update(state["tokens"], place, kept)
        if log_probs:
            state["scores"] = tf.tensor_scatter_nd_update(
                state["scores"], place, tf.where(running, scores, tf.zeros_like(scores))
            )
        state["counts"] = tf.tensor_scatter_nd_add(state["counts"], rows[:, tf.newaxis], tf.cast(running, tf.int32))
        reasons = state["reasons"]
        ended = tf.zeros_like(running)
        for stop in stop_ids:
            ended |= tokens == stop
        if stops is not None:
            found, state["tails"] = stops.found(state["tails"], tokens)
            ended |= found
        full = step + 1 >= tf.gather(room, rows)
        new = tf.where(ended, STOP, tf.where(full, LENGTH, RUNNING))
        state["reasons"] = tf.where(running, new, reasons)
        if penalised:
            place = tf.stack([tf.range(tf.shape(rows)[0]), state["lengths"] + step], axis=1)
            state["history"] = tf.tensor_scatter_nd_update(state["history"], place, tokens)
        state["last"] = tokens
        return state

    rows = tf.range(batch)
    start_reasons = tf.where(lengths > 0, tf.where(room > 0, RUNNING, LENGTH), EMPTY)
    state = {
        "rows": rows,  # int32[active]: which row of the batch each one is
        "lengths": lengths_read,  # int32[active]: of the prompts
        "last": tf.zeros([batch], tf.int32),
        "reasons": start_reasons,  # int32[active]
        "history": history,
        "tails": tf.fill([batch], ""),
        "tokens": tf.fill([max_new_tokens, batch], pad_id),
        "counts": tf.zeros([batch], tf.int32),
        "scores": tf.zeros([max_new_tokens, batch] if log_probs else [0, 0]),
        "final": start_reasons,  # int32[batch]
    }

    def first(state):
        tokens, scores = next_tokens(hidden, rows, history, lengths_read, 0)
        return record(dict(state), tokens, scores, 0)

    state = tf.cond(steps > 0, lambda: first(state), lambda: dict(state))

    cache_shapes = network.cache_shapes
    capacity = _round_up(prompt + tf.minimum(tf.maximum(steps - 1, 0), GROWTH))
    caches = allocate(keys, values, capacity)
    per_row = ("rows", "lengths", "last", "reasons", "history", "tails")

    def longest(state):
        return tf.reduce_max(tf.concat([state["lengths"], [0]], 0))

    def run(step, capacity, state, caches, context):
        """Steps until the caches are full, a quarter of the rows have finished, or nothing is left to do."""
        total = tf.shape(state["rows"])[0]
        reach = longest(state)

        def unhindered(step, state, caches):
            running = tf.reduce_sum(tf.cast(state["reasons"] == RUNNING, tf.int32))
            return (step < steps) & (running > 0) & (4 * running > 3 * total) & (reach + step <= capacity)

        def advance(step, state, caches):
            position = state["lengths"] + step - 1  # where the last chosen token stands
            hidden, caches = network.step(
                state["last"], tf.minimum(position, capacity - 1), list(caches), capacity, context
            )
            tokens, scores = next_tokens(hidden, state["rows"], state["history"], position + 1, step)
            return step + 1, record(dict(state), tokens, scores, step), caches

        def stepping():
            held = [tf.cast(cache, network.loop_dtype) for cache in caches]
            variables = (step, state, held)
            ended, after, held = tf.while_loop(
                unhindered, advance, variables, shape_invariants=relaxed_shapes(variables), maximum_iterations=steps
            )
            return ended, after, [tf.cast(cache, network.dtype) for cache in held]

        return network.by_rows(total, stepping)

    def unfinished(step, capacity, state, caches, parts):
        return (step < steps) & tf.reduce_any(state["reasons"] == RUNNING)

    def renew_and_run(step, capacity, state, caches, parts):
        state = dict(state)
        running = state["reasons"] == RUNNING
        state["final"] = _settle(state)
        kept = tf.reshape(tf.cast(tf.where(running), tf.int32), [-1])
        full = longest(state) + step > capacity
        wider = tf.where(full, _round_up(capacity + tf.minimum(steps - step, GROWTH)), capacity)

        def renewed():
            fields = {name: tf.gather(state[name], kept) for name in per_row}
            fresh = grow_caches(caches, cache_shapes, capacity, wider, kept)
            return fields, fresh, [tf.gather(part, kept) for part in parts]

        def same():
            return {name: state[name] for name in per_row}, list(caches), list(parts)

        crowded = tf.shape(kept)[0] < tf.shape(running)[0]
        fields, caches, parts = tf.cond(crowded | full, renewed, same)
        state.update(fields)
        step, state, caches = run(step, wider, state, caches, to_context(parts))
        return step, wider, state, caches, parts

    variables = (tf.constant(1), capacity, state, caches, to_parts(context))
    _, _, state, _, _ = tf.while_loop(unfinished, renew_and_run, variables, shape_invariants=relaxed_shapes(variables))
    return Result(
        token_ids=tf.transpose(state["tokens"]),
        lengths=state["counts"],
        reasons=_settle(state),
        log_probs=tf.transpose(state["scores"]) if log_probs else None,
    )


def bucketed(ids: tf.Tensor, lengths: tf.Tensor, pad_id: int = 0) -> tuple[tf.Tensor, tf.Tensor]:
    """Cuts or pads ids [batch, length] to the longest row's length, rounded up to `BUCKET`; lengths are at least 1."""
    lengths = tf.maximum(lengths, 1)
    longest = tf.reduce_max(tf.concat([lengths, [1]], 0))
    wanted = _round_up(longest)
    ids = ids[:, :longest]
    return tf.pad(ids, [[0, 0], [0, wanted - tf.shape(ids)[1]]], constant_values=pad_id), lengths


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


def _settle(state: dict) -> tf.Tensor:
    """The batch's reasons with those of the rows still in the loop written in."""
    return tf.tensor_scatter_nd_update(state["final"], state["rows"][:, tf.newaxis], state["reasons"])

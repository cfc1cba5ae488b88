"""Beam search: the `beams` most probable unfinished answers of each row, and beside them the best finished ones."""

from __future__ import annotations

import tensorflow as tf

from tfvllm.generation.loop import BUCKET, EMPTY, LENGTH, STOP, Result, bucketed
from tfvllm.generation.network import Context, Network, allocate, regrow

_IMPOSSIBLE = -1e9


def beam_search(
    network: Network,
    ids: tf.Tensor,
    lengths: tf.Tensor,
    max_new_tokens: tf.Tensor,
    *,
    beams: int,
    length_penalty=0.0,
    stop_ids: tuple[int, ...] = (),
    max_length: int | None = None,
    context: Context | None = None,
    pad_id: int = 0,
) -> tuple[Result, tf.Tensor]:
    """The best answer of each row, and its score float32[batch].

    An answer's score is its log-probability divided by (number of new tokens, end token included) ** `length_penalty`:
    0 prefers short answers, 1 compares means (the penalty of Wu et al. 2016, section 7, in its plain form). Each
    step keeps the `beams` best unfinished answers; an answer that ends leaves its place to the next best and joins
    the `beams` best finished ones. Search ends when no unfinished answer can still win, or at `max_new_tokens`,
    where the unfinished join in.

    Without `stop_ids` and with `length_penalty` 0 this is keras-nlp's `BeamSampler`.

    Args: as `tfvllm.generation.loop.generate`; beams: a Python number; length_penalty: float32[], at least 0.
    """
    penalty = tf.convert_to_tensor(length_penalty, tf.float32)
    limits = [limit for limit in (max_length, network.max_positions) if limit is not None]
    batch = tf.shape(ids)[0]
    width = tf.maximum(max_new_tokens, 0)
    steps = width
    empty = lengths < 1
    if limits:
        # All rows of a search run for the same number of steps: what the longest prompt leaves.
        longest = tf.reduce_max(tf.concat([lengths, [0]], 0))
        steps = tf.clip_by_value(min(limits) - longest, 0, steps)
    steps = tf.where(batch > 0, steps, 0)
    ids, lengths = bucketed(ids, lengths, pad_id)
    hidden, keys, values = network.prefill(ids, lengths, context)
    capacity = (tf.shape(ids)[1] + steps + BUCKET - 1) // BUCKET * BUCKET
    caches = allocate(
        [tf.repeat(key, beams, 0) for key in keys], [tf.repeat(value, beams, 0) for value in values], capacity
    )
    shapes = network.cache_shapes
    positions = tf.repeat(lengths, beams)
    first_rows = tf.range(batch)[:, tf.newaxis] * beams
    vocabulary = network.vocabulary_size

    def scored(log_probs, length):
        return log_probs / tf.pow(tf.cast(length, tf.float32), penalty)

    def advance(step, logits, live, live_scores, done, done_scores, done_lengths, done_ended):
        """Chooses the next token of every beam. live int32[batch, beams, steps]; -> (parents, tokens, the rest)."""
        log_probs = tf.reshape(tf.nn.log_softmax(logits), [batch, beams, vocabulary]) + live_scores[..., tf.newaxis]
        count = min(2 * beams, beams * vocabulary)
        scores, flat = tf.math.top_k(tf.reshape(log_probs, [batch, beams * vocabulary]), count)
        parents, tokens = flat // vocabulary, flat % vocabulary
        ended = tf.zeros_like(tokens, tf.bool)
        for stop in stop_ids:
            ended |= tokens == stop
        grown = tf.gather(live, parents, batch_dims=1)
        place = tf.range(tf.shape(live)[2]) == step
        grown = tf.where(place, tokens[..., tf.newaxis], grown)

        # The best that go on.
        on_scores, on = tf.math.top_k(tf.where(ended, _IMPOSSIBLE * 2, scores), beams)
        live = tf.gather(grown, on, batch_dims=1)
        next_parents = tf.gather(parents, on, batch_dims=1)
        next_tokens = tf.gather(tokens, on, batch_dims=1)

        # The best that have ended; at the last step those that go on end as well.
        last = step + 1 >= steps
        joins = (ended | last) & (scores > _IMPOSSIBLE / 2)
        new_scores = tf.where(joins, scored(scores, step + 1), _IMPOSSIBLE)
        pool = tf.concat([done_scores, new_scores], axis=1)
        done_scores, kept = tf.math.top_k(pool, beams)
        done = tf.gather(tf.concat([done, grown], axis=1), kept, batch_dims=1)
        lengths_pool = tf.concat([done_lengths, tf.fill(tf.shape(tokens), step + 1)], axis=1)
        ended_pool = tf.concat([done_ended, ended], axis=1)
        done_lengths = tf.gather(lengths_pool, kept, batch_dims=1)
        done_ended = tf.gather(ended_pool, kept, batch_dims=1)
        return next_parents, next_tokens, live, on_scores, done, done_scores, done_lengths, done_ended

    def unfinished(step, tokens, live, live_scores, done, done_scores, *_):
        # Scores only fall, and the most an unfinished answer can gain from the penalty is that of the greatest length.
        attainable = scored(tf.reduce_max(live_scores, axis=1), steps)
        settled = tf.reduce_min(done_scores, axis=1) >= attainable
        return (step < steps) & tf.logical_not(tf.reduce_all(settled))

    def body(step, tokens, live, live_scores, done, done_scores, done_lengths, done_ended, *caches):
        hidden, caches = network.step(
            tf.reshape(tokens, [-1]), positions + step - 1, list(caches), capacity, context, beams=beams
        )
        parents, tokens, *rest = advance(
            step, network.logits(hidden), live, live_scores, done, done_scores, done_lengths, done_ended
        )
        rows = tf.reshape(first_rows + parents, [-1])
        caches = [regrow(cache, shapes[i // 2], capacity, capacity, rows) for i, cache in enumerate(caches)]
        return (step + 1, tokens, *rest, *caches)

    one_beam = tf.constant([[0.0] + [_IMPOSSIBLE] * (beams - 1)])
    nothing = tf.fill([batch, beams, width], pad_id)
    pool = tf.fill([batch, beams], _IMPOSSIBLE)
    start: tuple = (nothing, tf.tile(one_beam, [batch, 1]), nothing, pool, tf.zeros([batch, beams], tf.int32))
    start = (*start, tf.zeros([batch, beams], tf.bool))
    logits = tf.repeat(network.logits(hidden), beams, axis=0)

    def first():
        return advance(0, logits, *start)[1:]

    def none():
        return (tf.zeros([batch, beams], tf.int32), *start)

    tokens, *rest = tf.cond(steps > 0, first, none)
    variables = (tf.constant(1), tokens, *rest, *caches)
    loose = [tf.TensorShape([None] * value.shape.rank) for value in variables[: -len(caches)]]
    loose += [tf.TensorShape([None, cache.shape[-1]]) for cache in caches]
    result = tf.while_loop(unfinished, body, variables, shape_invariants=tuple(loose))
    done, done_scores, done_lengths, done_ended = result[4:8]
    counts = tf.where(empty, 0, done_lengths[:, 0])
    best = tf.where(tf.sequence_mask(counts, width), done[:, 0], pad_id)
    reasons = tf.where(empty, EMPTY, tf.where(done_ended[:, 0], STOP, LENGTH))
    return Result(best, counts, reasons, None), done_scores[:, 0]

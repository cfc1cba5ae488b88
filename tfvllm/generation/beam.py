"""Beam search: the `beams` most probable unfinished answers of each row, and beside them the best finished ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tfvllm.generation.cache import EncoderOutput, allocate, grow_caches, relaxed_shapes, to_context, to_parts
from tfvllm.generation.loop import BUCKET, EMPTY, LENGTH, STOP, Result, bucketed, is_one_of, least, room_for
from tfvllm.generation.network import Network

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
    context: EncoderOutput | None = None,
    pad_id: int = 0,
) -> tuple[Result, tf.Tensor]:
    """The best answer of each row, and its score float32[batch].

    An answer's score is its log-probability divided by (number of new tokens, end token included) ** `length_penalty`:
    0 prefers short answers, 1 compares means (the penalty of Wu et al. 2016, section 7, in its plain form). Each
    step keeps the `beams` best unfinished answers; an answer that ends leaves its place to the next best and joins
    the `beams` best finished ones. A row's search ends when none of its unfinished answers can still win, or at
    its last token, where the unfinished join in; a row whose search has ended costs nothing any more.

    Without `stop_ids` and with `length_penalty` 0 this is keras-nlp's `BeamSampler`.

    Args: as `tfvllm.generation.loop.generate`; beams: a Python number; length_penalty: float32[], at least 0.
    """
    search = BeamSearch(
        *(network, ids, lengths, max_new_tokens),
        beams=beams,
        length_penalty=length_penalty,
        stop_ids=stop_ids,
        max_length=max_length,
        pad_id=pad_id,
    )
    done, done_scores, done_lengths, done_ended = search.run(context)
    empty = lengths < 1
    counts = tf.where(empty, 0, done_lengths)
    best = tf.where(tf.sequence_mask(counts, search.width), done, pad_id)[:, : search.steps_asked]
    reasons = tf.where(empty, EMPTY, tf.where(done_ended, STOP, LENGTH))
    return Result(best, counts, reasons, None), done_scores


class Beams(NamedTuple):
    """The answers that a row's search holds, best first.

    live: int32[rows, beams, width], the unfinished ones; live_scores: float32[rows, beams], their log-probabilities.
    done: int32[rows, beams, width], the finished ones; done_scores: float32[rows, beams], with the penalty.
    done_lengths: int32[rows, beams]; done_ended: bool[rows, beams], whether by an end token.
    """

    live: tf.Tensor
    live_scores: tf.Tensor
    done: tf.Tensor
    done_scores: tf.Tensor
    done_lengths: tf.Tensor
    done_ended: tf.Tensor

    def finished(self) -> tuple[tf.Tensor, ...]:
        return self[2:]


class BeamSearch:
    """One call of `beam_search`, which has the same arguments.

    Attributes:
        steps_asked: int32[], `max_new_tokens`, not less than 0.
        room: int32[batch], how many tokens each answer may get.
        steps: int32[], the most of these.
        width: int32[], how many tokens an answer has room for.
    """

    def __init__(
        self,
        network: Network,
        ids: tf.Tensor,
        lengths: tf.Tensor,
        max_new_tokens: tf.Tensor,
        *,
        beams: int,
        length_penalty: Any,
        stop_ids: tuple[int, ...],
        max_length: int | None,
        pad_id: int,
    ):
        self.network, self.ids, self.lengths = network, ids, lengths
        self.beams, self.stop_ids, self.pad_id = beams, stop_ids, pad_id
        self.penalty = tf.convert_to_tensor(length_penalty, tf.float32)
        limit = least(max_length, network.max_positions)
        self.batch = tf.shape(ids)[0]
        self.steps_asked = tf.maximum(max_new_tokens, 0)
        self.width = tf.maximum(self.steps_asked, 1)  # scattering into tensors without elements is an error
        self.room = room_for(lengths, self.steps_asked, limit)
        self.steps = tf.reduce_max(tf.concat([self.room, [0]], 0))

    def run(self, context: EncoderOutput | None) -> list[tf.Tensor]:
        """The best finished answer of each row: `Beams.finished` without the axis of beams."""
        network, beams, ids, lengths = self.network, self.beams, self.ids, self.lengths
        if context is None:
            ids, lengths = bucketed(ids, lengths, self.pad_id)
        hidden, keys, values = network.prefill(ids, lengths, context)
        capacity = (tf.shape(ids)[1] + self.steps + BUCKET - 1) // BUCKET * BUCKET
        caches = allocate(
            [tf.repeat(key, beams, 0) for key in keys], [tf.repeat(value, beams, 0) for value in values], capacity
        )

        def body(step, rows, final, tokens, state, parts, caches):
            positions = tf.repeat(tf.gather(lengths, rows), beams)
            hidden, caches = network.step(
                tf.reshape(tokens, [-1]), positions + step - 1, list(caches), capacity, to_context(parts), beams=beams
            )
            parents, tokens, state = self._advance(step, rows, network.logits(hidden), state)
            places = tf.range(tf.shape(rows)[0])[:, tf.newaxis] * beams + parents
            rows, final, tokens, state, parts, kept = self._drop_settled(step + 1, rows, final, tokens, state, parts)
            # Beams change their parents at every step, so the rows that leave cost no further copy.
            places = tf.reshape(tf.gather(places, kept), [-1])
            caches = grow_caches(caches, network.cache_shapes, capacity, capacity, places)
            return step + 1, rows, final, tokens, state, parts, caches

        start = self._start()
        logits = tf.repeat(network.logits(hidden), beams, axis=0)
        rows = tf.range(self.batch)
        tokens, state = tf.cond(
            self.steps > 0,
            lambda: self._advance(0, rows, logits, start)[1:],
            lambda: (tf.zeros([self.batch, beams], tf.int32), start),
        )
        final = [value[:, 0] for value in start.finished()]
        rows, final, tokens, state, parts, kept = self._drop_settled(1, rows, final, tokens, state, to_parts(context))
        places = tf.reshape(kept[:, tf.newaxis] * beams + tf.range(beams), [-1])
        caches = grow_caches(caches, network.cache_shapes, capacity, capacity, places)
        variables = (tf.constant(1), rows, final, tokens, state, parts, caches)
        _, _, final, *_ = tf.while_loop(
            lambda step, rows, *_: tf.shape(rows)[0] > 0, body, variables, shape_invariants=relaxed_shapes(variables)
        )
        return final

    def _start(self) -> Beams:
        one_beam = tf.constant([[0.0] + [_IMPOSSIBLE] * (self.beams - 1)])
        nothing = tf.fill([self.batch, self.beams, self.width], self.pad_id)
        return Beams(
            live=nothing,
            live_scores=tf.tile(one_beam, [self.batch, 1]),
            done=nothing,
            done_scores=tf.fill([self.batch, self.beams], _IMPOSSIBLE),
            done_lengths=tf.zeros([self.batch, self.beams], tf.int32),
            done_ended=tf.zeros([self.batch, self.beams], tf.bool),
        )

    def _scored(self, log_probs, length):
        return log_probs / tf.pow(tf.cast(length, tf.float32), self.penalty)

    def _advance(self, step, chosen, logits: tf.Tensor, state: Beams) -> tuple[tf.Tensor, tf.Tensor, Beams]:
        """The next token of every beam: parents and tokens int32[rows, beams], and the answers with them.

        chosen: int32[rows], which rows of the batch they are.
        """
        beams, vocabulary = self.beams, self.network.vocabulary_size
        rows = tf.shape(state.live)[0]
        log_probs = tf.reshape(tf.nn.log_softmax(logits), [rows, beams, vocabulary])
        log_probs += state.live_scores[..., tf.newaxis]
        count = min(2 * beams, beams * vocabulary)
        scores, flat = tf.math.top_k(tf.reshape(log_probs, [rows, beams * vocabulary]), count)
        parents, tokens = flat // vocabulary, flat % vocabulary
        ended = is_one_of(tokens, self.stop_ids)
        grown = tf.gather(state.live, parents, batch_dims=1)
        place = tf.range(tf.shape(state.live)[2]) == step
        grown = tf.where(place, tokens[..., tf.newaxis], grown)

        # The best that go on.
        on_scores, on = tf.math.top_k(tf.where(ended, _IMPOSSIBLE * 2, scores), beams)
        live = tf.gather(grown, on, batch_dims=1)
        next_parents = tf.gather(parents, on, batch_dims=1)
        next_tokens = tf.gather(tokens, on, batch_dims=1)

        # The best that have ended; at the last step those that go on end as well.
        left = tf.gather(self.room, chosen)[:, tf.newaxis] - step
        joins = (ended | (left <= 1)) & (left > 0) & (scores > _IMPOSSIBLE / 2)
        new_scores = tf.where(joins, self._scored(scores, step + 1), _IMPOSSIBLE)
        pool = tf.concat([state.done_scores, new_scores], axis=1)
        done_scores, kept = tf.math.top_k(pool, beams)
        done = tf.gather(tf.concat([state.done, grown], axis=1), kept, batch_dims=1)
        lengths_pool = tf.concat([state.done_lengths, tf.fill(tf.shape(tokens), step + 1)], axis=1)
        ended_pool = tf.concat([state.done_ended, ended], axis=1)
        done_lengths = tf.gather(lengths_pool, kept, batch_dims=1)
        done_ended = tf.gather(ended_pool, kept, batch_dims=1)
        return next_parents, next_tokens, Beams(live, on_scores, done, done_scores, done_lengths, done_ended)

    def _drop_settled(self, step, rows, final, tokens, state: Beams, parts):
        """Writes down each row's best answer and leaves out the rows whose answer nothing can change any more.

        -> (rows, final, tokens, state, parts, kept int32[rows left]). final: [batch, ..], the rest: [rows, ..].
        """
        found = [value[:, 0] for value in state.finished()]
        final = [tf.tensor_scatter_nd_update(a, rows[:, tf.newaxis], b) for a, b in zip(final, found)]
        # Scores only fall, and the most an unfinished answer can gain from the penalty is that of the greatest length.
        room = tf.gather(self.room, rows)
        attainable = self._scored(tf.reduce_max(state.live_scores, axis=1), room)
        going_on = (tf.reduce_min(state.done_scores, axis=1) < attainable) & (step < room)
        kept = tf.reshape(tf.cast(tf.where(going_on), tf.int32), [-1])
        # What is attended to is copied only where a row leaves; the rest is small.
        parts = tf.cond(tf.reduce_all(going_on), lambda: parts, lambda: [tf.gather(part, kept) for part in parts])
        rows, tokens = tf.gather(rows, kept), tf.gather(tokens, kept)
        return rows, final, tokens, Beams(*(tf.gather(value, kept) for value in state)), parts, kept

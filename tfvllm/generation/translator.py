"""A sequence-to-sequence model as the functions that its SavedModel serves: generate, beam, score."""

from __future__ import annotations

import tensorflow as tf

from tfvllm.generation import loop, ragged
from tfvllm.generation.beam import beam_search
from tfvllm.generation.generator import Generator
from tfvllm.generation.text import valid_utf8


class Translator(Generator):
    """A `Generator` that reads sources with an encoder.

    Args: those of `Generator`, where `start_ids` is what the decoder starts from, and
        max_source_length: the most tokens of a source; the rest is cut off.
        source_start_ids, source_end_ids: tokens put around a source that comes as text.
    """

    def __init__(self, spec, *, max_source_length=None, source_start_ids=(), source_end_ids=(), **options):
        super().__init__(spec, **options)
        table = spec.encoder.position_table
        limits = (max_source_length, None if table is None else table.shape[0])
        self._hold_sources(limits, source_start_ids, source_end_ids)

    def _hold_sources(self, limits, start_ids, end_ids) -> None:
        self.max_source_length = loop.least(*limits)
        self.source_start_ids = tuple(start_ids)
        self.source_end_ids = tuple(end_ids)

    @property
    def room(self) -> int:
        """The most new tokens of an answer."""
        limit = self.max_length
        return 0 if limit is None else max(limit - len(self.start_ids), 0)

    # Sources and targets ---------------------------------------------------------------------------------------------

    def read_sources(self, texts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """string[batch] -> ids int32[batch, length], padding mask bool[batch, length]."""
        ids, lengths = self._read(texts, self.source_start_ids, self.source_end_ids, self.max_source_length)
        return ids, tf.sequence_mask(lengths, tf.shape(ids)[1])

    def read_source_ids(self, token_ids: tf.Tensor, padding_mask: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        ids, lengths = loop.left_aligned(token_ids, tf.not_equal(padding_mask, 0))
        if self.max_source_length is not None:
            ids, lengths = ids[:, : self.max_source_length], tf.minimum(lengths, self.max_source_length)
        return ids, tf.sequence_mask(lengths, tf.shape(ids)[1])

    def read_targets(self, texts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """string[batch] -> ids with start and end tokens, and lengths."""
        return self._read(texts, self.start_ids, self.stop_ids[:1], self.max_length)

    def _read(self, texts: tf.Tensor, start, end, limit: int | None) -> tuple[tf.Tensor, tf.Tensor]:
        """ids int32[batch, length] and lengths int32[batch]; a text beyond the limit loses its end."""
        most = None if limit is None else max(limit - len(start) - len(end), 0)
        return ragged.padded(self.codec.encode(texts), self.pad_id, before=start, after=end, most=most)

    def read_target_ids(self, token_ids: tf.Tensor, padding_mask: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return loop.left_aligned(token_ids, tf.not_equal(padding_mask, 0))

    def to_texts(self, result: loop.Result) -> tf.Tensor:
        return valid_utf8(self.codec.decode(loop.marked(result.token_ids, result.lengths)))

    # What is served --------------------------------------------------------------------------------------------------

    def generate(  # type: ignore[override]  # of a source, not of a prompt
        self, ids, padding_mask, max_new_tokens, controls=None, log_probs=False, start=None, limit=None
    ):
        """Greedy or sampled answers to sources ids int32[batch, length], padding_mask bool of that shape.

        start: what the decoder of each row starts from, ids int32[batch, length] and lengths int32[batch]; default
        `start_ids`. limit: int32[], a row ends when start and new tokens together are this long.
        """
        start, lengths = self._start(ids) if start is None else start
        return self._decoded(
            *(start, lengths, max_new_tokens),
            controls=controls,
            stop_ids=self.stop_ids,
            max_length=self.max_length,
            limit=limit,
            context=self._context(ids, padding_mask),
            log_probs=log_probs,
            pad_id=self.pad_id,
        )

    def beam(self, ids, padding_mask, max_new_tokens, beams: int, length_penalty):
        """Answers by beam search and their scores float32[batch]."""
        start, lengths = self._start(ids)
        return beam_search(
            self.network,
            start,
            lengths,
            max_new_tokens,
            beams=beams,
            length_penalty=length_penalty,
            stop_ids=self.stop_ids,
            max_length=self.max_length,
            context=self._context(ids, padding_mask),
            pad_id=self.pad_id,
        )

    def score(self, ids, padding_mask, target_ids, target_lengths):  # type: ignore[override]
        """How probable the model finds given targets (start tokens included) to sources; see `Generator.score`."""
        return super().score(target_ids, target_lengths, self._context(ids, padding_mask))

    # Parts -----------------------------------------------------------------------------------------------------------

    def _context(self, ids, padding_mask):
        # An encoder has to see something: an empty batch of columns becomes one padded column.
        missing = tf.maximum(1 - tf.shape(ids)[1], 0)
        ids = tf.pad(ids, [[0, 0], [0, missing]], constant_values=self.pad_id)
        return self._encoded(ids, tf.pad(padding_mask, [[0, 0], [0, missing]]))

    def _encoded(self, ids, padding_mask):
        return self.network.encode(ids, padding_mask)

    def _start(self, ids):
        batch = tf.shape(ids)[0]
        start = tf.tile(tf.constant([self.start_ids], tf.int32), [batch, 1])
        return start, tf.fill([batch], len(self.start_ids))

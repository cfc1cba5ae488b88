"""A language model as the functions that its SavedModel serves: generate, prefill, decode, score."""

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf

from tfvllm.families.spec import LanguageModel
from tfvllm.generation import loop, ragged
from tfvllm.generation.beam import beam_search
from tfvllm.generation.cache import EncoderOutput, allocate
from tfvllm.generation.network import Network
from tfvllm.generation.sampling import SamplingParams
from tfvllm.generation.stops import StopStrings
from tfvllm.generation.text import GraphTokenizer, valid_utf8

# Positions whose vocabulary logits are held at once while scoring.
_SCORED_AT_ONCE = 128


class Generator(tf.Module):
    """A causal language model with, where there is one, its tokenizer.

    Args:
        spec: the model.
        dtype: float32 or bfloat16.
        target: `portable` or `onednn`.
        codec: text to tokens; None: the generator takes and gives ids only.
        max_length: the most tokens of prompt and answer together; None: only the model's own limit.
        start_ids: tokens put before every prompt that comes as text.
        stop_ids: tokens that end an answer.
        pad_id: fills rows.
    """

    def __init__(
        self,
        spec: LanguageModel,
        *,
        dtype=tf.float32,
        target: str = "portable",
        codec: GraphTokenizer | None = None,
        max_length: int | None = None,
        start_ids: tuple[int, ...] = (),
        stop_ids: tuple[int, ...] = (),
        pad_id: int = 0,
    ):
        super().__init__(name="generator")
        self.network = Network(spec, dtype=dtype, target=target)
        self.vocabulary_size = spec.vocabulary_size
        self._hold(codec, (max_length, spec.max_positions), start_ids, stop_ids, pad_id)

    def _hold(self, codec, limits, start_ids, stop_ids, pad_id) -> None:
        self.codec: Any = codec
        self.max_length = loop.least(*limits)
        self.start_ids = tuple(start_ids)
        self.stop_ids = tuple(stop_ids)
        self.pad_id = pad_id

    # Prompts ---------------------------------------------------------------------------------------------------------

    def read_texts(self, texts: tf.Tensor, room: int = 1) -> tuple[tf.Tensor, tf.Tensor]:
        """string[batch] -> ids int32[batch, length] and lengths int32[batch].

        A text that leaves fewer than `room` tokens below `max_length` loses its beginning; start tokens stay.
        """
        most = None if self.max_length is None else max(self.max_length - room - len(self.start_ids), 0)
        return ragged.padded(self.codec.encode(texts), self.pad_id, before=self.start_ids, most=most, last=True)

    def read_ids(self, token_ids: tf.Tensor, padding_mask: tf.Tensor, room: int = 1) -> tuple[tf.Tensor, tf.Tensor]:
        """The same for ids that are padded on either side. A row too long keeps its last tokens."""
        ids, lengths = loop.left_aligned(token_ids, tf.not_equal(padding_mask, 0))
        if self.max_length is not None:
            ids, lengths = loop.last_tokens(ids, lengths, max(self.max_length - room, 0))
        return ids, lengths

    # What is served --------------------------------------------------------------------------------------------------

    def generate(
        self,
        ids,
        lengths,
        max_new_tokens,
        controls: SamplingParams | None = None,
        stops=None,
        log_probs=False,
        limit: tf.Tensor | None = None,
    ):
        """See `tfvllm.generation.loop.generate`."""
        return self._decoded(
            *(ids, lengths, max_new_tokens),
            controls=controls,
            stop_ids=self.stop_ids,
            stops=stops,
            max_length=self.max_length,
            limit=limit,
            log_probs=log_probs,
            pad_id=self.pad_id,
        )

    def _decoded(self, *prompts, **options) -> loop.Result:
        return loop.generate(self.network, *prompts, **options)

    def generate_texts(self, prompts, max_new_tokens, controls=None, stops=None, log_probs=False) -> dict:
        """string[batch] prompts -> `texts` (prompt and answer), `completions`, `finish_reasons`, the loop's outputs.

        stops: string[n] or None. An answer is cut before the first stop string; its token ids still hold it.
        """
        ids, lengths = self.read_texts(prompts)
        searched = None if stops is None else StopStrings(self.codec.bytes_of, stops)
        result = self.generate(ids, lengths, max_new_tokens, controls, searched, log_probs)
        completions = self.codec.joined(loop.marked(result.token_ids, result.lengths))
        texts = self.decoded(ids, lengths, result)
        if searched is not None:
            cut = searched.cut(completions)
            lost = tf.strings.length(completions) - tf.strings.length(cut)
            kept = tf.maximum(tf.strings.length(texts) - lost, 0)
            texts = tf.strings.substr(texts, tf.zeros_like(kept), kept)
            completions = cut
        return {
            "texts": valid_utf8(texts),
            "completions": valid_utf8(completions),
            "token_ids": result.token_ids,
            "lengths": result.lengths,
            "finish_reasons": finish_reasons(result.reasons),
            **({} if result.log_probs is None else {"log_probs": result.log_probs}),
        }

    def decoded(self, ids, lengths, result: loop.Result) -> tf.Tensor:
        """string[batch]: prompts ids int32[batch, length], of lengths int32[batch], with what was generated."""
        new = loop.marked(result.token_ids, result.lengths)
        return self.codec.decode(tf.concat([loop.marked(ids, lengths), new], axis=1))

    def beam(self, ids, lengths, max_new_tokens, beams: int, length_penalty) -> tuple[loop.Result, tf.Tensor]:
        """See `tfvllm.generation.beam.beam_search`."""
        return beam_search(
            *(self.network, ids, lengths, max_new_tokens),
            beams=beams,
            length_penalty=length_penalty,
            stop_ids=self.stop_ids,
            max_length=self.max_length,
            pad_id=self.pad_id,
        )

    def prefill(self, ids, lengths, max_new_tokens, context: EncoderOutput | None = None) -> dict:
        """Reads prompts and hands the caches to the caller.

        Returns `logits` float32[batch, vocabulary] of the next token, `token_ids` int32[batch] (the most probable next
        one), `positions` int32[batch] (where it will stand), `key_i` and `value_i`
        [batch, kv_heads, capacity, head_dim].
        """
        ids, lengths = loop.bucketed(ids, lengths, self.pad_id)
        hidden, keys, values = self.network.prefill(ids, lengths, context)
        capacity = tf.shape(ids)[1] + tf.maximum(max_new_tokens, 0)
        caches = allocate(keys, values, capacity)
        return {**self._next(hidden), "positions": lengths, **self._named(caches, tf.shape(ids)[0], capacity)}

    def decode(self, token_ids, positions, caches: dict) -> dict:
        """One step from the caller's caches: token_ids int32[batch] stand at positions int32[batch]."""
        first = caches["key_0"]
        batch, capacity = tf.shape(first)[0], tf.shape(first)[2]
        fits = tf.debugging.assert_less(
            positions, capacity, message="a position lies beyond the cache: ask prefill for more max_new_tokens"
        )
        flat = []
        with tf.control_dependencies([fits]):
            for index, (_, head_dim) in enumerate(self.network.cache_shapes):
                for name in (f"key_{index}", f"value_{index}"):
                    # The step writes in place; what the caller sent must stay as it is.
                    flat.append(tf.raw_ops.DeepCopy(x=tf.reshape(caches[name], [-1, head_dim])))
        hidden, flat = self.network.step(token_ids, positions, flat, capacity)
        return {**self._next(hidden), "positions": positions + 1, **self._named(flat, batch, capacity)}

    def cache_specs(self) -> dict[str, tf.TensorSpec]:
        """The signature of the caches that `prefill` gives and `decode` takes."""
        specs = {}
        for index, (kv_heads, head_dim) in enumerate(self.network.cache_shapes):
            for name in (f"key_{index}", f"value_{index}"):
                specs[name] = tf.TensorSpec([None, kv_heads, None, head_dim], self.network.dtype, name=name)
        return specs

    def score(self, ids, lengths, context: EncoderOutput | None = None) -> dict:
        """How probable the model finds given tokens.

        Returns `log_probs` float32[batch, length] (each token given those before it; 0 for the first and for padding),
        `lengths` int32[batch], `total` float32[batch] (their sum) and `perplexity` float32[batch]
        (exp of minus the mean; 1 where there is nothing to predict).
        """
        length = tf.shape(ids)[1]
        targets = tf.pad(ids[:, 1:], [[0, 0], [0, tf.minimum(length, 1)]])
        scores = self._scores_of(targets, ids, lengths, context)
        # Position t scores token t + 1: move one to the right.
        scores = tf.pad(scores[:, :-1], [[0, 0], [tf.minimum(length, 1), 0]])
        counted = tf.sequence_mask(lengths, length) & (tf.range(length) > 0)
        scores = tf.where(counted, scores, 0.0)
        total = tf.reduce_sum(scores, axis=-1)
        count = tf.cast(tf.maximum(lengths - 1, 1), tf.float32)
        return {"log_probs": scores, "lengths": lengths, "total": total, "perplexity": tf.exp(-total / count)}

    # Parts -----------------------------------------------------------------------------------------------------------

    def _scores_of(self, targets, ids, lengths, context) -> tf.Tensor:
        """Log-probabilities float32[batch, length] of targets int32[batch, length], each after `ids` up to there."""
        hidden = self.network.hidden_states(ids, context)
        return tf.reshape(self._scores(hidden, tf.reshape(targets, [-1])), tf.shape(ids))

    def _scores(self, hidden, targets):
        """Log-probabilities float32[rows] of targets int32[rows], a slice of rows at a time."""
        rows = tf.shape(targets)[0]
        slices = (rows + _SCORED_AT_ONCE - 1) // _SCORED_AT_ONCE
        results = tf.TensorArray(tf.float32, size=slices, element_shape=[None], infer_shape=False)

        def one(index, results):
            start = index * _SCORED_AT_ONCE
            logits = self.network.logits(hidden[start : start + _SCORED_AT_ONCE])
            some = targets[start : start + _SCORED_AT_ONCE]
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=some, logits=logits)
            return index + 1, results.write(index, -losses)

        _, results = tf.while_loop(lambda index, _: index < slices, one, [0, results])
        return tf.cond(slices > 0, results.concat, lambda: tf.zeros([0]))

    def _next(self, hidden) -> dict:
        logits = self.network.logits(hidden)
        best = tf.argmax(logits, axis=-1, output_type=tf.int32)
        pieces = {} if self.codec is None else {"piece_bytes": self.codec.bytes_of(best)}
        return {"logits": logits, "token_ids": best, **pieces}

    def _named(self, flat, batch, capacity) -> dict:
        by_rows = functools.cache(lambda kv_heads, head_dim: tf.stack([batch, kv_heads, capacity, head_dim]))
        named = {}
        for index, of_block in enumerate(self.network.cache_shapes):
            named[f"key_{index}"] = tf.reshape(flat[2 * index], by_rows(*of_block))
            named[f"value_{index}"] = tf.reshape(flat[2 * index + 1], by_rows(*of_block))
        return named


def finish_reasons(reasons: tf.Tensor) -> tf.Tensor:
    """int32[batch] -> string[batch]: "stop", "length" or "empty" (the prompt had no token)."""
    return tf.gather(tf.constant(loop.FINISH_REASONS), reasons)

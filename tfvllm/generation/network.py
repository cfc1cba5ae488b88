"""The forward computation of `tfvllm.families.spec`: prefill, one decode step, encoder, logits. Stock ops only.

Caches: one flat tensor [batch * kv_heads * capacity, head_dim] for the keys and one for the values of each block. A row
of the batch owns `kv_heads` stretches of `capacity` positions. `InplaceUpdate` writes one position without copying the
rest. Its input must therefore be a fresh buffer that nobody else reads: caches come from `Pad`, `GatherV2` or
`DeepCopy`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.families import spec as specs
from tfvllm.generation import weights
from tfvllm.generation.attention import MASKED, Turns, causal_masks, relative_bias, window_mask
from tfvllm.generation.cache import EncoderOutput, to_context, to_parts
from tfvllm.generation.kernels import Portable, kernels_for
from tfvllm.generation.layers import Layers
from tfvllm.generation.shared import SharedFunctions


class Network(tf.Module):
    """A language model's weights as variables, and the functions of them that decoding needs.

    Args:
        spec: what to compute.
        dtype: type of weights, activations and caches: float32 or bfloat16. Softmax and norms are always float32, and a
            loop's caches may be (`loop_dtype`).
        target: `portable` or `onednn`, see `tfvllm.generation.kernels`.
    """

    def __init__(self, spec: specs.LanguageModel, *, dtype: tf.DType = tf.float32, target: str = "portable"):
        super().__init__(name="network")
        self.dtype = tf.as_dtype(dtype)
        self.kernels = kernels_for(target, self.dtype)
        self._layers = Layers(self.dtype, self.kernels, SharedFunctions())
        self.family = spec.family
        self.vocabulary_size = spec.vocabulary_size
        self.width = spec.width
        self.max_positions = spec.max_positions
        self.cache_bytes_per_token = spec.cache_bytes_per_token(self.dtype.size)
        self._head_scale = spec.head_scale
        self._logit_soft_cap = spec.logit_soft_cap
        # A tied head is held once, in the layout that is fast for the product over the whole vocabulary: the lookup of
        # few columns is cheap.
        self._tied = spec.head is None
        self._head = weights.matrix(spec.embedding.T if spec.head is None else spec.head, "head", self.kernels)
        self._embedding = None if self._tied else weights.variable(spec.embedding, "embedding", self.dtype)
        self._encoder = None
        if spec.encoder is not None:
            self._encoder, self._encoder_variables = weights.hold(spec.encoder, "encoder", self.kernels)
        self._decoder, self._decoder_variables = weights.hold(spec.decoder, "decoder", self.kernels)

    def assign(self, spec: specs.LanguageModel) -> None:
        """Takes the weights of the same model, read again after it was trained. What was traced stays as it is.

        Only with portable kernels: oneDNN keeps the weights it has packed.
        """
        if self.kernels.name != "portable":
            raise InputError(f"weights of the target {self.kernels.name} stay; expected 'portable'. Make a new one.")
        weights.matrix(
            *(spec.embedding.T if spec.head is None else spec.head, "head", self.kernels),
            make=weights.refilled([self._head]),
        )
        if self._embedding is not None:
            self._embedding.assign(tf.cast(spec.embedding, self.dtype))
        if spec.encoder is not None:
            weights.hold(spec.encoder, "encoder", self.kernels, weights.refilled(self._encoder_variables))
        weights.hold(spec.decoder, "decoder", self.kernels, weights.refilled(self._decoder_variables))

    @property
    def is_seq2seq(self) -> bool:
        return self._encoder is not None

    @property
    def cache_shapes(self) -> list[tuple[int, int]]:
        """(kv_heads, head_dim) of every decoder block that has keys and values of its own."""
        held = [self._decoder.blocks[index].attention for index in self._decoder.caching]
        return [(attention.kv_heads, attention.head_dim) for attention in held]

    # Kernels ---------------------------------------------------------------------------------------------------------

    def by_rows(self, rows: tf.Tensor, function: Callable[[Portable], Any], least: int = 1):
        """`function(kernels)`, traced once more where other kernels multiply some numbers of rows faster.

        Around a loop whose number of rows stays, this saves its steps the choice.

        Args:
            rows: int32[], how many rows products have.
            function: kernels -> tensors; a structure of the same types and ranks with either.
            least: there are never fewer rows.
        """
        alternative = self.kernels.alternative
        if alternative is None or alternative[1] < least:
            return function(self.kernels)
        low, high, other = alternative
        return tf.cond((rows >= low) & (rows <= high), lambda: function(other), lambda: function(self.kernels))

    def loop_dtype(self, kernels: Portable) -> tf.DType:
        """The type of caches that a loop of steps with these kernels had best hold.

        A single row attends to float32 sooner: both products of 12 heads of 64 channels took 111 instead of 171 µs at
        192 positions, and as long as in bfloat16 at 512. What is read and written has `dtype`'s values in either.
        """
        grouped = any(b.attention.heads != b.attention.kv_heads for b in self._decoder.blocks)
        return self.dtype if kernels is self.kernels or grouped else tf.float32

    # Whole sequences -------------------------------------------------------------------------------------------------

    def encode(self, ids: tf.Tensor, padding_mask: tf.Tensor) -> EncoderOutput:
        """The encoder, and what each decoder block attends to. ids int32, padding_mask bool[sources, length]."""
        return EncoderOutput(*self._layers.call(self._encode, ids, padding_mask))

    def _encode(self, ids, padding_mask):
        layers, stack = self._layers, cast(specs.Stack, self._encoder)
        batch, length = tf.shape(ids)[0], tf.shape(ids)[1]
        positions = tf.range(length)
        x = self._embed(layers, stack, tf.reshape(ids, [-1]), tf.tile(positions, [batch]))
        padding = tf.where(padding_mask, 0.0, MASKED)[:, tf.newaxis, tf.newaxis, :]
        distance = positions[:, tf.newaxis] - positions
        bias = relative_bias(stack, distance)
        mask = padding if bias is None else padding + bias
        masks = {
            around: mask if around is None else mask + window_mask(around, distance)
            for around in dict.fromkeys(block.attention.around for block in stack.blocks)
        }
        turns, shape = Turns(positions, self.dtype), _shapes(batch, length)
        for block in stack.blocks:
            n = layers.norm(block.attention_norm, x) if block.normalize_first else x
            query, key, value = layers.query_key_value(block.attention, n, turns, shape)
            attended = layers.attend(query, key, value, masks[block.attention.around], **_scores(block.attention))
            x = layers.feed_forward(block, layers.after_attention(block, x, attended), x)
        x = layers.norm(stack.final_norm, x)
        keys, values = [], []
        for block in self._decoder.blocks:
            if block.attention.merged:
                still = dataclasses.replace(block.attention, rotary=None)
                _, key, value = layers.query_key_value(still, x, turns, shape)
                keys.append(key)
                values.append(value)
                continue
            cross = cast(specs.CrossAttention, block.cross_attention)
            merged = tf.reshape(layers.linear(cross.key_value, x), [batch, length, 2 * cross.kv_heads, cross.head_dim])
            key, value = tf.split(tf.transpose(merged, [0, 2, 1, 3]), 2, axis=1)
            keys.append(key)
            values.append(value)
        return keys, values, padding

    def prefill(self, ids: tf.Tensor, lengths: tf.Tensor, context: EncoderOutput | None = None):
        """Reads whole prompts.

        Args:
            ids: int32[batch, length], each row's tokens first, then anything.
            lengths: int32[batch], at least 1: how many tokens of a row count.
            context: what `encode` returned, one source for each row.

        Returns:
            (hidden [batch, width] of each row's last token; keys and values, two lists of
            [batch, kv_heads, length, head_dim], one of each for each of `cache_shapes`).
        """
        return self._layers.call(self._prefill, ids, lengths, to_parts(context))

    def _prefill(self, ids, lengths, parts):
        return self._sequence(ids, lengths - 1, to_context(parts))

    def hidden_states(self, ids: tf.Tensor, context: EncoderOutput | None = None) -> tf.Tensor:
        """ids int32[batch, length] -> [batch * length, width], every position's input to the head."""
        return self._sequence(ids, None, context)[0]

    def _sequence(self, ids, last, context):
        layers, stack = self._layers, self._decoder
        batch, length = tf.shape(ids)[0], tf.shape(ids)[1]
        positions = tf.range(length)
        flat = tf.reshape(ids, [-1])
        x = self._embed(layers, stack, flat, tf.tile(positions, [batch]))
        token_inputs = self._token_inputs(layers, stack, flat, x)
        masks = causal_masks(stack, positions, length)
        turns = Turns(positions, self.dtype)
        shape: Callable[[int, int], tf.Tensor] | None = _shapes(batch, length)
        keys, values, places = [], [], stack.caches
        queries: Any = length
        attend: Callable[..., tf.Tensor] = functools.partial(layers.call, layers.attend_causally)
        for index, block in enumerate(stack.blocks):
            n = layers.norm(block.attention_norm, x) if block.normalize_first else x
            query, key, value = layers.query_key_value(block.attention, n, turns, shape)
            if key is not None:
                keys.append(key)
                values.append(value)
            if last is not None and index == stack.caching[-1]:
                # Past the last keys and values blocks owe one position of each row only.
                query = tf.gather(query, last[:, tf.newaxis], axis=2, batch_dims=1)
                query = tf.ensure_shape(query, [None, block.attention.heads, 1, block.attention.head_dim])
                column, owed = last[:, tf.newaxis], last + tf.range(batch) * length
                masks, turns, shape = causal_masks(stack, column, length), Turns(column, self.dtype), None
                x = tf.gather(x, owed)
                token_inputs = None if token_inputs is None else tf.gather(token_inputs, owed)
                queries, attend = 1, layers.attend
            attention, place = block.attention, places[index]
            tensors = (query, keys[place], values[place], masks[attention.masked_by])
            if attention.merged:
                attended = layers.attend_to_both(*tensors, context=context, index=index, **_scores(attention))
            else:
                attended = attend(*tensors, layers.sinks(attention), **_scores(attention))
            entered, x = x, layers.after_attention(block, x, attended)
            x = layers.feed_forward(block, layers.cross(block, x, context, index, queries), entered)
            x = layers.leave(block, x, token_inputs, index)
        return layers.norm(stack.final_norm, x), keys, values

    # One step --------------------------------------------------------------------------------------------------------

    def step(
        self,
        ids: tf.Tensor,
        positions: tf.Tensor,
        caches: list[tf.Tensor],
        capacity: tf.Tensor,
        context: EncoderOutput | None = None,
        *,
        beams: int = 1,
        kernels: Portable | None = None,
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Reads one more token of each row.

        Args:
            ids: int32[rows], the tokens.
            positions: int32[rows], where each stands; its keys and values go there.
            caches: `allocate`'s tensors, keys and values of each block in turn, of `dtype` or `loop_dtype`. They are
                written in place.
            capacity: int32[], how many positions a row's caches hold.
            context: what the decoder attends to, one source for each `beams` rows.
            beams: how many rows share a source.
            kernels: what `by_rows` has chosen; None: it is chosen here.

        Returns:
            (hidden [rows, width], caches).
        """
        tensors = [ids, positions, list(caches), tf.convert_to_tensor(capacity), to_parts(context)]

        def run(kernels: Portable):
            layers = dataclasses.replace(self._layers, kernels=kernels, stepping=True)
            return layers.call(self._step, *tensors, layers=layers, beams=beams)

        return self.by_rows(tf.shape(ids)[0], run, least=beams) if kernels is None else run(kernels)

    def _step(self, ids, positions, caches, capacity, parts, *, layers: Layers, beams: int):
        stack, context = self._decoder, to_context(parts)
        rows = tf.shape(ids)[0]
        x = self._embed(layers, stack, ids, positions)
        token_inputs = self._token_inputs(layers, stack, ids, x)
        column = positions[:, tf.newaxis]
        masks, turns = causal_masks(stack, column, capacity), Turns(column, self.dtype)
        targets, caches, places = {}, list(caches), stack.caches
        shape = functools.cache(lambda heads, head_dim: tf.stack([rows, heads, capacity, head_dim]))
        for index, block in enumerate(stack.blocks):
            attention, place = block.attention, 2 * places[index]
            kv_heads, head_dim = attention.kv_heads, attention.head_dim
            if kv_heads not in targets:
                starts = tf.range(rows * kv_heads) * capacity
                targets[kv_heads] = starts + tf.repeat(positions, kv_heads)
            n = layers.norm(block.attention_norm, x) if block.normalize_first else x
            query, key, value = layers.query_key_value(attention, n, turns, None)
            for which, new in () if key is None else ((place, key), (place + 1, value)):
                caches[which] = tf.raw_ops.InplaceUpdate(
                    x=caches[which],
                    i=targets[kv_heads],
                    v=tf.cast(tf.reshape(new, [-1, head_dim]), caches[which].dtype),
                )
            key, value = (tf.reshape(cache, shape(kv_heads, head_dim)) for cache in caches[place : place + 2])
            tensors = (query, key, value, masks[attention.masked_by])
            if attention.merged:
                attended = layers.attend_to_both(
                    *tensors, context=context, index=index, beams=beams, **_scores(attention)
                )
            else:
                attended = layers.attend(*tensors, layers.sinks(attention), **_scores(attention))
            entered, x = x, layers.after_attention(block, x, attended)
            x = layers.feed_forward(block, layers.cross(block, x, context, index, beams), entered)
            x = layers.leave(block, x, token_inputs, index)
        return layers.norm(stack.final_norm, x), caches

    # Both ends -------------------------------------------------------------------------------------------------------

    def _embed(self, layers: Layers, stack: specs.Stack, ids: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        """ids, positions int32[rows] -> [rows, width]."""
        if stack.embedding is not None:
            x = tf.gather(stack.embedding, ids)
        elif self._tied and self.kernels.transposed(self.width, self.vocabulary_size):
            # Of what is read, not of the variable: ResourceGather would make every later read of it a copy.
            x = tf.gather(self._head.value(), ids)
        elif self._tied and not layers.stepping:  # many: in order, which memory likes better
            order = tf.argsort(ids)
            columns = tf.gather(self._head.value(), tf.gather(ids, order), axis=1)
            x = tf.gather(tf.transpose(columns), tf.math.invert_permutation(order))
        elif self._tied:
            places = tf.range(self.width, dtype=tf.int64) * self.vocabulary_size
            x = tf.gather(tf.reshape(self._head, [-1]), tf.cast(ids, tf.int64)[:, tf.newaxis] + places)
        else:
            x = tf.gather(self._embedding, ids)
        if stack.embedding_scale != 1.0:
            x *= tf.cast(stack.embedding_scale, x.dtype)
        if stack.position_table is not None:
            last = stack.position_table.shape[0] - 1
            x += tf.gather(stack.position_table, tf.minimum(positions, last))  # padding may number past the table
        return layers.norm(stack.embedding_norm, x)

    def _token_inputs(self, layers: Layers, stack: specs.Stack, ids: tf.Tensor, x: tf.Tensor) -> tf.Tensor | None:
        """ids int32[rows], x [rows, width] as embedded -> [rows, blocks, inner], or None."""
        inputs = stack.token_inputs
        if inputs is None:
            return None
        found, projected = tf.gather(inputs.table, ids), layers.linear(inputs.projection, x)
        shape = [-1, len(stack.blocks), found.shape[-1] // len(stack.blocks)]
        return layers.norm(inputs.norm, tf.reshape(projected, shape)) + tf.reshape(found, shape)

    def logits(self, hidden: tf.Tensor, kernels: Portable | None = None) -> tf.Tensor:
        """hidden [rows, width] -> float32[rows, vocabulary]. `kernels`: as for `step`."""
        if self._head_scale != 1.0:
            hidden *= tf.cast(self._head_scale, hidden.dtype)

        def run(kernels: Portable):
            return kernels.linear(hidden, self._head)

        logits = self.by_rows(tf.shape(hidden)[0], run) if kernels is None else run(kernels)
        logits = tf.cast(logits, tf.float32)
        cap = self._logit_soft_cap
        return logits if cap is None else cap * tf.tanh(logits / cap)


def _scores(attention: specs.Attention) -> dict[str, Any]:
    return {"scale": attention.scale, "soft_cap": attention.soft_cap}


def _shapes(batch: tf.Tensor, length: tf.Tensor) -> Callable[[int, int], tf.Tensor]:
    """[batch, length, heads, head_dim] for each number of heads, one node each."""
    return functools.cache(lambda heads, head_dim: tf.stack([batch, length, heads, head_dim]))

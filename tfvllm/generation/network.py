"""The forward computation of `tfvllm.models.spec`: prefill, one decode step, encoder, logits. Stock ops only.

Caches: one flat tensor [batch * kv_heads * capacity, head_dim] for the keys and one for the values of each block. A row
of the batch owns `kv_heads` stretches of `capacity` positions. `InplaceUpdate` writes one position without copying the
rest. Its input must therefore be a fresh buffer that nobody else reads: caches come from `Pad`, `GatherV2` or
`DeepCopy`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.generation.attention import (
    LONG,
    MASKED,
    PARTS,
    Turns,
    folded,
    one_row_each,
    relative_bucket,
    softmax,
)
from tfvllm.generation.cache import EncoderOutput, relaxed_shapes, to_context, to_parts
from tfvllm.generation.kernels import Portable, activate, kernels_for
from tfvllm.generation.weights import Vectors, read_vector
from tfvllm.models import spec as specs


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
        self._few_rows, self._stepping = Portable(), False
        self._products, self._chosen = self.kernels, False  # see `by_rows`
        # Past tf.Module's own setter: it would track the functions, and save each once more.
        object.__setattr__(self, "_shared", {})
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
        self._head = self._kernel(spec.embedding.T if spec.head is None else spec.head, "head")
        self._embedding = None if self._tied else self._variable(spec.embedding, "embedding")
        self._encoder = None if spec.encoder is None else self._stack(spec.encoder, "encoder")
        self._decoder = self._stack(spec.decoder, "decoder")

    # Weights ---------------------------------------------------------------------------------------------------------

    def _variable(self, value: np.ndarray, name: str, dtype=None) -> tf.Variable:
        return tf.Variable(tf.cast(value, dtype or self.dtype), trainable=False, name=name)

    def _kernel(self, value: np.ndarray, name: str) -> tf.Variable:
        """A matrix [inputs, outputs] in the layout that `self.kernels` wants."""
        return self._variable(np.ascontiguousarray(value.T if self.kernels.transposed(*value.shape) else value), name)

    def _stack(self, stack: specs.Stack, name: str):
        """The same dataclasses with variables and vectors of variables in place of arrays.

        Also makes tf.Module see the variables.
        """
        held: list[tf.Variable] = []
        # Norms are held as what they compute in, or every step would cast them.
        biases, norms = Vectors(self.dtype), Vectors(tf.float32)

        def hold(value, path, vectors=biases):
            if isinstance(value, specs.Rotary):
                return value  # a few numbers, kept as constants
            if isinstance(value, specs.Attention):
                value = folded(value)
            if isinstance(value, specs.Linear):
                held.append(self._kernel(value.kernel, f"{path}/kernel"))
                return specs.Linear(held[-1], hold(value.bias, f"{path}/bias"))
            if isinstance(value, np.ndarray) and value.ndim == 1:
                return vectors.add(value)
            if isinstance(value, np.ndarray):
                held.append(self._variable(value, path))
                return held[-1]
            if isinstance(value, list):
                return [hold(item, f"{path}/{i}") for i, item in enumerate(value)]
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
                vectors = norms if isinstance(value, specs.Norm) else biases
                return dataclasses.replace(value, **{k: hold(v, f"{path}/{k}", vectors) for k, v in fields.items()})
            return value

        stack = hold(stack, name)
        for vectors, what in ((biases, "biases"), (norms, "norms")):
            held.extend(vectors.joined(f"{name}/{what}"))
        setattr(self, f"_{name}_variables", held)
        return stack

    @property
    def is_seq2seq(self) -> bool:
        return self._encoder is not None

    @property
    def cache_shapes(self) -> list[tuple[int, int]]:
        """(kv_heads, head_dim) of every decoder block."""
        return [(b.attention.kv_heads, b.attention.head_dim) for b in self._decoder.blocks]

    # Parts -----------------------------------------------------------------------------------------------------------

    def _norm(self, norm: specs.Norm | None, x: tf.Tensor) -> tf.Tensor:
        if norm is None:
            return x
        if norm.kind == "rms":
            return self.kernels.rms_norm(x, read_vector(norm.scale), norm.epsilon)
        # A fused norm is prepared anew at each call: for the few rows of a step that takes longer than the norm.
        kernels = self._few_rows if self._stepping else self.kernels
        return kernels.layer_norm(x, read_vector(norm.scale), read_vector(norm.offset), norm.epsilon)

    def _linear(self, linear: specs.Linear, x: tf.Tensor, activation: str = "linear") -> tf.Tensor:
        return self._products.linear(x, linear.kernel, read_vector(linear.bias), activation)

    def by_rows(self, rows: tf.Tensor, function, least: int = 1):
        """`function()`, traced once more where other kernels multiply some numbers of rows faster.

        Around a loop whose number of rows stays, this saves its steps the choice.

        Args:
            rows: int32[], how many rows products have.
            function: () -> tensors; a structure of the same types and ranks with either kernels.
            least: there are never fewer rows.
        """
        alternative = self.kernels.alternative
        if alternative is None or self._chosen or alternative[1] < least:
            return function()
        low, high, other = alternative

        def by(kernels):
            self._products, self._chosen = kernels, True
            try:
                return function()
            finally:
                self._products, self._chosen = self.kernels, False

        return tf.cond((rows >= low) & (rows <= high), lambda: by(other), lambda: by(self.kernels))

    @property
    def loop_dtype(self) -> tf.DType:
        """The type of caches that a loop of steps, traced now, had best hold.

        A single row attends to float32 sooner: both products of 12 heads of 64 channels took 111 instead of 171 µs at
        192 positions, and as long as in bfloat16 at 512. What is read and written has `dtype`'s values in either.
        """
        grouped = any(b.attention.heads != b.attention.kv_heads for b in self._decoder.blocks)
        return self.dtype if self._products is self.kernels or grouped else tf.float32

    def _embed(self, stack: specs.Stack, ids: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        """ids, positions int32[rows] -> [rows, width]."""
        if self._tied and self.kernels.transposed(self.width, self.vocabulary_size):
            # Of what is read, not of the variable: ResourceGather would make every later read of it a copy.
            x = tf.gather(self._head.value(), ids)
        elif self._tied and not self._stepping:  # many: in order, which memory likes better
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
        return self._norm(stack.embedding_norm, x)

    def _feed_forward(self, block: specs.Block, x: tf.Tensor) -> tf.Tensor:
        ffn = block.feed_forward
        residual = x
        if block.normalize_first:
            x = self._norm(block.feed_forward_norm, x)
        if ffn.gated:
            gate, up = tf.split(self._linear(ffn.up, x), 2, axis=-1)
            x = activate(gate, ffn.activation) * up
        else:
            x = self._linear(ffn.up, x, ffn.activation)
        x = residual + self._norm(block.post_feed_forward_norm, self._linear(ffn.output, x))
        return x if block.normalize_first else self._norm(block.feed_forward_norm, x)

    def _query_key_value(self, attention: specs.Attention, x, turns: Turns, shape: Callable[[int, int], Any] | None):
        """x [batch * length, width] -> three [batch, heads, length, head_dim].

        `shape(heads, head_dim)` is [batch, length, heads, head_dim]; None: a step, whose length is 1.
        """
        heads, kv_heads = attention.heads, attention.kv_heads
        merged = self._linear(attention.query_key_value, x)
        if shape is None:  # heads are already where they belong
            merged = tf.reshape(merged, [-1, heads + 2 * kv_heads, 1, attention.head_dim])
        else:
            merged = tf.reshape(merged, shape(heads + 2 * kv_heads, attention.head_dim))
            merged = tf.transpose(merged, [0, 2, 1, 3])
        if attention.rotary is None or attention.query_norm is not None:
            query, key, value = tf.split(merged, [heads, kv_heads, kv_heads], axis=1)
            query, key = self._norm(attention.query_norm, query), self._norm(attention.key_norm, key)
            if attention.rotary is not None:
                query, key = turns.turn(attention.rotary, query), turns.turn(attention.rotary, key)
            return query, key, value
        rotated, value = tf.split(merged, [heads + kv_heads, kv_heads], axis=1)  # queries and keys turn together
        query, key = tf.split(turns.turn(attention.rotary, rotated), [heads, kv_heads], axis=1)
        return query, key, value

    def _attend(self, query, key, value, mask, scale: float, soft_cap: float | None = None) -> tf.Tensor:
        """Attention with grouped heads.

        query [batch, heads, queries, head_dim]; key, value [batch, kv_heads, keys, head_dim]; mask float32, broadcast
        to [batch, heads, queries, keys] and added to the scores -> [batch * queries, heads * head_dim].
        """
        heads, head_dim, kv_heads = query.shape[1], query.shape[3], key.shape[1]
        single, grouped = query.shape[2] == 1, heads != kv_heads
        if not single:
            batch, queries = tf.shape(query)[0], tf.shape(query)[2]
        # The heads of a group stand where its queries do. A mask that is one for all heads fits them as they stand.
        apart = grouped and not (single and mask.shape[-3] == 1)
        if apart:
            scores_shape = tf.stack([tf.shape(query)[0], heads, tf.shape(query)[2], tf.shape(key)[2]])
        if scale != 1.0:
            query *= tf.cast(scale, query.dtype)
        query = tf.cast(query, key.dtype)
        if grouped:
            group = heads // kv_heads if single else (heads // kv_heads) * queries
            query = tf.reshape(query, [-1 if single else batch, kv_heads, group, head_dim])
        product = one_row_each if single and not grouped and key.dtype == tf.float32 else tf.matmul
        scores = tf.cast(product(query, key, transpose_b=True), tf.float32)
        if apart:
            grouped_shape = tf.shape(scores)
            scores = tf.reshape(scores, scores_shape)
        if soft_cap is not None:
            scores = soft_cap * tf.tanh(scores / soft_cap)
        scores += mask
        weights = self._function(softmax, scores) if single else tf.nn.softmax(scores)
        weights = tf.cast(weights, value.dtype)
        if apart:
            weights = tf.reshape(weights, grouped_shape)
        attended = tf.cast(product(weights, value), self.dtype)
        if single:  # one query each: the heads already lie side by side
            return tf.reshape(attended, [-1, heads * head_dim])
        attended = tf.reshape(attended, [batch, heads, queries, head_dim])
        return tf.reshape(tf.transpose(attended, [0, 2, 1, 3]), [-1, heads * head_dim])

    def _attend_causally(self, query, key, value, mask, scale: float, soft_cap: float | None = None) -> tf.Tensor:
        """`_attend` of as many queries as keys, none of which sees a later key.

        The queries of a long sequence come in parts, and each part meets the keys up to its own end only: 5/8 of the
        work on scores are left.
        """
        batch, length = tf.shape(query)[0], tf.shape(query)[2]
        features = query.shape[1] * query.shape[3]

        def whole():
            return self._attend(query, key, value, mask, scale, soft_cap)

        def by_parts():
            size = -(-length // PARTS)
            found = []
            for part in range(PARTS):
                # Too few positions for all parts leave the last ones empty.
                start, end = tf.minimum(part * size, length), tf.minimum((part + 1) * size, length)
                seen, last = slice(None, end), part == PARTS - 1
                keys, values = (key, value) if last else (key[:, :, seen], value[:, :, seen])
                some = self._attend(query[:, :, start:end], keys, values, mask[..., start:end, seen], scale, soft_cap)
                found.append(tf.reshape(some, [batch, end - start, features]))
            return tf.reshape(tf.concat(found, axis=1), [-1, features])

        return tf.cond(length < LONG, whole, by_parts)

    def _after_attention(self, block: specs.Block, x: tf.Tensor, attended: tf.Tensor) -> tf.Tensor:
        """Output projection, the norm that may follow it, and the residual. attended [rows, heads * head_dim]."""
        attended = self._linear(block.attention.output, attended)
        x = x + self._norm(block.post_attention_norm, attended)
        return x if block.normalize_first else self._norm(block.attention_norm, x)

    def _cross(self, block: specs.Block, x: tf.Tensor, context: EncoderOutput | None, index: int, queries) -> tf.Tensor:
        """Attention to the encoder. x [sources * queries, width]: several queries of one source share its keys."""
        cross = block.cross_attention
        if cross is None:
            return x
        assert context is not None, "a decoder with cross-attention needs what `encode` returned"
        residual = x
        if block.normalize_first:
            x = self._norm(block.cross_norm, x)
        query = tf.reshape(self._linear(cross.query, x), [-1, queries, cross.heads, cross.head_dim])
        query = tf.transpose(query, [0, 2, 1, 3])
        attended = self._attend(query, context.keys[index], context.values[index], context.mask, cross.scale)
        x = residual + self._linear(cross.output, attended)
        return x if block.normalize_first else self._norm(block.cross_norm, x)

    def _masks(self, stack: specs.Stack, query_positions: tf.Tensor, keys) -> dict[int | None, tf.Tensor]:
        """What is added to the scores of causal attention, for each window that occurs in the stack.

        query_positions int32[queries] -> float32[1 or heads, queries, keys]; int32[batch, 1] -> [batch, .., 1, keys]

        The mask of whole sequences has no axis for the batch: TensorFlow fuses the addition of four axes with scaled
        products before it, and oneDNN has nothing but its reference code for [1, 1, queries, keys]: 200 times as slow.
        """
        key_positions = tf.range(keys)
        distance = query_positions[..., :, tf.newaxis] - key_positions  # >= 0: the key is not in the future
        bias = self._relative_bias(stack, distance)
        masks = {}
        for window in {block.attention.window for block in stack.blocks}:
            seen = distance >= 0
            if window is not None:
                seen &= distance < window
            mask = tf.where(seen, 0.0, MASKED)[..., tf.newaxis, :, :]
            if bias is not None:
                mask += bias
            masks[window] = mask
        return masks

    def _relative_bias(self, stack: specs.Stack, distance: tf.Tensor) -> tf.Tensor | None:
        """distance int32[.., queries, keys] = query - key -> float32[.., heads, queries, keys], or None."""
        if stack.alibi is not None:
            slopes = tf.constant(stack.alibi, tf.float32, [len(stack.alibi), 1, 1])
            return -slopes * tf.cast(distance, tf.float32)[..., tf.newaxis, :, :]
        bias = stack.relative_bias
        if bias is None:
            return None
        bucket = relative_bucket(-distance, bias.table.shape[0], bias.max_distance, bias.bidirectional)
        values = tf.cast(tf.gather(bias.table, bucket), tf.float32)
        order = [0, 3, 1, 2] if values.shape.rank == 4 else [2, 0, 1]
        return tf.transpose(values, order)

    def _function(self, function, *tensors, inline: bool = True, **chosen):
        """`function(*tensors, **chosen)` as a call of a function that every signature shares.

        A SavedModel then holds each of these large pieces once, however many signatures and loops read it: it is
        smaller and loaded sooner. TensorFlow puts the pieces back in line when it prepares to run a signature.

        What is called for every layer and takes long beside a call (some 20 µs) is better left out of line: TensorFlow
        then prepares it once. With the attention of 30 layers in line a first prompt took twice as long.
        """
        specs = tf.nest.map_structure(lambda t, shape: tf.TensorSpec(shape, t.dtype), tensors, relaxed_shapes(tensors))
        # What is traced with other kernels for its products is another function.
        key = (function.__name__, self._products is self.kernels, *tf.nest.flatten(specs), *chosen.items())
        if key not in self._shared:

            def shared(*tensors):
                return function(*tensors, **chosen)

            shared.__name__ = function.__name__.strip("_")
            kept = None if inline else {"_noinline": True}
            traced = tf.function(shared, input_signature=specs, autograph=False, experimental_attributes=kept)
            self._shared[key] = traced.get_concrete_function()  # one, inside and outside of saving
        return self._shared[key](*tensors)

    # Whole sequences -------------------------------------------------------------------------------------------------

    def encode(self, ids: tf.Tensor, padding_mask: tf.Tensor) -> EncoderOutput:
        """The encoder, and what each decoder block attends to. ids int32, padding_mask bool[sources, length]."""
        return EncoderOutput(*self._function(self._encode, ids, padding_mask))

    def _encode(self, ids, padding_mask):
        stack: Any = self._encoder
        batch, length = tf.shape(ids)[0], tf.shape(ids)[1]
        positions = tf.range(length)
        x = self._embed(stack, tf.reshape(ids, [-1]), tf.tile(positions, [batch]))
        padding = tf.where(padding_mask, 0.0, MASKED)[:, tf.newaxis, tf.newaxis, :]
        bias = self._relative_bias(stack, positions[:, tf.newaxis] - positions)
        mask = padding if bias is None else padding + bias
        turns, shape = Turns(positions, self.dtype), _shapes(batch, length)
        for block in stack.blocks:
            n = self._norm(block.attention_norm, x) if block.normalize_first else x
            query, key, value = self._query_key_value(block.attention, n, turns, shape)
            attended = self._attend(query, key, value, mask, block.attention.scale, block.attention.soft_cap)
            x = self._feed_forward(block, self._after_attention(block, x, attended))
        x = self._norm(stack.final_norm, x)
        keys, values = [], []
        for block in self._decoder.blocks:
            cross = block.cross_attention
            merged = tf.reshape(self._linear(cross.key_value, x), [batch, length, 2 * cross.heads, cross.head_dim])
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
            [batch, kv_heads, length, head_dim]).
        """
        return self._function(self._prefill, ids, lengths, to_parts(context))

    def _prefill(self, ids, lengths, parts):
        return self._sequence(ids, lengths - 1, to_context(parts))

    def hidden_states(self, ids: tf.Tensor, context: EncoderOutput | None = None) -> tf.Tensor:
        """ids int32[batch, length] -> [batch * length, width], every position's input to the head."""
        return self._sequence(ids, None, context)[0]

    def _sequence(self, ids, last, context):
        stack = self._decoder
        batch, length = tf.shape(ids)[0], tf.shape(ids)[1]
        positions = tf.range(length)
        x = self._embed(stack, tf.reshape(ids, [-1]), tf.tile(positions, [batch]))
        masks = self._masks(stack, positions, length)
        turns, shape = Turns(positions, self.dtype), _shapes(batch, length)
        keys, values = [], []
        for index, block in enumerate(stack.blocks):
            n = self._norm(block.attention_norm, x) if block.normalize_first else x
            query, key, value = self._query_key_value(block.attention, n, turns, shape)
            keys.append(key)
            values.append(value)
            queries: Any = length
            attend: Callable[..., tf.Tensor] = functools.partial(self._function, self._attend_causally, inline=False)
            if last is not None and index == len(stack.blocks) - 1:
                # Past its keys and values the last block owes one position of each row only.
                query = tf.gather(query, last[:, tf.newaxis], axis=2, batch_dims=1)
                query = tf.ensure_shape(query, [None, block.attention.heads, 1, block.attention.head_dim])
                masks = self._masks(stack, last[:, tf.newaxis], length)
                x = tf.gather(x, last + tf.range(batch) * length)
                queries, attend = 1, self._attend
            attention = block.attention
            mask, scores = masks[attention.window], {"scale": attention.scale, "soft_cap": attention.soft_cap}
            attended = attend(query, key, value, mask, **scores)
            x = self._after_attention(block, x, attended)
            x = self._feed_forward(block, self._cross(block, x, context, index, queries))
        return self._norm(stack.final_norm, x), keys, values

    # One step --------------------------------------------------------------------------------------------------------

    def step(self, ids, positions, caches: list[tf.Tensor], capacity, context: EncoderOutput | None = None, beams=1):
        """Reads one more token of each row.

        Args:
            ids: int32[rows], the tokens.
            positions: int32[rows], where each stands; its keys and values go there.
            caches: `allocate`'s tensors, keys and values of each block in turn, of `dtype` or `loop_dtype`. They are
                written in place.
            capacity: int32[], how many positions a row's caches hold.
            context: what the decoder attends to, one source for each `beams` rows.
            beams: how many rows share a source.

        Returns:
            (hidden [rows, width], caches).
        """
        tensors = [ids, positions, list(caches), tf.convert_to_tensor(capacity), to_parts(context)]

        return self.by_rows(tf.shape(ids)[0], lambda: self._function(self._step, *tensors, beams=beams), least=beams)

    def _step(self, ids, positions, caches, capacity, parts, beams):
        self._stepping = True
        try:
            return self._one_step(ids, positions, caches, capacity, to_context(parts), beams)
        finally:
            self._stepping = False

    def _one_step(self, ids, positions, caches, capacity, context, beams):
        stack = self._decoder
        rows = tf.shape(ids)[0]
        x = self._embed(stack, ids, positions)
        column = positions[:, tf.newaxis]
        masks, turns = self._masks(stack, column, capacity), Turns(column, self.dtype)
        targets, caches = {}, list(caches)
        shape = functools.cache(lambda heads, head_dim: tf.stack([rows, heads, capacity, head_dim]))
        for index, block in enumerate(stack.blocks):
            attention = block.attention
            kv_heads, head_dim = attention.kv_heads, attention.head_dim
            if kv_heads not in targets:
                starts = tf.range(rows * kv_heads) * capacity
                targets[kv_heads] = starts + tf.repeat(positions, kv_heads)
            n = self._norm(block.attention_norm, x) if block.normalize_first else x
            query, key, value = self._query_key_value(attention, n, turns, None)
            for which, new in ((2 * index, key), (2 * index + 1, value)):
                caches[which] = tf.raw_ops.InplaceUpdate(
                    x=caches[which],
                    i=targets[kv_heads],
                    v=tf.cast(tf.reshape(new, [-1, head_dim]), caches[which].dtype),
                )
            key, value = (tf.reshape(cache, shape(kv_heads, head_dim)) for cache in caches[2 * index : 2 * index + 2])
            attended = self._attend(query, key, value, masks[attention.window], attention.scale, attention.soft_cap)
            x = self._after_attention(block, x, attended)
            x = self._feed_forward(block, self._cross(block, x, context, index, beams))
        return self._norm(stack.final_norm, x), caches

    def logits(self, hidden: tf.Tensor) -> tf.Tensor:
        """hidden [rows, width] -> float32[rows, vocabulary]."""
        if self._head_scale != 1.0:
            hidden *= tf.cast(self._head_scale, hidden.dtype)
        logits = self.by_rows(tf.shape(hidden)[0], lambda: self._products.linear(hidden, self._head))
        logits = tf.cast(logits, tf.float32)
        cap = self._logit_soft_cap
        return logits if cap is None else cap * tf.tanh(logits / cap)


def _shapes(batch: tf.Tensor, length: tf.Tensor) -> Callable[[int, int], tf.Tensor]:
    """[batch, length, heads, head_dim] for each number of heads, one node each."""
    return functools.cache(lambda heads, head_dim: tf.stack([batch, length, heads, head_dim]))

"""The forward computation of `tfvllm.models.spec`: prefill, one decode step, encoder, logits. Stock ops only.

Caches: one flat tensor [batch * kv_heads * capacity, head_dim] for the keys and one for the values of each block. A row
of the batch owns `kv_heads` stretches of `capacity` positions. `InplaceUpdate` writes one position without copying the
rest. Its input must therefore be a fresh buffer that nobody else reads: caches come from `Pad`, `GatherV2` or
`DeepCopy`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.generation.kernels import Portable, activate, kernels_for
from tfvllm.models import spec as specs

_MASKED = -1e9  # finite, so that a fully masked row (an empty source) stays free of NaN
_LONG = 256  # positions from which on causal attention goes by parts
_PARTS = 4


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
        biases, norms = _Vectors(self.dtype), _Vectors(tf.float32)

        def hold(value, path, vectors=biases):
            if isinstance(value, specs.Rotary):
                return value  # a few numbers, kept as constants
            if isinstance(value, specs.Attention):
                value = _folded(value)
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
            if dataclasses.is_dataclass(value):
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
            return self.kernels.rms_norm(x, _read(norm.scale), norm.epsilon)
        # A fused norm is prepared anew at each call: for the few rows of a step that takes longer than the norm.
        kernels = self._few_rows if self._stepping else self.kernels
        return kernels.layer_norm(x, _read(norm.scale), _read(norm.offset), norm.epsilon)

    def _linear(self, linear: specs.Linear, x: tf.Tensor, activation: str = "linear") -> tf.Tensor:
        return self._products.linear(x, linear.kernel, _read(linear.bias), activation)

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

    def _query_key_value(self, attention: specs.Attention, x, batch, length, positions):
        """x [batch * length, width], positions int32[length] or [batch, 1] -> three [batch, heads, length, dim]."""
        heads, kv_heads = attention.heads, attention.kv_heads
        merged = self._linear(attention.query_key_value, x)
        if isinstance(length, int) and length == 1:  # a step: heads are already where they belong
            merged = tf.reshape(merged, [batch, heads + 2 * kv_heads, 1, attention.head_dim])
        else:
            merged = tf.reshape(merged, [batch, length, heads + 2 * kv_heads, attention.head_dim])
            merged = tf.transpose(merged, [0, 2, 1, 3])
        if attention.rotary is None or attention.query_norm is not None:
            query, key, value = tf.split(merged, [heads, kv_heads, kv_heads], axis=1)
            query, key = self._norm(attention.query_norm, query), self._norm(attention.key_norm, key)
            if attention.rotary is not None:
                cos, sin = _angles(attention.rotary, positions, self.dtype)
                query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
            return query, key, value
        rotated, value = tf.split(merged, [heads + kv_heads, kv_heads], axis=1)  # queries and keys turn together
        cos, sin = _angles(attention.rotary, positions, self.dtype)
        query, key = tf.split(_rotate(rotated, cos, sin), [heads, kv_heads], axis=1)
        return query, key, value

    def _attend(self, query, key, value, mask, scale: float, soft_cap: float | None = None) -> tf.Tensor:
        """Attention with grouped heads.

        query [batch, heads, queries, head_dim]; key, value [batch, kv_heads, keys, head_dim]; mask float32, broadcast
        to [batch, heads, queries, keys] and added to the scores -> [batch * queries, heads * head_dim].
        """
        heads, head_dim, kv_heads = query.shape[1], query.shape[3], key.shape[1]
        batch, queries, keys = tf.shape(query)[0], tf.shape(query)[2], tf.shape(key)[2]
        single = query.shape[2] == 1
        if scale != 1.0:
            query *= tf.cast(scale, query.dtype)
        query = tf.cast(query, key.dtype)
        if heads != kv_heads:
            query = tf.reshape(query, [batch, kv_heads, (heads // kv_heads) * queries, head_dim])
        product = _one_row_each if single and heads == kv_heads and key.dtype == tf.float32 else tf.matmul
        scores = tf.cast(product(query, key, transpose_b=True), tf.float32)
        if heads != kv_heads:
            scores = tf.reshape(scores, [batch, heads, queries, keys])
        if soft_cap is not None:
            scores = soft_cap * tf.tanh(scores / soft_cap)
        scores += mask
        weights = self._function(_softmax, scores) if single else tf.nn.softmax(scores)
        weights = tf.cast(weights, value.dtype)
        if heads != kv_heads:
            weights = tf.reshape(weights, [batch, kv_heads, (heads // kv_heads) * queries, keys])
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
            size = -(-length // _PARTS)
            found = []
            for part in range(_PARTS):
                # Too few positions for all parts leave the last ones empty.
                start, end = tf.minimum(part * size, length), tf.minimum((part + 1) * size, length)
                seen, last = slice(None, end), part == _PARTS - 1
                keys, values = (key, value) if last else (key[:, :, seen], value[:, :, seen])
                some = self._attend(query[:, :, start:end], keys, values, mask[..., start:end, seen], scale, soft_cap)
                found.append(tf.reshape(some, [batch, end - start, features]))
            return tf.reshape(tf.concat(found, axis=1), [-1, features])

        return tf.cond(length < _LONG, whole, by_parts)

    def _after_attention(self, block: specs.Block, x: tf.Tensor, attended: tf.Tensor) -> tf.Tensor:
        """Output projection, the norm that may follow it, and the residual. attended [rows, heads * head_dim]."""
        attended = self._linear(block.attention.output, attended)
        x = x + self._norm(block.post_attention_norm, attended)
        return x if block.normalize_first else self._norm(block.attention_norm, x)

    def _cross(self, block: specs.Block, x: tf.Tensor, context: Context | None, index: int, queries) -> tf.Tensor:
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
            mask = tf.where(seen, 0.0, _MASKED)[..., tf.newaxis, :, :]
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

    def _function(self, function, *tensors, **chosen):
        """`function(*tensors, **chosen)` as a call of a function that every signature shares.

        A SavedModel then holds each of these large pieces once, however many signatures and loops read it: it is
        smaller and loaded sooner. TensorFlow puts the pieces back in line when it prepares to run a signature.
        """
        specs = tf.nest.map_structure(lambda t, shape: tf.TensorSpec(shape, t.dtype), tensors, loose(tensors))
        # What is traced with other kernels for its products is another function.
        key = (function.__name__, self._products is self.kernels, *tf.nest.flatten(specs), *chosen.items())
        if key not in self._shared:

            def shared(*tensors):
                return function(*tensors, **chosen)

            shared.__name__ = function.__name__.strip("_")
            traced = tf.function(shared, input_signature=specs, autograph=False)
            self._shared[key] = traced.get_concrete_function()  # one, inside and outside of saving
        return self._shared[key](*tensors)

    # Whole sequences -------------------------------------------------------------------------------------------------

    def encode(self, ids: tf.Tensor, padding_mask: tf.Tensor) -> Context:
        """The encoder, and what each decoder block attends to. ids int32, padding_mask bool[sources, length]."""
        return Context(*self._function(self._encode, ids, padding_mask))

    def _encode(self, ids, padding_mask):
        stack: Any = self._encoder
        batch, length = tf.shape(ids)[0], tf.shape(ids)[1]
        positions = tf.range(length)
        x = self._embed(stack, tf.reshape(ids, [-1]), tf.tile(positions, [batch]))
        padding = tf.where(padding_mask, 0.0, _MASKED)[:, tf.newaxis, tf.newaxis, :]
        bias = self._relative_bias(stack, positions[:, tf.newaxis] - positions)
        mask = padding if bias is None else padding + bias
        for block in stack.blocks:
            n = self._norm(block.attention_norm, x) if block.normalize_first else x
            query, key, value = self._query_key_value(block.attention, n, batch, length, positions)
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

    def prefill(self, ids: tf.Tensor, lengths: tf.Tensor, context: Context | None = None):
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

    def hidden_states(self, ids: tf.Tensor, context: Context | None = None) -> tf.Tensor:
        """ids int32[batch, length] -> [batch * length, width], every position's input to the head."""
        return self._sequence(ids, None, context)[0]

    def _sequence(self, ids, last, context):
        stack = self._decoder
        batch, length = tf.shape(ids)[0], tf.shape(ids)[1]
        positions = tf.range(length)
        x = self._embed(stack, tf.reshape(ids, [-1]), tf.tile(positions, [batch]))
        masks = self._masks(stack, positions, length)
        keys, values = [], []
        for index, block in enumerate(stack.blocks):
            n = self._norm(block.attention_norm, x) if block.normalize_first else x
            query, key, value = self._query_key_value(block.attention, n, batch, length, positions)
            keys.append(key)
            values.append(value)
            queries, attend = length, functools.partial(self._function, self._attend_causally)
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

    def step(self, ids, positions, caches: list[tf.Tensor], capacity, context: Context | None = None, beams=1):
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
        masks = self._masks(stack, column, capacity)
        targets = {}
        caches = list(caches)
        for index, block in enumerate(stack.blocks):
            attention = block.attention
            kv_heads, head_dim = attention.kv_heads, attention.head_dim
            if kv_heads not in targets:
                starts = tf.range(rows * kv_heads) * capacity
                targets[kv_heads] = starts + tf.repeat(positions, kv_heads)
            n = self._norm(block.attention_norm, x) if block.normalize_first else x
            query, key, value = self._query_key_value(attention, n, rows, 1, column)
            for which, new in ((2 * index, key), (2 * index + 1, value)):
                caches[which] = tf.raw_ops.InplaceUpdate(
                    x=caches[which],
                    i=targets[kv_heads],
                    v=tf.cast(tf.reshape(new, [-1, head_dim]), caches[which].dtype),
                )
            key = tf.reshape(caches[2 * index], [rows, kv_heads, capacity, head_dim])
            value = tf.reshape(caches[2 * index + 1], [rows, kv_heads, capacity, head_dim])
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


@dataclasses.dataclass
class Context:
    """What a decoder attends to: for each block keys and values [sources, heads, length, head_dim].

    mask: float32[sources, 1, 1, length], added to the scores.
    """

    keys: list[tf.Tensor]
    values: list[tf.Tensor]
    mask: tf.Tensor

    def gather(self, rows: tf.Tensor) -> Context:
        return Context(
            [tf.gather(key, rows) for key in self.keys],
            [tf.gather(value, rows) for value in self.values],
            tf.gather(self.mask, rows),
        )


class _Vectors:
    """All biases, or all that norms are scaled and moved by, of a stack: one variable.

    A step reads a hundred of them. As variables they would be a hundred inputs of every function on the way there: the
    SavedModel of a GPT-2 took twice as long to load.
    """

    def __init__(self, dtype: tf.DType):
        self._dtype = dtype
        self._values: list[np.ndarray] = []
        self._graph: tf.Graph | None = None  # where they were read last, and as what
        self._parts: list[tf.Tensor] = []

    def add(self, value: np.ndarray) -> _Vector:
        self._values.append(value)
        return _Vector(self, len(self._values) - 1)

    def joined(self, name: str) -> list[tf.Variable]:
        """Makes the variable; none where there is no vector."""
        self._sizes = [value.size for value in self._values]
        if not self._values:
            return []
        self._variable = tf.Variable(tf.cast(np.concatenate(self._values), self._dtype), trainable=False, name=name)
        self._values = []
        return [self._variable]

    def read(self, index: int) -> tf.Tensor:
        if tf.executing_eagerly():
            start = sum(self._sizes[:index])
            return self._variable[start : start + self._sizes[index]]
        graph = tf.compat.v1.get_default_graph()
        if self._graph is not graph:
            self._graph, self._parts = graph, tf.split(self._variable, self._sizes)
        return self._parts[index]


@dataclasses.dataclass
class _Vector:
    """One of several vectors in a variable."""

    vectors: _Vectors
    index: int


def _read(vector: Any) -> tf.Tensor | None:
    """A bias, scale or offset of a held stack."""
    return None if vector is None else vector.vectors.read(vector.index)


def to_parts(context: Context | None) -> list[tf.Tensor]:
    """A context as loop variables."""
    return [] if context is None else [*context.keys, *context.values, context.mask]


def to_context(parts: list[tf.Tensor]) -> Context | None:
    if not parts:
        return None
    count = len(parts) // 2
    return Context(list(parts[:count]), list(parts[count:-1]), parts[-1])


def loose(variables):
    """Shape invariants that let rows and room change: only the last axis of floating-point tensors stays known."""

    def loosen(tensor):
        tensor = tf.convert_to_tensor(tensor)
        shape = [None] * tensor.shape.rank
        if tensor.dtype.is_floating and tensor.shape.rank and tensor.shape[-1] and tensor.shape.rank in (2, 4):
            shape[-1] = tensor.shape[-1]
            if tensor.shape.rank == 4 and tensor.shape[1]:
                shape[1] = tensor.shape[1]
        return tf.TensorShape(shape)

    return tf.nest.map_structure(loosen, variables)


def _one_row_each(x: tf.Tensor, y: tf.Tensor, transpose_b: bool = False) -> tf.Tensor:
    """x [.., 1, k] @ y [.., k, n], not by oneDNN, which rearranges every y first.

    TensorFlow gives it BatchMatMulV2 and not BatchMatMulV3. With 12 heads of 64 channels and 128 positions the two
    products of an attention took, with and without it, 73 and 115 µs for 1 row, 461 and 899 µs for 32.
    """
    return tf.raw_ops.BatchMatMulV3(x=x, y=y, Tout=x.dtype, adj_y=transpose_b)


def _softmax(scores: tf.Tensor) -> tf.Tensor:
    """Over the last axis. For few scores by ops that oneDNN does not prepare: 40 µs less for 1,536."""
    few = tf.size(scores) < 1 << 13
    return tf.cond(few, lambda: tf.exp(tf.nn.log_softmax(scores)), lambda: tf.nn.softmax(scores))


def allocate(keys: list[tf.Tensor], values: list[tf.Tensor], capacity) -> list[tf.Tensor]:
    """Caches of `capacity` positions that begin with `keys` and `values` ([rows, kv_heads, length, head_dim] each)."""
    room = capacity - tf.shape(keys[0])[2]  # all have one length
    return [_grow(part, room) for pair in zip(keys, values) for part in pair]


def regrow(cache: tf.Tensor, shape: tuple[int, int], capacity, wider, rows: tf.Tensor | None = None) -> tf.Tensor:
    """A fresh cache with `wider` positions, of the given rows (int32[kept]) or of all. shape: (kv_heads, head_dim)."""
    cache = tf.reshape(cache, [-1, shape[0], capacity, shape[1]])
    return _grow(cache if rows is None else tf.gather(cache, rows), wider - capacity)


def _grow(cache: tf.Tensor, room) -> tf.Tensor:
    head_dim = cache.shape[3]
    return tf.reshape(tf.pad(cache, [[0, 0], [0, 0], [0, room], [0, 0]]), [-1, head_dim])


def _folded(attention: specs.Attention) -> specs.Attention:
    """The scale of the scores inside the query weights, where that changes no bit: where it is a power of two."""
    scale = attention.scale
    if scale == 1.0 or math.frexp(scale)[0] != 0.5:
        return attention
    norm, linear = attention.query_norm, attention.query_key_value
    if norm is not None:
        norm = dataclasses.replace(norm, scale=norm.scale * scale)
    else:
        factors = np.ones(linear.kernel.shape[1], np.float32)
        factors[: attention.heads * attention.head_dim] = scale
        bias = None if linear.bias is None else linear.bias * factors
        linear = specs.Linear(linear.kernel * factors, bias)
    return dataclasses.replace(attention, scale=1.0, query_norm=norm, query_key_value=linear)


def relative_bucket(relative_position: tf.Tensor, buckets: int, max_distance: int, bidirectional: bool) -> tf.Tensor:
    """T5's bucket of key position minus query position: exact while near, logarithmic further away, int32."""
    bucket = tf.zeros_like(relative_position)
    if bidirectional:
        buckets //= 2
        bucket += tf.cast(relative_position > 0, tf.int32) * buckets
        distance = tf.abs(relative_position)
    else:
        distance = tf.maximum(-relative_position, 0)
    exact = buckets // 2
    scaled = tf.math.log(tf.cast(tf.maximum(distance, 1), tf.float32) / exact) / math.log(max_distance / exact)
    far = tf.minimum(exact + tf.cast(scaled * (buckets - exact), tf.int32), buckets - 1)
    return bucket + tf.where(distance < exact, distance, far)


def _angles(rotary: specs.Rotary, positions: tf.Tensor, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """cos and sin: positions int32[length] -> [length, head_dim / 2]; int32[rows, 1] -> [rows, 1, 1, head_dim / 2]."""
    angles = tf.cast(positions, tf.float32)[..., tf.newaxis] * tf.constant(rotary.inverse_frequencies)
    if positions.shape.rank == 2:
        angles = angles[:, tf.newaxis]
    return tf.cast(tf.cos(angles) * rotary.magnitude, dtype), tf.cast(tf.sin(angles) * rotary.magnitude, dtype)


def _rotate(x: tf.Tensor, cos: tf.Tensor, sin: tf.Tensor) -> tf.Tensor:
    """Turns the pairs (first half, second half) of the last axis."""
    first, second = tf.split(x, 2, axis=-1)
    return tf.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)

"""What the blocks of a network are made of, computed by one choice of kernels. Stock ops only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfvllm.families import spec as specs
from tfvllm.generation.attention import LONG, PARTS, Turns, one_row_each, softmax
from tfvllm.generation.cache import EncoderOutput
from tfvllm.generation.experts import each_for_its_own, route
from tfvllm.generation.kernels import Portable, activate
from tfvllm.generation.shared import SharedFunctions
from tfvllm.generation.weights import read_vector

_FEW_ROWS = Portable()


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of blocks whose weights are held.

    Attributes:
        dtype: of activations.
        kernels: what multiplies and norms.
        shared: functions traced before.
        stepping: whether what comes is one token of each row.
    """

    dtype: tf.DType
    kernels: Portable
    shared: SharedFunctions
    stepping: bool = False

    def call(self, function, *tensors, inline: bool = True, **chosen):
        """`function(*tensors, **chosen)` as a call of a function that is shared by all that has the same kernels."""
        return self.shared(function, *tensors, key=self.kernels, inline=inline, **chosen)

    def norm(self, norm: specs.Norm | None, x: tf.Tensor) -> tf.Tensor:
        if norm is None:
            return x
        if norm.kind == "rms":
            return self.kernels.rms_norm(x, read_vector(norm.scale), norm.epsilon)
        # A fused norm is prepared anew at each call: for the few rows of a step that takes longer than the norm.
        kernels = _FEW_ROWS if self.stepping else self.kernels
        return kernels.layer_norm(x, read_vector(norm.scale), read_vector(norm.offset), norm.epsilon)

    def linear(self, linear: specs.Linear, x: tf.Tensor, activation: str = "linear") -> tf.Tensor:
        return self.kernels.linear(x, linear.kernel, read_vector(linear.bias), activation)

    def feed_forward(self, block: specs.Block, x: tf.Tensor, entered: tf.Tensor) -> tf.Tensor:
        """x: after attention; entered: what the block was given. Both [rows, width]."""
        residual, ffn = x, block.feed_forward
        x = entered if block.parallel else x
        if block.normalize_first:
            x = self.norm(block.feed_forward_norm, x)
        x = self.experts(ffn, x) if isinstance(ffn, specs.Experts) else self.transform(ffn, x)
        x = residual + self.norm(block.post_feed_forward_norm, x)
        return x if block.normalize_first else self.norm(block.feed_forward_norm, x)

    def leave(self, block: specs.Block, x: tf.Tensor, token_inputs: tf.Tensor | None, index: int) -> tf.Tensor:
        """The end of block `index`. x [rows, width] after its feed-forward; token_inputs [rows, blocks, inner]."""
        gate = block.token_gate
        if gate is not None:
            assert token_inputs is not None, "a block with a token gate needs the stack's token inputs"
            gated = self.linear(gate.gate, x, gate.activation) * token_inputs[:, index]
            x += self.norm(gate.norm, self.linear(gate.output, gated))
        return x if block.output_scale == 1.0 else x * tf.cast(block.output_scale, x.dtype)

    def transform(self, ffn: specs.FeedForward, x: tf.Tensor) -> tf.Tensor:
        """[rows, width] -> the same."""
        if ffn.gated:
            gate, up = tf.split(self.linear(ffn.up, x), 2, axis=-1)
            x = activate(gate, ffn.activation) * up
        else:
            x = self.linear(ffn.up, x, ffn.activation)
        return self.linear(ffn.output, x)

    def experts(self, experts: specs.Experts, x: tf.Tensor) -> tf.Tensor:
        """[rows, width] -> the same."""
        weights, chosen = route(self.linear(experts.router, x), experts.top, experts.normalized)
        names = ("up", "output", "up_bias", "output_bias")
        # Read once; one expert's part of what was read is no copy.
        read = {name: tf.convert_to_tensor(v) for name in names if (v := getattr(experts, name)) is not None}

        def product(x, name: str, expert):
            y = tf.matmul(x, read[name][expert])
            return y if f"{name}_bias" not in read else y + read[f"{name}_bias"][expert]

        def compute(expert, x):
            gate, up = tf.split(product(x, "up", expert), 2, axis=-1)
            if (limit := experts.limit) is not None:
                gate, up = tf.minimum(gate, limit), tf.clip_by_value(up, -limit, limit) + 1
            return product(activate(gate, experts.activation) * up, "output", expert)

        found = each_for_its_own(x, chosen, compute)
        y = tf.reduce_sum(found * tf.cast(weights, x.dtype)[:, :, tf.newaxis], axis=1)
        if experts.shared is None:
            return y
        shared = self.transform(experts.shared, x)
        return y + (shared if experts.shared_gate is None else shared * tf.sigmoid(self.linear(experts.shared_gate, x)))

    def query_key_value(self, attention: specs.Attention, x, turns: Turns, shape: Callable[[int, int], Any] | None):
        """x [batch * length, width] -> three [batch, heads, length, head_dim]; keys and values None where `shared`.

        `shape(heads, head_dim)` is [batch, length, heads, head_dim]; None: a step, whose length is 1.
        """
        heads, kv_heads, parts = attention.heads, attention.kv_heads, attention.parts
        merged = self.linear(attention.query_key_value, x)
        if shape is None:  # heads are already where they belong
            merged = tf.reshape(merged, [-1, sum(parts), 1, attention.head_dim])
        else:
            merged = tf.reshape(merged, shape(sum(parts), attention.head_dim))
            merged = tf.transpose(merged, [0, 2, 1, 3])
        if attention.shared is not None:
            query = self.norm(attention.query_norm, merged)
            return query if attention.rotary is None else turns.turn(attention.rotary, query), None, None
        norms = (attention.query_norm, attention.key_norm, attention.value_norm)
        if attention.rotary is None or attention.values_are_keys or any(norm is not None for norm in norms):
            query, key, *others = tf.split(merged, parts, axis=1)
            value = self.norm(attention.value_norm, others[0] if others else key)
            query, key = self.norm(attention.query_norm, query), self.norm(attention.key_norm, key)
            if attention.rotary is not None:
                query, key = turns.turn(attention.rotary, query), turns.turn(attention.rotary, key)
            return query, key, value
        rotated, value = tf.split(merged, [heads + kv_heads, kv_heads], axis=1)  # queries and keys turn together
        query, key = tf.split(turns.turn(attention.rotary, rotated), [heads, kv_heads], axis=1)
        return query, key, value

    def attend(
        self, query, key, value, mask, sinks: tuple = (), *, scale: float, soft_cap: float | None = None
    ) -> tf.Tensor:
        """Attention with grouped heads. `sinks`: nothing, or [heads]: a score more in each softmax, without a value.

        query [batch, heads, queries, head_dim]; key, value [batch, kv_heads, keys, head_dim]; mask float32, broadcast
        to [batch, heads, queries, keys] and added to the scores -> [batch * queries, heads * head_dim].
        """
        heads, head_dim, kv_heads = query.shape[1], query.shape[3], key.shape[1]
        single, grouped = query.shape[2] == 1, heads != kv_heads
        if not single:
            batch, queries = tf.shape(query)[0], tf.shape(query)[2]
        # The heads of a group stand where its queries do. A mask that is one for all heads fits them as they stand.
        apart = grouped and not (single and mask.shape[-3] == 1 and not sinks)
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
        if sinks:
            column = tf.cast(tf.reshape(sinks[0], [heads, 1, 1]), tf.float32)
            scores = tf.concat([scores, tf.broadcast_to(column, [*tf.unstack(tf.shape(scores))[:3], 1])], axis=-1)
        weights = self.call(softmax, scores) if single else tf.nn.softmax(scores)
        weights = tf.cast(weights[..., :-1] if sinks else weights, value.dtype)
        if apart:
            weights = tf.reshape(weights, grouped_shape)
        attended = tf.cast(product(weights, value), self.dtype)
        if single:  # one query each: the heads already lie side by side
            return tf.reshape(attended, [-1, heads * head_dim])
        attended = tf.reshape(attended, [batch, heads, queries, head_dim])
        return tf.reshape(tf.transpose(attended, [0, 2, 1, 3]), [-1, heads * head_dim])

    def attend_causally(self, query, key, value, mask, sinks: tuple = (), **scores) -> tf.Tensor:
        """`attend` of as many queries as keys, none of which sees a later key.

        The queries of a long sequence come in parts, and each part meets the keys up to its own end only: 5/8 of the
        work on scores are left.
        """
        tensors = (query, key, value, mask, sinks)
        return tf.cond(
            tf.shape(query)[2] < LONG,
            lambda: self.attend(*tensors, **scores),
            # Out of line: beside a long prompt the call is nothing, and short ones do not pay for it.
            lambda: self.call(self.attend_by_parts, *tensors, inline=False, **scores),
        )

    def attend_by_parts(self, query, key, value, mask, sinks: tuple = (), **scores) -> tf.Tensor:
        batch, length = tf.shape(query)[0], tf.shape(query)[2]
        features = query.shape[1] * query.shape[3]
        size = -(-length // PARTS)
        found = []
        for part in range(PARTS):
            # Too few positions for all parts leave the last ones empty.
            start, end = tf.minimum(part * size, length), tf.minimum((part + 1) * size, length)
            seen, last = slice(None, end), part == PARTS - 1
            keys, values = (key, value) if last else (key[:, :, seen], value[:, :, seen])
            some = self.attend(query[:, :, start:end], keys, values, mask[..., start:end, seen], sinks, **scores)
            found.append(tf.reshape(some, [batch, end - start, features]))
        return tf.reshape(tf.concat(found, axis=1), [-1, features])

    def attend_to_both(
        self,
        *own: tf.Tensor,
        context: EncoderOutput | None,
        index: int,
        beams: int = 1,
        scale: float,
        soft_cap: float | None = None,
    ) -> tf.Tensor:
        """Attention of block `index` to its own keys and to the encoder's, in one softmax.

        own: query, key, value, mask as for `attend`, of sources * beams rows. The answer as there.
        """
        assert context is not None, "a decoder with merged attention needs what `encode` returned"
        query, key, value, mask = own
        heads, head_dim, kv_heads = query.shape[1], query.shape[3], key.shape[1]
        rows, queries = tf.shape(query)[0], tf.shape(query)[2]
        group = (heads // kv_heads) * queries
        query = tf.reshape(query * tf.cast(scale, query.dtype), [rows, kv_heads, group, head_dim])

        def of_sources(x):  # [rows, kv_heads, group, n] -> [sources, kv_heads, beams * group, n]
            x = tf.reshape(x, [-1, beams, kv_heads, group, tf.shape(x)[3]])
            return tf.reshape(tf.transpose(x, [0, 2, 1, 3, 4]), [-1, kv_heads, beams * group, tf.shape(x)[4]])

        def of_rows(x):
            x = tf.reshape(x, [-1, kv_heads, beams, group, tf.shape(x)[3]])
            return tf.reshape(tf.transpose(x, [0, 2, 1, 3, 4]), [rows, kv_heads, group, tf.shape(x)[4]])

        def scores(query, key, mask, placed=lambda x: x):
            found = tf.cast(tf.matmul(tf.cast(query, key.dtype), key, transpose_b=True), tf.float32)
            found = tf.reshape(placed(found), [rows, heads, queries, tf.shape(key)[2]])
            return (found if soft_cap is None else soft_cap * tf.tanh(found / soft_cap)) + mask

        others = context.keys[index], context.values[index]
        beside = scores(of_sources(query), others[0], tf.repeat(context.mask, beams, axis=0), of_rows)
        weights = tf.nn.softmax(tf.concat([scores(query, key, mask), beside], axis=-1))
        weights = tf.reshape(weights, [rows, kv_heads, group, tf.shape(weights)[3]])
        to_own, to_others = tf.split(weights, [tf.shape(key)[2], tf.shape(others[0])[2]], axis=-1)
        attended = tf.cast(tf.matmul(tf.cast(to_own, value.dtype), value), self.dtype)
        attended += tf.cast(of_rows(tf.matmul(tf.cast(of_sources(to_others), others[1].dtype), others[1])), self.dtype)
        attended = tf.transpose(tf.reshape(attended, [rows, heads, queries, head_dim]), [0, 2, 1, 3])
        return tf.reshape(attended, [-1, heads * head_dim])

    def sinks(self, attention: specs.Attention) -> tuple:
        """What `attend` takes as `sinks`."""
        return () if attention.sinks is None else (read_vector(attention.sinks),)

    def after_attention(self, block: specs.Block, x: tf.Tensor, attended: tf.Tensor) -> tf.Tensor:
        """Output projection, the norm that may follow it, and the residual. attended [rows, heads * head_dim]."""
        attended = self.linear(block.attention.output, attended)
        x = x + self.norm(block.post_attention_norm, attended)
        return x if block.normalize_first else self.norm(block.attention_norm, x)

    def cross(self, block: specs.Block, x: tf.Tensor, context: EncoderOutput | None, index: int, queries) -> tf.Tensor:
        """Attention to the encoder. x [sources * queries, width]: several queries of one source share its keys."""
        cross = block.cross_attention
        if cross is None:
            return x
        assert context is not None, "a decoder with cross-attention needs what `encode` returned"
        residual = x
        if block.normalize_first:
            x = self.norm(block.cross_norm, x)
        query = tf.reshape(self.linear(cross.query, x), [-1, queries, cross.heads, cross.head_dim])
        query = tf.transpose(query, [0, 2, 1, 3])
        tensors = (query, context.keys[index], context.values[index], context.mask)
        attended = self.attend(*tensors, scale=cross.scale, soft_cap=cross.soft_cap)
        x = residual + self.norm(block.post_cross_norm, self.linear(cross.output, attended))
        return x if block.normalize_first else self.norm(block.cross_norm, x)

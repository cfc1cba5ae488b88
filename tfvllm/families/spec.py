"""What a decoder is made of, said once for all families: plain numbers and arrays, no TensorFlow, no Keras.

A family reader (`tfvllm.families.registry`) fills these classes from a keras-nlp model; `tfvllm.generation.network`
computes with them. Kernels are always two-dimensional, [inputs, outputs]; heads lie beside each other in the columns.
"""

from __future__ import annotations

import dataclasses

import numpy as np

Array = np.ndarray


@dataclasses.dataclass
class Linear:
    """`y = x @ kernel + bias`. kernel float32[inputs, outputs], bias float32[outputs] or None."""

    kernel: Array
    bias: Array | None = None


@dataclasses.dataclass
class Norm:
    """Layer normalisation (`kind="layer"`) or root-mean-square normalisation (`kind="rms"`) over the last axis."""

    kind: str
    scale: Array
    offset: Array | None
    epsilon: float


@dataclasses.dataclass
class Rotary:
    """Rotary position embedding of the two halves of a head (Su et al. 2021): angle = position * frequency.

    A frequency of 0 leaves its two channels as they are. Where a family rotates a part of every head only, its reader
    puts the channels of queries and keys in that order.
    """

    inverse_frequencies: Array  # float32[head_dim / 2]
    magnitude: float = 1.0  # cos and sin are multiplied by this (YaRN)


@dataclasses.dataclass
class RelativeBias:
    """T5's bucketed relative position bias (Raffel et al. 2020, section 2.1)."""

    table: Array  # float32[buckets, heads]
    bidirectional: bool
    max_distance: int


@dataclasses.dataclass
class Attention:
    """Self-attention with grouped keys and values: `heads` query heads share `kv_heads` key and value heads."""

    heads: int
    kv_heads: int
    head_dim: int
    query_key_value: Linear  # [width, sum(parts) * head_dim]: one product instead of three
    output: Linear  # [heads * head_dim, width]
    scale: float  # multiplies q·k
    window: int | None = None  # a query sees the last `window` positions, itself included
    soft_cap: float | None = None  # scores = soft_cap * tanh(scores / soft_cap)
    query_norm: Norm | None = None  # over head_dim, before the rotation
    key_norm: Norm | None = None
    value_norm: Norm | None = None
    rotary: Rotary | None = None
    sinks: Array | None = None  # float32[heads], a logit beside every head's scores that no value belongs to (GPT-OSS)
    alibi: tuple[float, ...] | None = None  # a slope for each head: scores -= slope * distance (Press et al. 2022)
    shared: int | None = None  # the earlier block whose keys and values it attends to; its kernel has queries only
    values_are_keys: bool = False  # values have no kernel: they are the keys before norm and rotation (Gemma 4)
    around: tuple[int, int] | None = None  # in an encoder: how many positions before and after itself a query sees
    merged: bool = False  # in a decoder: also to the encoder's output, in one softmax, by the same kernel (T5Gemma 2)

    @property
    def parts(self) -> tuple[int, ...]:
        """How many heads of queries, keys and values stand in `query_key_value`."""
        if self.shared is not None:
            return (self.heads,)
        return (self.heads, self.kv_heads, *(() if self.values_are_keys else (self.kv_heads,)))

    @property
    def masked_by(self) -> tuple[int | None, tuple[float, ...] | None]:
        """What its mask is made of: blocks that agree in it share one."""
        return self.window, self.alibi


@dataclasses.dataclass
class CrossAttention:
    """A decoder's attention to the encoder's output."""

    heads: int
    kv_heads: int
    head_dim: int
    query: Linear
    key_value: Linear  # [encoder width, 2 * kv_heads * head_dim]
    output: Linear
    scale: float
    soft_cap: float | None = None


@dataclasses.dataclass
class FeedForward:
    """`output(act(up(x)))`, or with a gate `output(act(gate(x)) * up(x))`; a gate lies left of `up` in one kernel."""

    up: Linear  # [width, inner], gated: [width, 2 * inner] = [gate | up]
    output: Linear
    activation: str  # relu, gelu, gelu_approximate, silu, swish_1702, tanh, linear
    gated: bool = False


@dataclasses.dataclass
class Experts:
    """Feed-forwards of which each token takes the `top` that a router rates highest (Shazeer et al. 2017), all gated.

    A token gets the sum of theirs, each times the router's softmax over all experts; `normalized`: over those chosen.
    """

    router: Linear  # [width, experts]
    up: Array  # float32[experts, width, 2 * inner] = [gate | up]
    output: Array  # float32[experts, inner, width]
    activation: str
    top: int
    normalized: bool
    up_bias: Array | None = None  # float32[experts, 2 * inner]
    output_bias: Array | None = None  # float32[experts, width]
    limit: float | None = None  # gates at most this, up within ±this, and then `up + 1` in its place (GPT-OSS)
    shared: FeedForward | None = None  # one more that every token takes, times sigmoid(shared_gate(x)) (Qwen)
    shared_gate: Linear | None = None  # [width, 1]


@dataclasses.dataclass
class TokenInputs:
    """What each token gives each block beside the residual stream (Gemma 3n and 4): of width `inner` for each.

    norm(projection(embedded token)) + table[token], reshaped to [blocks, inner]. Factors are in the weights.
    """

    table: Array  # float32[vocabulary, blocks * inner]
    projection: Linear  # [width, blocks * inner]
    norm: Norm  # over inner


@dataclasses.dataclass
class TokenGate:
    """After its feed-forward a block adds norm(output(act(gate(x)) * part)) of its part of `TokenInputs`."""

    gate: Linear  # [width, inner]
    output: Linear  # [inner, width]
    norm: Norm
    activation: str


@dataclasses.dataclass
class Block:
    """One transformer block. `normalize_first`: x + f(norm(x)); otherwise norm(x + f(x)).

    `parallel`: both halves read the block's input, x + attention(norm(x)) + feed_forward(norm(x)).
    """

    attention: Attention
    feed_forward: FeedForward | Experts
    normalize_first: bool
    attention_norm: Norm
    feed_forward_norm: Norm
    post_attention_norm: Norm | None = None  # on attention's output before it is added (Gemma 2 and 3)
    post_feed_forward_norm: Norm | None = None
    cross_attention: CrossAttention | None = None
    cross_norm: Norm | None = None
    post_cross_norm: Norm | None = None  # as after attention (T5Gemma)
    parallel: bool = False  # GPT-NeoX; with `normalize_first` and without cross-attention
    token_gate: TokenGate | None = None  # in a decoder whose stack has `token_inputs`
    output_scale: float = 1.0  # multiplies what leaves the block (Gemma 4's decoder)


@dataclasses.dataclass
class Stack:
    """Blocks with what stands before and after them."""

    blocks: list[Block]
    embedding: Array | None = None  # float32[vocabulary, width] of its own; None: the model's
    position_table: Array | None = None  # float32[max positions, width], learned
    embedding_scale: float = 1.0
    embedding_norm: Norm | None = None
    final_norm: Norm | None = None
    relative_bias: RelativeBias | None = None
    token_inputs: TokenInputs | None = None

    @property
    def caching(self) -> list[int]:
        """The blocks that have keys and values of their own."""
        return [index for index, block in enumerate(self.blocks) if block.attention.shared is None]

    @property
    def caches(self) -> list[int]:
        """For each block which of those of `caching` it attends to."""
        of_block = {index: place for place, index in enumerate(self.caching)}
        shared = [block.attention.shared for block in self.blocks]
        return [of_block[index if other is None else other] for index, other in enumerate(shared)]


@dataclasses.dataclass
class LanguageModel:
    """A decoder, with an encoder where the model is sequence to sequence, and its vocabulary."""

    family: str
    embedding: Array  # float32[vocabulary, width]
    decoder: Stack
    encoder: Stack | None = None
    head: Array | None = None  # float32[width, vocabulary]; None: tied to `embedding`
    head_scale: float = 1.0  # the hidden state is multiplied by this before the head (T5 with a tied head)
    logit_soft_cap: float | None = None

    @property
    def vocabulary_size(self) -> int:
        return self.embedding.shape[0]

    @property
    def width(self) -> int:
        return self.embedding.shape[1]

    @property
    def max_positions(self) -> int | None:
        """The most positions the decoder can number, or None where nothing limits them."""
        table = self.decoder.position_table
        return None if table is None else table.shape[0]

    def cache_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one row's caches take for one position."""
        held = [self.decoder.blocks[index].attention for index in self.decoder.caching]
        return sum(2 * attention.kv_heads * attention.head_dim * itemsize for attention in held)

    def parameters(self) -> int:
        """How many numbers the model holds; merged and tied weights count once."""
        return sum(array.size for array in _arrays(self))


def _arrays(value) -> list[Array]:
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, (list, tuple)):
        return [array for item in value for array in _arrays(item)]
    if dataclasses.is_dataclass(value):
        return [array for field in dataclasses.fields(value) for array in _arrays(getattr(value, field.name))]
    return []

"""What goes on inside a model while it runs: hidden states, attention maps, queries, keys and values of its blocks.

`run` computes a model once and reads all of that from the same forward pass. Blocks are those of the model's adapter
(`adapter_for`), so models of unlike families answer alike; layers of any other Keras model are read by name.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.families import Block, Projection, adapter_for
from tfvllm.families.matmuls import einsum_as_matmul
from tfvllm.families.taps import Hook, call_of, hooked

READABLE = ("hidden_states", "attention_maps", "relations")


@dataclass
class BlockOutputs:
    """What one block computed. Each entry is None unless it was asked for.

    Attributes:
        hidden_state: what the block hands on, [batch, length, width].
        attention_map: self-attention probabilities before dropout, [batch, heads, length, length].
        queries, keys, values: projections of the self-attention, before any rotary embedding, [batch, length, heads x
            head_dim] (keys and values: kv_heads x head_dim).
    """

    hidden_state: tf.Tensor | None = None
    attention_map: tf.Tensor | None = None
    queries: tf.Tensor | None = None
    keys: tf.Tensor | None = None
    values: tf.Tensor | None = None


@dataclass
class Outputs:
    """What a model returned and what was read on the way.

    Attributes:
        answer: the model's own output.
        blocks: by kind ("encoder", "decoder"), the blocks in order.
        layers: by name, the output of each layer that was asked for.
    """

    answer: Any
    blocks: dict[str, list[BlockOutputs]] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)


def run(
    model: keras.Model,
    inputs: Any,
    *,
    read: Iterable[str] = (),
    layers: Iterable[str] = (),
    training: bool | None = False,
) -> Outputs:
    """Computes `model(inputs)` once and returns its answer with what was read inside.

    Works eagerly, in a `tf.function`, under XLA and in the replicas of a distribution strategy; gradients flow through
    what is read. The model is left as it was.

    Args:
        model: a keras-nlp backbone or task for `read`, any Keras model for `layers`.
        inputs: what the model is called with.
        read: any of "hidden_states", "attention_maps", "relations" (queries, keys, values), for every block.
        layers: names or paths of layers, nested ones included, whose outputs to read.
        training: passed to the model.
    Raises:
        InputError: an unknown `read`, a model without an adapter, a layer that does not exist, or attention that does
            not compute its probabilities where they can be read.
    """
    read, layers = tuple(read), tuple(layers)
    unknown = sorted(set(read) - set(READABLE))
    if unknown:
        raise InputError(f"cannot read {unknown}; expected any of {list(READABLE)}.")
    outputs = Outputs(None)
    with contextlib.ExitStack() as taps:
        taps.enter_context(einsum_as_matmul(model))  # first: what is read is read of the product that takes the place
        if read:
            for block in adapter_for(model).blocks(model):
                found = BlockOutputs()
                outputs.blocks.setdefault(block.kind, []).append(found)
                for layer, method, hook in _block_hooks(block, found, read):
                    taps.enter_context(hooked(layer, method, hook))
        for name in layers:
            hook = functools.partial(_keep, outputs.layers, name)
            layer = find_layer(model, name)
            taps.enter_context(hooked(layer, call_of(layer), _after(hook)))
        outputs.answer = model(inputs, training=training)
    return outputs


def find_layer(model: keras.Model, name: str) -> keras.Layer:
    """The layer of this name or path inside `model`, however deeply nested.

    Raises:
        InputError: no layer has the name, or several have; the message lists what is valid.
    """
    inside = list(model._flatten_layers(include_self=False))
    found = [layer for layer in inside if name in (layer.name, layer.path)]
    found = list({id(layer): layer for layer in found}.values())
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{len(found)} layers of {model.name} are named {name!r}; give a path: {_paths(found)}.")
    raise InputError(f"{model.name} has no layer {name!r}; valid names are {_paths(inside)}.")


def _paths(layers: Iterable[keras.Layer], limit: int = 40) -> str:
    names = list(dict.fromkeys(layer.path or layer.name for layer in layers))
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


@dataclass
class _Turn:
    """Which calls of a block's layers are the block's own: other blocks may share the layers (ALBERT)."""

    block: Block
    found: BlockOutputs
    begun: int = 0
    running: bool = False

    def take(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A hook for the layer of the block."""
        self.running = self.begun % self.block.calls == self.block.call
        self.begun += 1
        if self.running:
            vars(self.found).update(vars(BlockOutputs()))
        try:
            return method(*args, **kwargs)
        finally:
            self.running = False

    def keep(self, name: str, tensor: tf.Tensor) -> None:
        """Of several calls the first: DeBERTa also projects its relative positions."""
        if self.running and getattr(self.found, name) is None:
            setattr(self.found, name, tensor)


def _block_hooks(block: Block, found: BlockOutputs, read: tuple[str, ...]) -> Iterator[tuple[Any, str, Hook]]:
    """(layer, method to tap, hook) for all that `read` asks of a block."""
    attention, turn = block.attention, _Turn(block, found)
    if "hidden_states" in read:
        yield block.layer, call_of(block.layer), _after(functools.partial(turn.keep, "hidden_state"))
    if "relations" in read:
        for name, projection in (("queries", attention.query), ("keys", attention.key), ("values", attention.value)):
            layer = projection.layer
            yield layer, call_of(layer), _after(functools.partial(_keep_flat, turn, name, projection))
    if "attention_maps" in read:
        if isinstance(attention.layer, keras.layers.MultiHeadAttention):
            yield attention.layer, "_compute_attention", functools.partial(_with_scores, turn)
        else:
            softmax = getattr(attention.layer, "_softmax", None) or getattr(attention.layer, "softmax", None)
            if not isinstance(softmax, keras.Layer):
                raise InputError(
                    f"{type(attention.layer).__name__} does not show its attention probabilities, so attention maps "
                    "cannot be read. Use tfvllm.losses.Relations, which needs queries, keys and values only."
                )
            yield softmax, call_of(softmax), _after(functools.partial(_keep_map, turn))
    yield block.layer, call_of(block.layer), turn.take  # last, and so around the others


def _after(keep: Callable[[Any], None]) -> Hook:
    """A hook that lets the method run and keeps (the first of) what it returns."""

    def hook(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        answer = method(*args, **kwargs)
        keep(answer[0] if isinstance(answer, tuple) else answer)
        return answer

    return hook


def _with_scores(turn: _Turn, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Has Keras compute attention in the open: its fused path keeps the probabilities to itself."""
    call = inspect.signature(method).bind(*args, **kwargs)
    call.arguments["return_attention_scores"] = True
    answer, scores = method(*call.args, **call.kwargs)
    turn.keep("attention_map", scores)
    return answer, scores


def _keep_flat(turn: _Turn, name: str, projection: Projection, tensor: tf.Tensor) -> None:
    """[batch, length, heads, head_dim] (or already flat) as [batch, length, heads x head_dim]."""
    if projection.parts > 1:
        tensor = tf.split(tensor, projection.parts, axis=-1)[projection.part]
    if tensor.shape.rank > 3:
        shape = tf.shape(tensor)
        width = 1
        for size in tensor.shape[2:]:
            width *= size
        tensor = tf.reshape(tensor, [shape[0], shape[1], width])
    turn.keep(name, tensor)


def _keep_map(turn: _Turn, tensor: tf.Tensor) -> None:
    """Grouped heads [batch, groups, heads in a group, length, length] as one axis of heads."""
    if tensor.shape.rank == 5:
        shape = tf.shape(tensor)
        tensor = tf.reshape(tensor, [shape[0], tensor.shape[1] * tensor.shape[2], shape[3], shape[4]])
    turn.keep("attention_map", tensor)


def _keep(store: dict[str, Any], name: str, tensor: Any) -> None:
    store[name] = tensor

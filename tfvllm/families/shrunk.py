"""Backbones and tasks whose blocks have sizes of their own: what the original classes cannot express in a config.

A shrunk class is its original class (`isinstance` holds) plus a `structure`: the sizes of every block. It is built by
the original constructor on placeholder sizes; then every block is given its own. The residual stream and the
functional graph stay those of the original.
"""

from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from tfvllm.families.base import Structure, structure_from

# For type checkers only: the mixins come before a Keras class that has these methods.
_Layer: Any = keras.layers.Layer if TYPE_CHECKING else object


class ShrunkBackbone(_Layer):
    """Mixin, first base of a shrunk backbone. `adapter` is set by the family's file."""

    adapter: Any = None

    def __init__(self, *, structure: dict[str, list[Any]], **config: Any):
        shapes = structure_from(structure)
        super().__init__(**self.adapter.skeleton_config(config, shapes))
        for kind, layers in self.adapter.stacks(self).items():
            depth = len(shapes[kind])
            if depth < len(layers):  # the original constructor makes both stacks equally deep
                for layer in layers[depth:]:
                    _empty(layer)
                setattr(self, f"{kind}_transformer_layers", layers[:depth])
        for block in self.adapter.blocks(self):
            if block.call:
                continue
            self.adapter.resize(block, shapes[block.kind][block.index])
        for name, value in self.adapter.summary(self, shapes).items():
            setattr(self, name, value)
        self._structure = {kind: [shape.to_dict() for shape in blocks] for kind, blocks in shapes.items()}
        _narrow_caches(self.adapter, self, shapes)

    @property
    def structure(self) -> dict[str, list[dict[str, Any]]]:
        """The sizes of every block, by stack; part of the config."""
        return {kind: [dict(shape) for shape in blocks] for kind, blocks in self._structure.items()}

    def get_config(self) -> dict[str, Any]:
        config = self.adapter.complete_config(super().get_config(), self)
        config["structure"] = self.structure
        return config


class Skipped:
    """Mixin for a block without weights that hands its input on: the surplus of the shorter of two stacks."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get("decoder_sequence", kwargs.get("hidden_states"))
        # T5's blocks also hand on the position bias.
        return (first, kwargs["position_bias"]) if "position_bias" in kwargs else first


_changed_classes: dict[tuple[type, type], type] = {}


def change_class(layer: Any, mixin: type) -> None:
    """Gives a built layer a subclass of its own class; Keras has read its call signature already."""
    cls = type(layer)
    if (mixin, cls) not in _changed_classes:
        _changed_classes[mixin, cls] = type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {})
    layer.__class__ = _changed_classes[mixin, cls]


def _empty(block: Any) -> None:
    """Takes all weights out of a block and lets it hand its input on."""
    locked = block._tracker.locked
    block._tracker.unlock()
    try:
        for name, value in list(vars(block).items()):
            if isinstance(value, keras.layers.Layer):
                block._tracker.untrack(value)
                object.__setattr__(block, name, None)
    finally:
        if locked:
            block._tracker.lock()
    change_class(block, Skipped)


class NarrowCache(_Layer):
    """Mixin for an attention layer with fewer key/value heads than the cache that keras-nlp hands to every layer.

    keras-nlp keeps one dense cache for all layers, so it is as wide as the widest layer; a narrower layer uses the
    first heads of its slice and hands the rest back untouched.
    """

    own_kv_heads: int

    def call(self, *args: Any, **kwargs: Any) -> Any:
        name = "self_attention_cache" if "self_attention_cache" in kwargs else "cache"  # SmolLM3's, and all others'
        cache, own = kwargs.pop(name, None), self.own_kv_heads
        if cache is None:
            return super().call(*args, **kwargs)
        if isinstance(cache, tuple):  # Gemma 3: (key, value), each [batch, length, kv_heads, head_dim]
            narrow = tuple(part[:, :, :own, :] for part in cache)
            outputs, updated = super().call(*args, **{name: narrow}, **kwargs)
            return outputs, tuple(
                ops.concatenate([new, old[:, :, own:, :]], axis=2) for new, old in zip(updated, cache)
            )
        result = super().call(*args, **{name: cache[..., :own, :]}, **kwargs)
        *outputs, updated = result
        updated = ops.concatenate([updated, cache[..., own:, :]], axis=-2)
        return (*outputs, updated)


def _narrow_caches(adapter: Any, backbone: Any, shapes: Structure) -> None:
    for kind, layers in (("self", "attention"), ("cross", "cross_attention")):
        found = [getattr(b, layers) for b in adapter.blocks(backbone) if b.kind == "decoder" and getattr(b, layers)]
        widest = max((a.kv_heads for a in found), default=0)
        if kind == "cross" and found:  # keras-nlp sizes both caches by one number of heads
            widest = max(widest, *(a.kv_heads for a in map(lambda b: b.attention, _decoders(adapter, backbone))))
        if kind == "self" and found:
            crosses = [b.cross_attention for b in _decoders(adapter, backbone) if b.cross_attention]
            widest = max([widest, *(a.kv_heads for a in crosses)])
        for attention in found:
            if attention.kv_heads < widest:
                change_class(attention.layer, NarrowCache)
                attention.layer.own_kv_heads = attention.kv_heads


def _decoders(adapter: Any, backbone: Any) -> list[Any]:
    return [b for b in adapter.blocks(backbone) if b.kind == "decoder"]


def cache_heads(backbone: Any) -> tuple[int, int]:
    """(heads, head_dim) of the dense key/value cache keras-nlp keeps for the decoder of `backbone`."""
    decoders = _decoders(backbone.adapter, backbone)
    crosses = [b.cross_attention.kv_heads for b in decoders if b.cross_attention]
    return max([*(b.kv_heads for b in decoders), *crosses]), decoders[0].head_dim


class ShrunkCausalLM:
    """Mixin for causal LMs: the cache's sizes are read from the blocks, not computed from the width."""

    backbone: Any
    compute_dtype: Any
    call_with_cache: Any

    def _build_cache(self, token_ids: Any) -> Any:
        heads, head_dim = cache_heads(self.backbone)
        batch, length = ops.shape(token_ids)[0], ops.shape(token_ids)[1]
        shape = [batch, self.backbone.num_layers, 2, length, heads, head_dim]
        cache = ops.zeros(shape, dtype=self.compute_dtype)
        start = ops.convert_to_tensor(0, dtype="int32")  # SmolLM3 takes no number here
        _, hidden_states, cache = self.call_with_cache(token_ids, cache, start)
        return hidden_states, cache


class ShrunkSeq2SeqLM:
    """Mixin for sequence-to-sequence LMs, as `ShrunkCausalLM`."""

    backbone: Any
    compute_dtype: Any

    def _initialize_cache(self, encoder_token_ids: Any, decoder_token_ids: Any) -> Any:
        heads, head_dim = cache_heads(self.backbone)
        batch = ops.shape(encoder_token_ids)[0]
        caches = []
        for length in (ops.shape(decoder_token_ids)[1], ops.shape(encoder_token_ids)[1]):
            shape = [batch, len(self.backbone.decoder_transformer_layers), 2, length, heads, head_dim]
            caches.append(ops.zeros(shape, dtype=self.compute_dtype))
        return tuple(caches)


def register(cls: type) -> type:
    return keras.saving.register_keras_serializable(package="tfvllm")(cls)

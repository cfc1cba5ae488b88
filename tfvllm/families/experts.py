"""Mixtures of experts: Mixtral, Qwen-MoE, Qwen3-MoE and GPT-OSS. Llama's blocks with several feed-forwards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
from keras import ops
from keras_hub.models import (
    GptOssBackbone,
    GptOssCausalLM,
    MixtralBackbone,
    MixtralCausalLM,
    Qwen3MoeBackbone,
    Qwen3MoeCausalLM,
    QwenMoeBackbone,
    QwenMoeCausalLM,
)

from tfvllm.families import experts_decoding
from tfvllm.families.base import (
    EXPERTS,
    FFN,
    HEADS,
    Axes,
    Axis,
    BareWeight,
    Block,
    BlockShape,
    Experts,
    FeedForward,
    Projection,
    Structure,
)
from tfvllm.families.llama import LlamaAdapter
from tfvllm.families.projections import WIDE, attention, feed_forward
from tfvllm.families.shrunk import ShrunkBackbone, ShrunkCausalLM, register

_DENSE = ("_feedforward_intermediate_dense", "_feedforward_output_dense", "_feedforward_gate_dense")


class ExpertsAdapter(LlamaAdapter):
    """Mixtral, Qwen-MoE, Qwen3-MoE, GPT-OSS."""

    family = "experts"

    def describe(self, layer: Any, kind: str, index: int, hidden: int) -> Block:
        place = f"{kind}.{index}"
        attend = _attribute(layer, "self_attention_layer")
        names = [_name(attend, name) for name in ("query_dense", "key_dense", "value_dense", "output_dense")]
        described = attention(attend, f"{place}.self", names)
        if hasattr(attend, "sinks"):
            sinks = BareWeight("sinks", attend, "sinks", (Axis(HEADS, f"{place}.self"),), "random_normal")
            described = replace(described, bare=(sinks,))
        if hasattr(layer, "sparse_moe_block"):
            norms = (layer.input_layernorm, layer.post_attention_layernorm)
        else:
            norms = (layer._self_attention_layernorm, layer._feedforward_layernorm)
        return Block(
            layer=layer,
            index=index,
            kind=kind,
            hidden_width=hidden,
            attention=described,
            feed_forward=_described(_inside(layer), place),
            norms={"attention": norms[0], "feed_forward": norms[1]},
        )

    def set_attention(self, attention: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        super().set_attention(attention, heads, kv_heads, head_dim)
        if hasattr(attention, "_head_dim"):
            attention._head_dim = head_dim
        if hasattr(attention, "_rotary_dim"):
            attention._rotary_dim = head_dim // 2 * 2

    def set_block(self, layer: Any, shape: BlockShape) -> None:
        layer.num_query_heads = shape.heads
        layer.num_key_value_heads = shape.kv_heads
        inside = _inside(layer)
        inside.intermediate_dim = shape.ffn
        if shape.experts is None:
            layer.intermediate_dim = shape.ffn
            return
        setattr(
            layer, "moe_intermediate_dim" if hasattr(layer, "moe_intermediate_dim") else "intermediate_dim", shape.ffn
        )
        bank = _bank(inside)
        bank.intermediate_dim = shape.ffn
        for owner in (layer, inside, bank, getattr(inside, "router", inside)):
            owner.num_experts = shape.experts
            if hasattr(owner, "top_k"):
                owner.top_k = shape.top

    def traits(self, layer: Any) -> dict[str, Any]:
        """GPT-OSS has a window in every second layer; the window of the others is the config's."""
        return {"sliding_window": layer.sliding_window} if hasattr(layer, "sparse_moe_block") else {}

    def set_traits(self, layer: Any, traits: Mapping[str, Any]) -> None:
        if "sliding_window" in traits:
            layer.sliding_window = layer.self_attention_layer.sliding_window = traits["sliding_window"]

    def complete_config(self, config: dict[str, Any], backbone: Any) -> dict[str, Any]:
        if hasattr(backbone, "router_aux_loss_coefficient"):  # Qwen-MoE's get_config leaves it out
            config["router_aux_loss_coefficient"] = backbone.router_aux_loss_coefficient
        return super().complete_config(config, backbone)

    def skeleton_config(self, config: dict[str, Any], structure: Structure) -> dict[str, Any]:
        blocks = structure["decoder"]
        small = super().skeleton_config(config, structure)
        small["intermediate_dim"] = config["intermediate_dim"]
        inside = dict.fromkeys(_sizes(config, blocks), 1)
        if "num_experts" in inside:
            inside["num_experts"] = 2  # of one Keras warns that its router has nothing to choose
        return {**small, **inside, **_which(config, blocks)}

    def config_if_expressible(self, config: dict[str, Any], structure: Structure) -> dict[str, Any] | None:
        blocks = structure["decoder"]
        mixed = {(b.ffn, b.experts, b.top) for b in blocks if b.experts is not None}
        plain = {b.ffn for b in blocks if b.experts is None}
        if len(mixed) > 1 or len(plain) > 1:
            return None
        for index, block in enumerate(blocks):
            window = config.get("sliding_window") if index % 2 else None
            if block.traits.get("sliding_window", window) != window:
                return None
        if "head_dim" in config:
            config = {**config, "head_dim": blocks[0].head_dim}
        found = super().config_if_expressible(config, {"decoder": [replace(block, ffn=0) for block in blocks]})
        if found is None:
            return None
        found["intermediate_dim"] = config["intermediate_dim"]
        return {**found, **_sizes(config, blocks), **_which(config, blocks)}

    def summary(self, backbone: Any, structure: Structure) -> dict[str, Any]:
        found = super().summary(backbone, structure)
        del found["intermediate_dim"]
        return {**found, **_sizes(vars(backbone), structure["decoder"])}


def _name(owner: Any, name: str) -> str:
    return name if hasattr(owner, name) else f"_{name}"


def _attribute(owner: Any, name: str) -> Any:
    return getattr(owner, _name(owner, name))


def _inside(layer: Any) -> Any:
    """What holds the experts of a block, or is its one feed-forward."""
    return layer.mlp if hasattr(layer, "mlp") else _attribute(layer, "sparse_moe_block")


def _bank(moe: Any) -> Any:
    return moe.experts if hasattr(moe, "experts") else moe.expert_bank


def _sizes(config: Mapping[str, Any], blocks: Sequence[BlockShape]) -> dict[str, int]:
    """What a config says of the inside of its blocks: the largest of them."""
    mixed = [block for block in blocks if block.experts is not None]
    found = {}
    if plain := [block.ffn for block in blocks if block.experts is None]:
        found["intermediate_dim"] = max(plain)
    if mixed:
        found["moe_intermediate_dim" if "mlp_only_layers" in config else "intermediate_dim"] = max(b.ffn for b in mixed)
        found["num_experts"] = max(block.experts or 0 for block in mixed)
        found["top_k"] = max(block.top or 0 for block in mixed)
    return found


def _which(config: Mapping[str, Any], blocks: Sequence[BlockShape]) -> dict[str, Any]:
    """Which blocks have no experts, where a config can say so."""
    if "mlp_only_layers" not in config:
        return {}
    plain = [index for index, block in enumerate(blocks) if block.experts is None]
    return {"mlp_only_layers": plain, "decoder_sparse_step": 1}


def _described(inside: Any, place: str) -> FeedForward | Experts:
    if hasattr(inside, "_feedforward_gate_dense"):
        return feed_forward(inside, place, *_DENSE, activation=inside.activation)
    bank, experts, neurons = _bank(inside), Axis(EXPERTS, place), Axis(FFN, place)
    router = inside.router if hasattr(inside, "router") else inside
    attribute = "router_dense" if hasattr(inside, "router") else "_sparse_feedforward_gate_dense"
    shared = getattr(inside, "shared_expert_dense", None)
    others: list[Projection] = []
    if shared is not None:
        others += feed_forward(shared, f"{place}.shared", *_DENSE, prefix="shared_").projections
        gate = inside.shared_expert_gate_dense
        others.append(
            Projection(
                "shared_router", gate, inside, "shared_expert_gate_dense", kernel_axes=(WIDE, None), bias_axes=(None,)
            )
        )

    def weight(name: str, attribute: str, axes: Axes, initializer: Any = None) -> BareWeight:
        return BareWeight(name, bank, attribute, axes, initializer or keras.initializers.get(bank.kernel_initializer))

    hidden: Callable[[Any], Any]
    bare: tuple[BareWeight, ...]
    if hasattr(bank, "gate_up_proj"):  # gate, up, gate, up, ...
        both = Axis(FFN, place, inner=2)
        bare = (
            weight("gate_up", "gate_up_proj", (experts, WIDE, both)),
            weight("gate_up_bias", "gate_up_proj_bias", (experts, both), "zeros"),
            weight("down", "down_proj", (experts, neurons, WIDE)),
            weight("down_bias", "down_proj_bias", (experts, WIDE), "zeros"),
        )
        hidden = _clipped(bank)
    else:
        names = ("_expert_feedforward_gate_dense", "_expert_feedforward_intermediate_dense")
        down = weight("down", "_expert_feedforward_output_dense", (experts, neurons, WIDE))
        if hasattr(bank, names[1]):
            bare = (*(weight(n, a, (experts, WIDE, neurons)) for n, a in zip(("gate", "up"), names)), down)
        else:  # gates | ups
            bare = (weight("gate_up", names[0], (experts, WIDE, Axis(FFN, place, repeats=2))), down)
        hidden = _activated(bank, names)
    return Experts(
        layer=inside,
        place=place,
        count=int(inside.num_experts),
        top=int(inside.top_k),
        width=int(bank.intermediate_dim),
        router=Projection("router", getattr(router, attribute), router, attribute, (WIDE, experts), (experts,)),
        bare=bare,
        hidden=hidden,
        normalized=bool(getattr(inside, "norm_top_k_prob", True)),  # GPT-OSS takes the softmax of the best only
        others=tuple(others),
        activation=getattr(bank, "activation", None),
    )


def _activated(bank: Any, names: Sequence[str]) -> Callable[[Any], Any]:
    def hidden(rows: Any) -> Any:
        products = [ops.einsum("th,ehm->etm", rows, getattr(bank, name)) for name in names if hasattr(bank, name)]
        gate, up = products if len(products) == 2 else ops.split(products[0], 2, axis=-1)
        return bank.activation(gate) * up

    return hidden


def _clipped(bank: Any) -> Callable[[Any], Any]:
    def hidden(rows: Any) -> Any:
        both = ops.einsum("th,ehm->etm", rows, bank.gate_up_proj)
        both = ops.add(both, bank.gate_up_proj_bias[:, None])  # under mixed precision they may be of two dtypes
        gate = ops.minimum(both[..., ::2], bank.limit)
        return (ops.clip(both[..., 1::2], -bank.limit, bank.limit) + 1) * gate * ops.sigmoid(bank.alpha * gate)

    return hidden


ADAPTER = ExpertsAdapter()


@register
class ShrunkMixtralBackbone(ShrunkBackbone, MixtralBackbone):
    """A `MixtralBackbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkQwenMoeBackbone(ShrunkBackbone, QwenMoeBackbone):
    """A `QwenMoeBackbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkQwen3MoeBackbone(ShrunkBackbone, Qwen3MoeBackbone):
    """A `Qwen3MoeBackbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkGptOssBackbone(ShrunkBackbone, GptOssBackbone):
    """A `GptOssBackbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkMixtralCausalLM(ShrunkCausalLM, MixtralCausalLM):
    """A `MixtralCausalLM` on a shrunk backbone."""

    backbone_cls = ShrunkMixtralBackbone


@register
class ShrunkQwenMoeCausalLM(ShrunkCausalLM, QwenMoeCausalLM):
    """A `QwenMoeCausalLM` on a shrunk backbone."""

    backbone_cls = ShrunkQwenMoeBackbone


@register
class ShrunkQwen3MoeCausalLM(ShrunkCausalLM, Qwen3MoeCausalLM):
    """A `Qwen3MoeCausalLM` on a shrunk backbone."""

    backbone_cls = ShrunkQwen3MoeBackbone


@register
class ShrunkGptOssCausalLM(ShrunkCausalLM, GptOssCausalLM):
    """A `GptOssCausalLM` on a shrunk backbone."""

    backbone_cls = ShrunkGptOssBackbone


SHRUNK = {
    MixtralBackbone: ShrunkMixtralBackbone,
    QwenMoeBackbone: ShrunkQwenMoeBackbone,
    Qwen3MoeBackbone: ShrunkQwen3MoeBackbone,
    GptOssBackbone: ShrunkGptOssBackbone,
}
TASKS = {
    MixtralCausalLM: ShrunkMixtralCausalLM,
    QwenMoeCausalLM: ShrunkQwenMoeCausalLM,
    Qwen3MoeCausalLM: ShrunkQwen3MoeCausalLM,
    GptOssCausalLM: ShrunkGptOssCausalLM,
}
READERS = experts_decoding.READERS

"""How the decoders of mixtures of experts are read: Mixtral, Qwen-MoE, Qwen3-MoE and GPT-OSS."""

from typing import Any

import numpy as np

from tfvllm.errors import InputError
from tfvllm.families import spec
from tfvllm.families.arrays import activation_name, array, dense, self_attention
from tfvllm.families.llama import decoder, feed_forward_of, rms_norm, rotary, self_attention_of


def read_mixtral(backbone) -> spec.LanguageModel:
    def block(layer) -> spec.Block:
        attention, moe = layer._self_attention_layer, layer._sparse_moe_block
        bank = moe.expert_bank
        return _block(
            layer,
            _attention(attention, attention.output_dense, layer.sliding_window),
            _experts(
                moe,
                up=_joined(bank._expert_feedforward_gate_dense, bank._expert_feedforward_intermediate_dense),
                normalized=True,
            ),
        )

    return decoder(backbone, block)


def read_qwen_moe(backbone) -> spec.LanguageModel:
    def block(layer) -> spec.Block:
        attention, mlp = layer._self_attention_layer, layer.mlp
        window = attention.sliding_window_size if attention.use_sliding_window_attention else None
        return _block(layer, _attention(attention, attention._output_dense, window), _qwen(mlp))

    return decoder(backbone, block)


def read_qwen3_moe(backbone) -> spec.LanguageModel:
    def block(layer) -> spec.Block:
        attention = layer._self_attention_layer
        return _block(layer, self_attention_of(attention, attention.sliding_window_size or None), _qwen(layer.mlp))

    return decoder(backbone, block)


def read_gpt_oss(backbone) -> spec.LanguageModel:
    def block(layer) -> spec.Block:
        attention, moe = layer.self_attention_layer, layer.sparse_moe_block
        # keras-nlp sees `sliding_window` positions before a query's own.
        window = attention.sliding_window + 1 if attention.sliding_window else None
        return spec.Block(
            normalize_first=True,
            attention=_attention(attention, attention.output_dense, window, sinks=array(attention.sinks)),
            attention_norm=rms_norm(layer.input_layernorm),
            feed_forward=_gpt_oss(moe),
            feed_forward_norm=rms_norm(layer.post_attention_layernorm),
        )

    return decoder(backbone, block)


def _block(layer, attention: spec.Attention, feed_forward: spec.FeedForward | spec.Experts) -> spec.Block:
    return spec.Block(
        normalize_first=True,
        attention=attention,
        attention_norm=rms_norm(layer._self_attention_layernorm),
        feed_forward=feed_forward,
        feed_forward_norm=rms_norm(layer._feedforward_layernorm),
    )


def _attention(layer, output, window: int | None, **more) -> spec.Attention:
    return self_attention(
        *(layer.query_dense, layer.key_dense, layer.value_dense, output),
        scale=float(layer._inv_norm_factor),
        window=window,
        rotary=rotary(layer.rotary_embedding_layer, int(layer.query_dense.kernel.shape[2])),
        **more,
    )


def _qwen(mlp) -> spec.FeedForward | spec.Experts:
    """A layer of Qwen's has experts, or one feed-forward like Llama's."""
    if not hasattr(mlp, "expert_bank"):
        return feed_forward_of(mlp)
    shared = getattr(mlp, "shared_expert_dense", None)
    return _experts(
        mlp,
        up=array(mlp.expert_bank._expert_feedforward_gate_dense),
        normalized=bool(mlp.norm_top_k_prob),
        shared=None if shared is None else feed_forward_of(shared),
        shared_gate=None if shared is None else dense(mlp.shared_expert_gate_dense),
    )


def _experts(moe, up: np.ndarray, **more: Any) -> spec.Experts:
    return spec.Experts(
        router=dense(moe._sparse_feedforward_gate_dense),
        up=up,
        output=array(moe.expert_bank._expert_feedforward_output_dense),
        activation=activation_name(moe.expert_bank.activation),
        top=int(moe.top_k),
        **more,
    )


def _gpt_oss(moe) -> spec.Experts:
    experts = moe.experts
    if experts.alpha != 1.702:
        raise InputError(
            f"this GPT-OSS multiplies by sigmoid({experts.alpha} x) in its gates; the decode engine knows 1.702"
        )
    return spec.Experts(
        router=dense(moe.router.router_dense),
        up=_apart(array(experts.gate_up_proj)),
        up_bias=_apart(array(experts.gate_up_proj_bias)),
        output=array(experts.down_proj),
        output_bias=array(experts.down_proj_bias),
        activation="swish_1702",
        top=int(moe.top_k),
        normalized=True,  # it takes the softmax of the best logits only
        limit=float(experts.limit),
    )


def _joined(*kernels) -> np.ndarray:
    return np.concatenate([array(kernel) for kernel in kernels], axis=-1)


def _apart(both: np.ndarray) -> np.ndarray:
    """gate, up, gate, up, … -> all gates, all ups."""
    return np.concatenate([both[..., ::2], both[..., 1::2]], axis=-1)


READERS = {
    "MixtralBackbone": read_mixtral,
    "QwenMoeBackbone": read_qwen_moe,
    "Qwen3MoeBackbone": read_qwen3_moe,
    "GptOssBackbone": read_gpt_oss,
}

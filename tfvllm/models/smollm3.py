"""SmolLM3: Llama's block, in some layers without positions (NoPE; Yang et al. 2025, arXiv:2501.18795)."""

from tfvllm.models import spec
from tfvllm.models.arrays import array, bias, dense, from_heads, merged
from tfvllm.models.llama import rms_norm


def read(backbone) -> spec.LanguageModel:
    return spec.LanguageModel(
        family="smollm3",
        embedding=array(backbone.token_embedding.embeddings),
        decoder=spec.Stack(
            blocks=[_block(layer) for layer in backbone.transformer_layers],
            final_norm=rms_norm(backbone.norm),
        ),
    )


def _block(layer) -> spec.Block:
    attention, mlp = layer.self_attn, layer.mlp
    return spec.Block(
        normalize_first=True,
        attention=spec.Attention(
            heads=attention.num_attention_heads,
            kv_heads=attention.num_key_value_heads,
            head_dim=attention.head_dim,
            query_key_value=_beside(attention.q_proj, attention.k_proj, attention.v_proj),
            output=from_heads(attention.o_proj),
            scale=attention._inv_norm_factor,
            rotary=_rotary(attention.rotary_embedding) if attention.use_rope else None,
        ),
        attention_norm=rms_norm(layer.input_layernorm),
        feed_forward=spec.FeedForward(
            up=_beside(mlp.gate_proj, mlp.up_proj), output=dense(mlp.down_proj), activation="silu", gated=True
        ),
        feed_forward_norm=rms_norm(layer.post_attention_layernorm),
    )


def _beside(*layers) -> spec.Linear:
    return merged(*[(array(layer.kernel), bias(layer)) for layer in layers])


def _rotary(layer) -> spec.Rotary:
    return spec.Rotary(array(layer.inv_freq), layer.attention_scaling)  # the frequencies are weights


READERS = {"SmolLM3Backbone": read}
NO_ADAPTER = "its blocks are Llama's under other names, and have not been described yet"

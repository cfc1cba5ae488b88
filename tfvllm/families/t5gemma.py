"""T5Gemma: Gemma 2's blocks in an encoder that sees both ways and in a decoder, each with its own width."""

import math

from tfvllm.families import spec
from tfvllm.families.arrays import array, cross_attention, gated, self_attention
from tfvllm.families.gemma import rms_norm
from tfvllm.families.llama import rotary


def read(backbone) -> spec.LanguageModel:
    embedding = backbone.decoder_token_embedding
    return spec.LanguageModel(
        family="t5gemma",
        embedding=array(embedding.embeddings),
        head=None if embedding.tie_weights else array(embedding.reverse_embeddings),
        logit_soft_cap=backbone.final_logit_softcapping,
        encoder=spec.Stack(
            blocks=[_block(layer) for layer in backbone.encoder_layers],
            embedding=array(backbone.token_embedding.embeddings),
            embedding_scale=math.sqrt(backbone.encoder_hidden_dim),
            final_norm=rms_norm(backbone.encoder_norm),
        ),
        decoder=spec.Stack(
            blocks=[_block(layer, decoder=True) for layer in backbone.decoder_layers],
            embedding_scale=math.sqrt(backbone.decoder_hidden_dim),
            final_norm=rms_norm(backbone.decoder_norm),
        ),
    )


def _block(layer, *, decoder: bool = False) -> spec.Block:
    attention, mlp = layer.self_attn, layer.mlp
    # keras-nlp's window is what lies before the query; its encoder sees everything, whatever its layers are called.
    windowed = decoder and layer.layer_type == "sliding_attention"
    name = mlp.hidden_activation
    return spec.Block(
        normalize_first=True,
        attention=self_attention(
            *_projections(attention),
            scale=attention.scaling,
            window=layer.sliding_window + 1 if windowed else None,
            soft_cap=attention.logit_soft_cap,
            rotary=rotary(attention.rotary_embedding, int(attention.query_dense.kernel.shape[-1])),
        ),
        attention_norm=rms_norm(layer.pre_self_attn_layernorm),
        post_attention_norm=rms_norm(layer.post_self_attn_layernorm),
        feed_forward=gated(
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj), name if name == "gelu_approximate" else mlp.act_fn
        ),
        feed_forward_norm=rms_norm(layer.pre_feedforward_layernorm),
        post_feed_forward_norm=rms_norm(layer.post_feedforward_layernorm),
        cross_attention=_cross(layer.cross_attn) if decoder else None,
        cross_norm=rms_norm(layer.pre_cross_attn_layernorm) if decoder else None,
        post_cross_norm=rms_norm(layer.post_cross_attn_layernorm) if decoder else None,
    )


def _cross(attention) -> spec.CrossAttention:
    return cross_attention(*_projections(attention), scale=attention.scaling, soft_cap=attention.logit_soft_cap)


def _projections(attention) -> tuple:
    return attention.query_dense, attention.key_dense, attention.value_dense, attention.output_dense


READERS = {"T5GemmaBackbone": read}
NO_ADAPTER = "its blocks are Gemma's under other names, and have not been described yet"

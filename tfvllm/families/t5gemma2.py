"""T5Gemma 2 (text): Gemma 3's blocks; the decoder attends to itself and to the encoder's output in one softmax."""

import math

from tfvllm.families import spec
from tfvllm.families.arrays import array, gated, self_attention
from tfvllm.families.gemma import rms_norm
from tfvllm.families.llama import rotary


def unread(backbone) -> str:
    return "" if backbone.vision_encoder is None else "it reads images: vision_encoder"


def read(backbone) -> spec.LanguageModel:
    embedding = backbone.decoder_token_embedding
    return spec.LanguageModel(
        family="t5gemma2",
        embedding=array(embedding.embeddings),
        head=None if embedding.tie_weights else array(embedding.reverse_embeddings),
        logit_soft_cap=backbone.final_logit_softcapping,
        encoder=spec.Stack(
            blocks=[_block(layer, layer.self_attn) for layer in backbone.encoder_layers],
            embedding=array(backbone.token_embedding.embeddings),
            embedding_scale=math.sqrt(backbone.encoder_hidden_dim),
            final_norm=rms_norm(backbone.encoder_norm),
        ),
        decoder=spec.Stack(
            blocks=[_block(layer, layer.merged_attn, decoder=True) for layer in backbone.decoder_layers],
            embedding_scale=math.sqrt(backbone.decoder_hidden_dim),
            final_norm=rms_norm(backbone.decoder_norm),
        ),
    )


def _block(layer, attention, *, decoder: bool = False) -> spec.Block:
    mlp = layer.mlp
    name = mlp.hidden_activation
    window = layer.sliding_window if layer.attention_type == "sliding_attention" else None
    # keras-nlp's encoder counts a position itself on either side of it.
    around = None if window is None or decoder else ((window + 1) // 2 - 1, window // 2)
    return spec.Block(
        normalize_first=True,
        attention=self_attention(
            *(attention.query_dense, attention.key_dense, attention.value_dense, attention.output_dense),
            scale=attention.scaling,
            window=window if decoder else None,
            around=around,
            soft_cap=attention.logit_soft_cap,
            query_norm=rms_norm(attention.query_norm) if attention.use_query_key_norm else None,
            key_norm=rms_norm(attention.key_norm) if attention.use_query_key_norm else None,
            rotary=rotary(attention.rotary_embedding, int(attention.query_dense.kernel.shape[-1])),
            merged=decoder,
        ),
        attention_norm=rms_norm(layer.pre_self_attn_layernorm),
        post_attention_norm=rms_norm(layer.post_self_attn_layernorm),
        feed_forward=gated(
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj), name if name == "gelu_approximate" else mlp.act_fn
        ),
        feed_forward_norm=rms_norm(layer.pre_feedforward_layernorm),
        post_feed_forward_norm=rms_norm(layer.post_feedforward_layernorm),
    )


READERS = {"T5Gemma2Backbone": read}
UNREAD = {"T5Gemma2Backbone": unread}
NO_ADAPTER = "heads of its decoder go from both sides of one attention at once, which has not been described yet"

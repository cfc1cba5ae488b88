"""Phi-3: Llama's block under other names."""

import math

from tfvllm.errors import InputError
from tfvllm.models import spec
from tfvllm.models.arrays import gated, self_attention
from tfvllm.models.llama import decoder, rms_norm, rotary


def read(backbone) -> spec.LanguageModel:
    if backbone.rope_scaling_type is not None:
        raise InputError(
            f"this Phi-3 scales its rotary positions ({backbone.rope_scaling_type!r}): its frequencies change with the "
            "length of the text, which the decode engine does not do; expected rope_scaling_type=None"
        )
    return decoder(backbone, _block)


def _block(layer) -> spec.Block:
    attention = layer.attention
    head_dim = int(attention.query_dense.kernel.shape[2])
    return spec.Block(
        normalize_first=True,
        attention=self_attention(
            *(attention.query_dense, attention.key_dense, attention.value_dense, attention.output_dense),
            scale=1.0 / math.sqrt(head_dim),
            rotary=rotary(attention.rotary_embedding_layer, head_dim),
        ),
        attention_norm=rms_norm(layer.pre_attention_layernorm),
        feed_forward=gated(
            layer.feedforward_gate_dense,
            layer.feedforward_intermediate_dense,
            layer.feedforward_output_dense,
            layer.activation,
        ),
        feed_forward_norm=rms_norm(layer.post_attention_layernorm),
    )


READERS = {"Phi3Backbone": read}
NO_ADAPTER = "its blocks are Llama's under other names, and have not been described yet"

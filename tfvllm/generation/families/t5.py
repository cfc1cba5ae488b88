"""T5: unscaled attention with a relative position bias that the first block owns and all blocks share."""

import numpy as np

from tfvllm.models.arrays import activation_name, array, merged
from tfvllm.models.spec import (
    Attention,
    Block,
    CrossAttention,
    FeedForward,
    LanguageModel,
    Linear,
    Norm,
    RelativeBias,
    Stack,
)


def read(backbone) -> LanguageModel:
    embedding = backbone.token_embedding
    tied = backbone.tie_embedding_weights
    return LanguageModel(
        family="t5",
        embedding=array(embedding.embeddings),
        head=None if tied else array(embedding.reverse_embeddings),
        head_scale=backbone.hidden_dim**-0.5 if tied else 1.0,
        encoder=_stack(backbone.encoder_transformer_layers, backbone.encoder_layer_norm, bidirectional=True),
        decoder=_stack(backbone.decoder_transformer_layers, backbone.decoder_layer_norm, bidirectional=False),
    )


def _stack(layers, norm, *, bidirectional: bool) -> Stack:
    first = layers[0].self_attention
    return Stack(
        blocks=[_block(layer) for layer in layers],
        final_norm=_norm(norm),
        relative_bias=RelativeBias(
            table=array(first.relative_attention_bias),
            bidirectional=bidirectional,
            max_distance=first.relative_attention_max_distance,
        ),
    )


def _norm(layer) -> Norm:
    return Norm("rms", array(layer.weight), None, float(layer.epsilon))


def _linear(layer) -> Linear:
    return Linear(array(layer.kernel))


def _block(layer) -> Block:
    attention = layer.self_attention
    heads, head_dim = attention.num_heads, attention.key_value_dim
    cross = getattr(layer, "cross_attention", None)
    up = array(layer.input_projector.kernel)
    if layer.use_gated_activation:
        # keras-nlp: act(input_projector(x)) * gate_projector(x); the part under the activation stands left.
        up = np.concatenate([up, array(layer.gate_projector.kernel)], axis=1)
    return Block(
        normalize_first=True,
        attention=Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            query_key_value=merged(
                *[
                    (array(part.kernel), None)
                    for part in (attention.query_projector, attention.key_projector, attention.value_projector)
                ]
            ),
            output=_linear(attention.output_projector),
            scale=1.0,
        ),
        attention_norm=_norm(layer.self_attention_layer_norm),
        feed_forward=FeedForward(
            up=Linear(up),
            output=_linear(layer.output_projector),
            activation=activation_name(layer.input_projector.activation),
            gated=layer.use_gated_activation,
        ),
        feed_forward_norm=_norm(layer.layer_norm),
        cross_attention=None
        if cross is None
        else CrossAttention(
            heads=cross.num_heads,
            head_dim=cross.key_value_dim,
            query=_linear(cross.query_projector),
            key_value=merged((array(cross.key_projector.kernel), None), (array(cross.value_projector.kernel), None)),
            output=_linear(cross.output_projector),
            scale=1.0,
        ),
        cross_norm=None if cross is None else _norm(layer.cross_attention_layer_norm),
    )

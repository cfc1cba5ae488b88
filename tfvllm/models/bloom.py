"""Bloom: attention with linear biases (ALiBi) in place of positions, a norm right after the embedding."""

import math

from tfvllm.models import spec
from tfvllm.models.arrays import array, dense, layer_norm, merged, projection


def read(backbone) -> spec.LanguageModel:
    attention = backbone.transformer_layers[0]._self_attention_layer
    return spec.LanguageModel(
        family="bloom",
        embedding=array(backbone.token_embedding.embeddings),
        decoder=spec.Stack(
            blocks=[_block(layer) for layer in backbone.transformer_layers],
            embedding_norm=layer_norm(backbone.embeddings_layer_norm),
            final_norm=layer_norm(backbone.layer_norm),
            # The slopes that the layer itself uses, also where the number of heads is no power of two.
            alibi=tuple(attention._alibi_layer._get_slopes(attention.num_heads)),
        ),
    )


def _block(layer) -> spec.Block:
    attention = layer._self_attention_layer
    parts = [projection(part) for part in (attention._query_dense, attention._key_dense, attention._value_dense)]
    heads, head_dim = parts[0][2:]
    return spec.Block(
        normalize_first=True,
        attention=spec.Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            query_key_value=merged(*[part[:2] for part in parts]),
            output=dense(attention._output_dense),
            scale=1.0 / math.sqrt(head_dim),
        ),
        attention_norm=layer_norm(layer._pre_attention_layernorm),
        feed_forward=spec.FeedForward(
            up=dense(layer._mlp_intermediate_dense),
            output=dense(layer._mlp_output_dense),
            activation="gelu_approximate",
        ),
        feed_forward_norm=layer_norm(layer._post_attention_layernorm),
    )


READERS = {"BloomBackbone": read}
NO_ADAPTER = "ALiBi gives every head a slope by its number, so that heads cannot go without changing the others'"

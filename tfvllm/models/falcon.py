"""Falcon as keras-nlp has it, that of Falcon-RW: a head's keys and values are its own, ALiBi in place of positions.

Scores are scaled after ALiBi is added to them: its slopes are scaled too. Falcon counts from the first token, the
decode engine backwards from the query: all scores of a query differ by one number, which softmax does not see.
"""

from tfvllm.models import spec
from tfvllm.models.arrays import activation_name, array, dense, layer_norm, merged, projection


def read(backbone) -> spec.LanguageModel:
    first = backbone.transformer_layers[0]
    scale = first.attention_layer.inv_norm_factor
    return spec.LanguageModel(
        family="falcon",
        embedding=array(backbone.token_embedding.embeddings),
        decoder=spec.Stack(
            blocks=[_block(layer) for layer in backbone.transformer_layers],
            final_norm=layer_norm(backbone.final_layernorm),
            alibi=tuple(slope * scale for slope in first._get_slopes(first.num_attention_heads)),
        ),
    )


def _block(layer) -> spec.Block:
    attention = layer.attention_layer
    parts = [projection(part) for part in (attention.query_dense, attention.key_dense, attention.value_dense)]
    heads, head_dim = parts[0][2:]
    return spec.Block(
        normalize_first=True,
        attention=spec.Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            query_key_value=merged(*[part[:2] for part in parts]),
            output=dense(attention.output_dense),
            scale=attention.inv_norm_factor,
        ),
        attention_norm=layer_norm(layer.input_layernorm),
        feed_forward=spec.FeedForward(
            up=dense(layer.dense_h_to_4h),
            output=dense(layer.dense_4h_to_h),
            activation=activation_name(layer.dense_h_to_4h.activation),
        ),
        feed_forward_norm=layer_norm(layer.post_attention_layernorm),
    )


READERS = {"FalconBackbone": read}
NO_ADAPTER = "ALiBi gives every head a slope by its number, so that heads cannot go without changing the others'"

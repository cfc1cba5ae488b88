"""GPT-2, OPT and BART: keras-nlp's own TransformerDecoder and TransformerEncoder, learned positions."""

import math

from tfvllm.models.arrays import activation_name, array, dense, from_heads, layer_norm, merged, projection
from tfvllm.models.spec import Attention, Block, CrossAttention, FeedForward, LanguageModel, Linear, Stack


def read_gpt2(backbone) -> LanguageModel:
    return LanguageModel(
        family="gpt2",
        embedding=array(backbone.token_embedding.embeddings),
        decoder=Stack(
            blocks=[block(layer) for layer in backbone.transformer_layers],
            position_table=array(backbone.position_embedding.position_embeddings),
            final_norm=layer_norm(backbone.layer_norm),
        ),
    )


def read_opt(backbone) -> LanguageModel:
    return LanguageModel(
        family="opt",
        embedding=array(backbone.token_embedding.embeddings),
        decoder=Stack(
            blocks=[block(layer) for layer in backbone.transformer_layers],
            position_table=array(backbone.embeddings.position_embedding.position_embeddings),
            final_norm=layer_norm(backbone.layer_norm),
        ),
    )


def read_bart(backbone) -> LanguageModel:
    return LanguageModel(
        family="bart",
        embedding=array(backbone.token_embedding.embeddings),
        encoder=Stack(
            blocks=[block(layer) for layer in backbone.encoder_transformer_layers],
            position_table=array(backbone.encoder_position_embedding.position_embeddings),
            embedding_norm=layer_norm(backbone.encoder_embeddings_layer_norm),
        ),
        decoder=Stack(
            blocks=[block(layer) for layer in backbone.decoder_transformer_layers],
            position_table=array(backbone.decoder_position_embedding.position_embeddings),
            embedding_norm=layer_norm(backbone.decoder_embeddings_layer_norm),
        ),
    )


def block(layer) -> Block:
    """A TransformerDecoder or TransformerEncoder layer. Sizes come from the weights, so shrunk layers read as well."""
    attention = layer._self_attention_layer
    parts = [projection(dense) for dense in (attention._query_dense, attention._key_dense, attention._value_dense)]
    heads, head_dim = parts[0][2:]
    cross = getattr(layer, "_cross_attention_layer", None)
    return Block(
        normalize_first=layer.normalize_first,
        attention=Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            query_key_value=merged(*[part[:2] for part in parts]),
            output=from_heads(attention._output_dense),
            scale=1.0 / math.sqrt(attention._key_dim),
        ),
        attention_norm=layer_norm(layer._self_attention_layer_norm),
        feed_forward=FeedForward(
            up=dense(layer._feedforward_intermediate_dense),
            output=dense(layer._feedforward_output_dense),
            activation=activation_name(layer._feedforward_intermediate_dense.activation),
        ),
        feed_forward_norm=layer_norm(layer._feedforward_layer_norm),
        cross_attention=None if cross is None else _cross(cross),
        cross_norm=None if cross is None else layer_norm(layer._cross_attention_layer_norm),
    )


def _cross(attention) -> CrossAttention:
    query, query_bias, heads, head_dim = projection(attention._query_dense)
    return CrossAttention(
        heads=heads,
        head_dim=head_dim,
        query=Linear(query, query_bias),
        key_value=merged(projection(attention._key_dense)[:2], projection(attention._value_dense)[:2]),
        output=from_heads(attention._output_dense),
        scale=1.0 / math.sqrt(attention._key_dim),
    )

"""GPT-2 and OPT: stacks of keras-nlp's TransformerDecoder without cross-attention."""

import math

from keras_hub.models import GPT2Backbone, GPT2CausalLM, OPTBackbone, OPTCausalLM

from tfvllm.families import spec
from tfvllm.families.arrays import activation_name, array, cross_attention, dense, layer_norm, self_attention
from tfvllm.families.shrunk import ShrunkBackbone, ShrunkCausalLM, register
from tfvllm.families.transformer_encoder import TransformerStackAdapter


class TransformerDecoderAdapter(TransformerStackAdapter):
    """GPT-2, OPT."""

    family = "transformer_decoder"
    only_stack = "decoder"


ADAPTER = TransformerDecoderAdapter()


@register
class ShrunkGPT2Backbone(ShrunkBackbone, GPT2Backbone):
    """A `GPT2Backbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkOPTBackbone(ShrunkBackbone, OPTBackbone):
    """An `OPTBackbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkGPT2CausalLM(ShrunkCausalLM, GPT2CausalLM):
    """A `GPT2CausalLM` on a shrunk backbone."""

    backbone_cls = ShrunkGPT2Backbone


@register
class ShrunkOPTCausalLM(ShrunkCausalLM, OPTCausalLM):
    """An `OPTCausalLM` on a shrunk backbone."""

    backbone_cls = ShrunkOPTBackbone


SHRUNK = {GPT2Backbone: ShrunkGPT2Backbone, OPTBackbone: ShrunkOPTBackbone}
TASKS = {GPT2CausalLM: ShrunkGPT2CausalLM, OPTCausalLM: ShrunkOPTCausalLM}


# ------------------------------------------------------------------------------------------------------------- decoding


def read_gpt2(backbone) -> spec.LanguageModel:
    return spec.LanguageModel(
        family="gpt2",
        embedding=array(backbone.token_embedding.embeddings),
        decoder=spec.Stack(
            blocks=[block(layer) for layer in backbone.transformer_layers],
            position_table=array(backbone.position_embedding.position_embeddings),
            final_norm=layer_norm(backbone.layer_norm),
        ),
    )


def read_opt(backbone) -> spec.LanguageModel:
    return spec.LanguageModel(
        family="opt",
        embedding=array(backbone.token_embedding.embeddings),
        decoder=spec.Stack(
            blocks=[block(layer) for layer in backbone.transformer_layers],
            position_table=array(backbone.embeddings.position_embedding.position_embeddings),
            final_norm=layer_norm(backbone.layer_norm),
        ),
    )


def block(layer) -> spec.Block:
    """A TransformerDecoder or TransformerEncoder layer. Sizes come from the weights, so shrunk layers read as well."""
    attention = layer._self_attention_layer
    cross = getattr(layer, "_cross_attention_layer", None)
    return spec.Block(
        normalize_first=layer.normalize_first,
        attention=self_attention(*_projections(attention), scale=1.0 / math.sqrt(attention._key_dim)),
        attention_norm=layer_norm(layer._self_attention_layer_norm),
        feed_forward=spec.FeedForward(
            up=dense(layer._feedforward_intermediate_dense),
            output=dense(layer._feedforward_output_dense),
            activation=activation_name(layer._feedforward_intermediate_dense.activation),
        ),
        feed_forward_norm=layer_norm(layer._feedforward_layer_norm),
        cross_attention=None
        if cross is None
        else cross_attention(*_projections(cross), scale=1.0 / math.sqrt(cross._key_dim)),
        cross_norm=None if cross is None else layer_norm(layer._cross_attention_layer_norm),
    )


def _projections(attention) -> tuple:
    return attention._query_dense, attention._key_dense, attention._value_dense, attention._output_dense


READERS = {"GPT2Backbone": read_gpt2, "OPTBackbone": read_opt}

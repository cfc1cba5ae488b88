"""BART: TransformerEncoder below, TransformerDecoder with cross-attention above."""

from keras_hub.models import BartBackbone, BartSeq2SeqLM

from tfvllm.families import spec
from tfvllm.families.arrays import array, layer_norm
from tfvllm.families.shrunk import ShrunkBackbone, ShrunkSeq2SeqLM, register
from tfvllm.families.transformer_decoder import block
from tfvllm.families.transformer_encoder import TransformerStackAdapter


class BartAdapter(TransformerStackAdapter):
    """BART."""

    family = "bart"


ADAPTER = BartAdapter()


@register
class ShrunkBartBackbone(ShrunkBackbone, BartBackbone):
    """A `BartBackbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkBartSeq2SeqLM(ShrunkSeq2SeqLM, BartSeq2SeqLM):
    """A `BartSeq2SeqLM` on a shrunk backbone."""

    backbone_cls = ShrunkBartBackbone


SHRUNK = {BartBackbone: ShrunkBartBackbone}
TASKS = {BartSeq2SeqLM: ShrunkBartSeq2SeqLM}


def read_bart(backbone) -> spec.LanguageModel:
    return spec.LanguageModel(
        family="bart",
        embedding=array(backbone.token_embedding.embeddings),
        encoder=spec.Stack(
            blocks=[block(layer) for layer in backbone.encoder_transformer_layers],
            position_table=array(backbone.encoder_position_embedding.position_embeddings),
            embedding_norm=layer_norm(backbone.encoder_embeddings_layer_norm),
        ),
        decoder=spec.Stack(
            blocks=[block(layer) for layer in backbone.decoder_transformer_layers],
            position_table=array(backbone.decoder_position_embedding.position_embeddings),
            embedding_norm=layer_norm(backbone.decoder_embeddings_layer_norm),
        ),
    )


READERS = {"BartBackbone": read_bart}

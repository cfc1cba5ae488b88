"""BART: TransformerEncoder below, TransformerDecoder with cross-attention above."""

from keras_hub.models import BartBackbone, BartSeq2SeqLM

from tfvllm.models.shrunk import ShrunkBackbone, ShrunkSeq2SeqLM, register
from tfvllm.models.transformer_encoder import TransformerStackAdapter


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


SHRUNK = {BartBackbone: ShrunkBartBackbone}
TASKS = {BartSeq2SeqLM: ShrunkBartSeq2SeqLM}

"""GPT-2 and OPT: stacks of keras-nlp's TransformerDecoder without cross-attention."""

from keras_hub.models import GPT2Backbone, GPT2CausalLM, OPTBackbone, OPTCausalLM

from tfvllm.models.shrunk import ShrunkBackbone, ShrunkCausalLM, register
from tfvllm.models.transformer_encoder import TransformerStackAdapter


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


@register
class ShrunkOPTCausalLM(ShrunkCausalLM, OPTCausalLM):
    """An `OPTCausalLM` on a shrunk backbone."""


SHRUNK = {GPT2Backbone: ShrunkGPT2Backbone, OPTBackbone: ShrunkOPTBackbone}
TASKS = {GPT2CausalLM: ShrunkGPT2CausalLM, OPTCausalLM: ShrunkOPTCausalLM}

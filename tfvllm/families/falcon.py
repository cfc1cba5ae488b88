"""Falcon as keras-nlp has it, that of Falcon-RW: a head's keys and values are its own, ALiBi in place of positions.

Scores are scaled after ALiBi is added to them: its slopes are scaled too. Falcon counts from the first token, the
decode engine backwards from the query: all scores of a query differ by one number, which softmax does not see.
"""

from typing import Any

from keras_hub.models import FalconBackbone, FalconCausalLM

from tfvllm.families import spec
from tfvllm.families.alibi import AlibiAdapter
from tfvllm.families.arrays import activation_name, array, dense, layer_norm, self_attention
from tfvllm.families.base import Block
from tfvllm.families.projections import attention, feed_forward
from tfvllm.families.shrunk import ShrunkBackbone, ShrunkCausalLM, register


class FalconAdapter(AlibiAdapter):
    """Falcon."""

    family = "falcon"
    heads_key = "num_attention_heads"

    def describe(self, layer: Any, kind: str, index: int, hidden: int) -> Block:
        place = f"{kind}.{index}"
        projections = ("query_dense", "key_dense", "value_dense", "output_dense")
        gelu = layer.dense_h_to_4h.activation
        return Block(
            layer=layer,
            index=index,
            kind=kind,
            hidden_width=hidden,
            attention=attention(layer.attention_layer, f"{place}.self", projections),
            feed_forward=feed_forward(layer, place, "dense_h_to_4h", "dense_4h_to_h", activation=gelu),
            norms={"attention": layer.input_layernorm, "feed_forward": layer.post_attention_layernorm},
        )

    def slopes_owner(self, layer: Any) -> Any:
        return layer


ADAPTER = FalconAdapter()


@register
class ShrunkFalconBackbone(ShrunkBackbone, FalconBackbone):
    """A `FalconBackbone` with its own sizes in every block."""

    adapter = ADAPTER


@register
class ShrunkFalconCausalLM(ShrunkCausalLM, FalconCausalLM):
    """A `FalconCausalLM` on a shrunk backbone."""

    backbone_cls = ShrunkFalconBackbone


SHRUNK = {FalconBackbone: ShrunkFalconBackbone}
TASKS = {FalconCausalLM: ShrunkFalconCausalLM}


# ------------------------------------------------------------------------------------------------------------- decoding


def read(backbone) -> spec.LanguageModel:
    return spec.LanguageModel(
        family="falcon",
        embedding=array(backbone.token_embedding.embeddings),
        decoder=spec.Stack(
            blocks=[_block(layer) for layer in backbone.transformer_layers],
            final_norm=layer_norm(backbone.final_layernorm),
        ),
    )


def _block(layer) -> spec.Block:
    attention = layer.attention_layer
    projections = (attention.query_dense, attention.key_dense, attention.value_dense, attention.output_dense)
    heads = int(attention.query_dense.kernel.shape[1])
    scale = attention.inv_norm_factor
    return spec.Block(
        normalize_first=True,
        attention=self_attention(
            *projections,
            scale=scale,
            alibi=tuple(slope * scale for slope in layer._get_slopes(heads)),
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

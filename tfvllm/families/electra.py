"""ELECTRA: TransformerEncoder over embeddings that may be narrower than the blocks."""

from typing import Any

from keras_hub.models import ElectraBackbone

from tfvllm.errors import InputError
from tfvllm.families.base import Axis
from tfvllm.families.projections import WIDE
from tfvllm.families.shrunk import ShrunkBackbone, register
from tfvllm.families.transformer_encoder import TransformerStackAdapter


class ElectraAdapter(TransformerStackAdapter):
    """ELECTRA."""

    family = "electra"
    only_stack = "encoder"

    def embedding_axis(self, backbone: Any) -> Axis | None:
        return None if hasattr(backbone, "embeddings_projection") else WIDE

    def resized_config(self, config: dict[str, Any], width: int | None, vocabulary: int | None) -> dict[str, Any]:
        new = super().resized_config(config, width, vocabulary)
        if config["embedding_dim"] == config["hidden_dim"]:
            new["embedding_dim"] = new["hidden_dim"]
        elif width == config["embedding_dim"]:
            raise InputError(
                f"width={width}: blocks as wide as the embeddings are, to keras-nlp's ELECTRA, blocks without the "
                f"projection between the two; expected another width than {width}."
            )
        return new


ADAPTER = ElectraAdapter()


@register
class ShrunkElectraBackbone(ShrunkBackbone, ElectraBackbone):
    """An `ElectraBackbone` with its own sizes in every block."""

    adapter = ADAPTER


SHRUNK = {ElectraBackbone: ShrunkElectraBackbone}
TASKS: dict[type, type] = {}  # classifiers take any backbone


NO_READER = "an encoder, which generates nothing"

"""What tfvllm knows of each keras-nlp model family. `adapter_for(model)` gives the description of a model's blocks."""

from typing import Any

from tfvllm.errors import InputError
from tfvllm.models import bart, gemma, llama, t5, transformer_decoder, transformer_encoder
from tfvllm.models.base import (
    FFN,
    HEADS,
    KV_HEADS,
    VOCABULARY,
    WIDTH,
    Adapter,
    Attention,
    Axis,
    Block,
    BlockShape,
    FeedForward,
    Projection,
    Structure,
    Weight,
    find_backbone,
)

_FAMILIES = (transformer_encoder, transformer_decoder, llama, gemma, bart, t5)
_BY_BACKBONE = {cls: family for family in _FAMILIES for pair in family.SHRUNK.items() for cls in pair}

__all__ = [
    "FFN",
    "HEADS",
    "KV_HEADS",
    "VOCABULARY",
    "WIDTH",
    "Adapter",
    "Attention",
    "Axis",
    "Block",
    "BlockShape",
    "FeedForward",
    "Projection",
    "Structure",
    "Weight",
    "adapter_for",
    "families",
    "find_backbone",
    "original_class",
    "shrunk_class",
    "shrunk_task_class",
]


def families() -> dict[str, list[str]]:
    """Family names and the backbones of each.

    Example:
        >>> tfvllm.models.families()["bart"]
        ['BartBackbone']
    """
    return {family.ADAPTER.family: [cls.__name__ for cls in family.SHRUNK] for family in _FAMILIES}


def adapter_for(model: Any) -> Adapter:
    """The adapter of a keras-nlp backbone or task, or of a Keras model around exactly one backbone.

    Raises:
        InputError: no adapter knows the model; the message lists the families.

    Example:
        >>> model = tiny_bert()
        >>> [(block.heads, block.ffn_width) for block in tfvllm.models.adapter_for(model).blocks(model)]
        [(2, 32), (2, 32)]
    """
    backbone = find_backbone(model)
    family = _BY_BACKBONE.get(type(backbone))
    if family is None:
        found = type(model).__name__ if backbone is None else type(backbone).__name__
        known = ", ".join(name for names in families().values() for name in names)
        raise InputError(
            f"no adapter for {found}. Expected a keras-nlp backbone or task with one of: {known}. "
            "A new family is one new file in tfvllm/models/."
        )
    return family.ADAPTER


def original_class(backbone: Any) -> type:
    """The keras-nlp class of a backbone that may be a shrunk one."""
    family = _BY_BACKBONE[type(backbone)]
    return next(native for native, shrunk in family.SHRUNK.items() if type(backbone) in (native, shrunk))


def shrunk_class(backbone: Any) -> type:
    """The class that carries a structure of its own for `backbone`."""
    return _BY_BACKBONE[type(backbone)].SHRUNK[original_class(backbone)]


def shrunk_task_class(task: Any, native_backbone: bool) -> type:
    """The task class for a shrunk `task`: the original one wherever it computes the cache right."""
    pairs = _BY_BACKBONE[type(find_backbone(task))].TASKS
    original = next((native for native, shrunk in pairs.items() if type(task) is shrunk), type(task))
    return original if native_backbone else pairs.get(original, original)

"""What tfvllm knows of each keras-nlp model family. `adapter_for(model)` gives the description of a model's blocks."""

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
from tfvllm.models.gguf import chat_template
from tfvllm.models.huggingface import save_huggingface
from tfvllm.models.load import load
from tfvllm.models.registry import (
    adapter_for,
    families,
    has_reader,
    original_class,
    read,
    shrunk_class,
    shrunk_task_class,
)

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
    "chat_template",
    "families",
    "find_backbone",
    "has_reader",
    "load",
    "original_class",
    "read",
    "save_huggingface",
    "shrunk_class",
    "shrunk_task_class",
]

"""Models from where they are, and back: presets, `.keras` files, Hugging Face folders, GGUF files.

Beside them what tfvllm knows of a family (`tfvllm.families`).
"""

from tfvllm.families import (
    EXPERTS,
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
    Experts,
    FeedForward,
    Projection,
    Structure,
    Weight,
    adapter_for,
    families,
    find_backbone,
    has_reader,
    original_class,
    read,
    shrunk_class,
    shrunk_task_class,
)
from tfvllm.models.gguf import chat_template
from tfvllm.models.huggingface import save_huggingface
from tfvllm.models.load import load

__all__ = [
    "EXPERTS",
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
    "Experts",
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

"""Models from where they are, and back: presets, `.keras` files, Hugging Face folders, GGUF files.

Beside them what tfvllm knows of a family (`tfvllm.families`).
"""

from tfvllm import families as _families
from tfvllm.families import *  # noqa: F403
from tfvllm.models.gguf import chat_template
from tfvllm.models.huggingface import save_huggingface
from tfvllm.models.load import load

__all__ = [*_families.__all__, "chat_template", "load", "save_huggingface"]

"""Readers: from a keras-nlp model to `tfvllm.models.spec.LanguageModel`, one file for each kind of block."""

import importlib

from tfvllm.errors import InputError
from tfvllm.models.spec import LanguageModel
from tfvllm.models.stored import refuse_quantised

# backbone class name -> (module, function). A subclass is found through its bases.
READERS: dict[str, tuple[str, str]] = {
    "GPT2Backbone": ("transformer", "read_gpt2"),
    "OPTBackbone": ("transformer", "read_opt"),
    "BartBackbone": ("transformer", "read_bart"),
    "BloomBackbone": ("bloom", "read"),
    "LlamaBackbone": ("llama", "read"),
    "MistralBackbone": ("llama", "read"),
    "QwenBackbone": ("llama", "read"),
    "Qwen3Backbone": ("llama", "read"),
    "Phi3Backbone": ("phi3", "read"),
    "GemmaBackbone": ("gemma", "read"),
    "Gemma3Backbone": ("gemma", "read"),
    "T5Backbone": ("t5", "read"),
}


SEQ2SEQ = ("BartBackbone", "T5Backbone")  # with an encoder


def read(model, kind: str | None = None) -> LanguageModel:
    """Reads the weights that decoding needs.

    Args:
        model: a keras-nlp `CausalLM` or `Seq2SeqLM` (anything with a `backbone`), or a backbone itself.
        kind: "CausalLM" or "Seq2SeqLM" where only such a model will do; an error then names their families only.

    Raises:
        InputError: the backbone belongs to no known family, carries something the engine cannot compute, or is
            quantised by Keras.
    """
    backbone = getattr(model, "backbone", model)
    for base in type(backbone).__mro__:
        if base.__name__ in READERS:
            refuse_quantised(backbone, "generation")
            module, function = READERS[base.__name__]
            return getattr(importlib.import_module(f"tfvllm.generation.families.{module}"), function)(backbone)
    fitting = [name for name in READERS if kind is None or (name in SEQ2SEQ) == (kind == "Seq2SeqLM")]
    within = f" in a keras-nlp {kind}" if kind else ""
    raise InputError(
        f"cannot generate with {type(backbone).__name__}; expected one of {', '.join(fitting)} "
        f"(or a subclass){within}. A new family is one reader in tfvllm/generation/families."
    )

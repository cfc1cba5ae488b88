"""The families, and what tfvllm knows of a model by its backbone's class: one line here for each file of this folder.

A family's module holds `ADAPTER`, `SHRUNK` and `TASKS` (or `NO_ADAPTER`, why not) for pruning and distillation, and
`READERS` (or `NO_READER`) for generation, with `UNREAD` where a reader does not take every model of the family.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from tfvllm.errors import InputError
from tfvllm.families import (
    albert,
    bart,
    bloom,
    deberta_v3,
    electra,
    experts,
    falcon,
    gemma,
    gemma4,
    gpt_neo_x,
    llama,
    phi3,
    smollm3,
    t5,
    t5gemma,
    t5gemma2,
    transformer_decoder,
    transformer_encoder,
)
from tfvllm.families.base import Adapter, find_backbone
from tfvllm.families.spec import LanguageModel
from tfvllm.families.stored import refuse_quantised

FAMILIES: tuple[ModuleType, ...] = (
    *(transformer_encoder, electra, deberta_v3, albert),
    *(transformer_decoder, llama, gemma, bart, t5),
    *(bloom, phi3, gpt_neo_x, experts, falcon, smollm3, t5gemma, t5gemma2, gemma4),
)
_ADAPTED = tuple(family for family in FAMILIES if hasattr(family, "ADAPTER"))
_BY_BACKBONE = {cls: family for family in _ADAPTED for pair in family.SHRUNK.items() for cls in pair}
# class name of a backbone, or of a task with something of its own -> what reads it. Subclasses go by their bases.
READERS: dict[str, Callable[[Any], LanguageModel]] = {
    name: reader for family in FAMILIES for name, reader in getattr(family, "READERS", {}).items()
}
# The same names -> what of a model its reader cannot say, by its name in the config; "" for nothing.
UNREAD: dict[str, Callable[[Any], str]] = {
    name: why for family in FAMILIES for name, why in getattr(family, "UNREAD", {}).items()
}
SEQ2SEQ = ("BartBackbone", "T5Backbone", "T5GemmaBackbone", "T5Gemma2Backbone")  # with an encoder


def families() -> dict[str, list[str]]:
    """Family names and the backbones of each.

    Example:
        >>> tfvllm.models.families()["bart"]
        ['BartBackbone']
    """
    return {family.ADAPTER.family: [cls.__name__ for cls in family.SHRUNK] for family in _ADAPTED}


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
            "A new family is one new file in tfvllm/families/."
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


def has_reader(model: Any) -> bool:
    """Whether `read` takes the model."""
    return not unread(model)


def unread(model: Any) -> str:
    """Why no reader takes the model, so that the general path may; "" where one does."""
    name, found = type(getattr(model, "backbone", model)).__name__, _reader_of(model)
    if found is None:
        return f"no reader knows {name}"
    known, part = found
    why = UNREAD[known](part) if known in UNREAD else ""
    return why and f"the reader of {name} does not take this one ({why})"


def _reader_of(model: Any) -> tuple[str, Any] | None:
    """The name in READERS of what reads the model or else its backbone, and which of the two."""
    for part in (model, getattr(model, "backbone", None)):
        for base in type(part).__mro__:
            if base.__name__ in READERS:
                return base.__name__, part
    return None


def read(model: Any, kind: str | None = None) -> LanguageModel:
    """Reads the weights that decoding needs.

    Args:
        model: a keras-nlp `CausalLM` or `Seq2SeqLM` (anything with a `backbone`), or a backbone itself.
        kind: "CausalLM" or "Seq2SeqLM" where only such a model will do; an error then names their families only.

    Raises:
        InputError: the backbone belongs to no known family, carries something the engine cannot compute, or is
            quantised by Keras.
    """
    backbone, found = getattr(model, "backbone", model), _reader_of(model)
    if found is not None:
        if why := unread(model):
            raise InputError(f"cannot generate with {type(backbone).__name__}: {why}.")
        refuse_quantised(backbone, "generation")
        name, part = found
        return READERS[name](part)
    backbones = (name for name in READERS if name.endswith("Backbone"))
    fitting = [name for name in backbones if kind is None or (name in SEQ2SEQ) == (kind == "Seq2SeqLM")]
    within = f" in a keras-nlp {kind}" if kind else ""
    raise InputError(
        f"cannot generate with {type(backbone).__name__}; expected one of {', '.join(fitting)} "
        f"(or a subclass){within}. A new family is one new file in tfvllm/families/."
    )

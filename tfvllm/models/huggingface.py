"""keras-nlp models as Hugging Face folders, which transformers and whatever builds on it load.

keras-hub's own converters read such folders. What they ask for says which weight is called how; what they do with it is
undone here: each converter's function is run on the positions of a weight's numbers, and so tells where each number
belongs. The same converter then reads the folder back before it gets its name.
"""

import importlib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from keras_hub.src.utils.transformers.safetensor_utils import SafetensorLoader

from tfvllm.errors import InputError, TfvllmError
from tfvllm.families.base import find_backbone
from tfvllm.families.registry import adapter_for
from tfvllm.families.stored import refuse_quantised
from tfvllm.files import new_directory
from tfvllm.models.huggingface_card import card, read_report
from tfvllm.models.huggingface_config import ROBERTA_OFFSET, Family, config_of, family_of, is_causal
from tfvllm.models.huggingface_tokenizer import special_ids, write_json, write_tokenizer

_WEIGHTS = "model.safetensors"
_FROM_HEADS = re.compile(r"(o_proj|out_lin|attention\.output\.dense|attn\.c_proj)\.weight$")
_TABLES = re.compile(r"(embed\w*|wte|wpe)\.weight$")


def save_huggingface(model: Any, folder: str | os.PathLike, report: Any = None, overwrite: bool = False) -> Path:
    """Writes a keras-nlp model as a Hugging Face folder that `AutoModel…` and `AutoTokenizer` of transformers load.

    `model.safetensors`, `config.json`, the tokenizer's files where the model has a preprocessor,
    `generation_config.json` of a causal language model, and `README.md`, a model card. The weights are in the dtype of
    the model's variables; LoRA is merged into them. The folder is read back, bit by bit, before it gets its name.

    Args:
        model: a causal language model, a text classifier or a backbone, with a BERT, DistilBERT, RoBERTa, GPT-2, Llama
            (3), Mistral, Qwen (2, 3) or Gemma (1 to 3, text) backbone, also one that `tfvllm.shrink` has made smaller.
        folder: what to write.
        report: of the run that made the model: `report.json`, the folder it is in, or its content. The card then has
            its numbers, and a classifier its labels.
        overwrite: replace an existing `folder`.

    Returns:
        `folder`.

    Raises:
        InputError: another family or task, quantised weights, sizes that a Hugging Face config cannot say (named), or
            an existing folder.

    Example:
        >>> path = tfvllm.models.save_huggingface(tiny_bert(), folder / "hf")
        >>> sorted(file.name for file in path.iterdir())[:3]
        ['README.md', 'config.json', 'model.safetensors']
    """
    family = family_of(model)
    _check_task(model, family)
    refuse_quantised(model, "save_huggingface")
    backbone, preprocessor = find_backbone(model), getattr(model, "preprocessor", None)
    found = None if report is None else read_report(report)
    config = config_of(model, family)
    if preprocessor is not None:
        config |= _ids(preprocessor.tokenizer, config)
    elif is_causal(family):
        config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    _name_labels(config, found)
    parts = _Asked(family, headed=is_causal(family) or model is not backbone).of(backbone, config)
    head = _head(model, family)
    weights = _arranged(parts, backbone.hidden_dim, family) | head
    if config["model_type"] == "roberta":  # transformers adds the row of one segment to every token
        weights["roberta.embeddings.token_type_embeddings.weight"] = np.zeros_like(
            weights["roberta.embeddings.word_embeddings.weight"][:1]
        )
    with new_directory(folder, overwrite=overwrite) as partial:
        safetensors.numpy.save_file(weights, partial / _WEIGHTS, metadata={"format": "pt"})
        (partial / _WEIGHTS).chmod(0o644)
        write_json(partial / "config.json", config)
        if preprocessor is not None:
            write_tokenizer(preprocessor, config["model_type"], partial)
        if is_causal(family):
            ids = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            write_json(partial / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
        (partial / "README.md").write_text(
            card(model, sum(value.size for value in weights.values()), Path(folder).name, config, found),
            encoding="utf-8",
        )
        _check(partial / _WEIGHTS, model, parts, head)
    return Path(folder)


def _check_task(model: Any, family: Family) -> None:
    from keras_hub.models import Backbone, CausalLM, TextClassifier

    task = CausalLM if is_causal(family) else TextClassifier
    if not isinstance(model, (Backbone, task)):
        raise InputError(
            f"save_huggingface: expected a backbone or a keras-nlp {task.__name__}, found a {type(model).__name__}. "
            "Save its backbone alone: save_huggingface(model.backbone, ...)."
        )


def _ids(tokenizer: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    ids = special_ids(tokenizer)
    if config["model_type"] == "roberta" and ids["pad_token_id"] != config["pad_token_id"]:
        raise InputError(
            f"save_huggingface: expected padding with the id {config['pad_token_id']}, found {ids['pad_token_id']}; "
            "RoBERTa in transformers counts positions from it. Use a tokenizer with <pad> in that place."
        )
    return {"pad_token_id": ids["pad_token_id"]} if config["model_type"] in ("bert", "distilbert") else ids


def _name_labels(config: dict[str, Any], report: Mapping[str, Any] | None) -> None:
    """Names the classes of a classifier as the run did that trained it."""
    names = [] if report is None else list(report["data"].get("labels") or ())
    if names and len(names) == len(config.get("id2label", ())):
        config["id2label"] = {str(index): name for index, name in enumerate(names)}
        config["label2id"] = {name: index for index, name in enumerate(names)}


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A Keras weight, the name it is written under, and what keras-hub does to that weight to get it."""

    name: str
    value: np.ndarray
    read: Callable[[np.ndarray, list[int]], np.ndarray] | None

    def of(self, weight: np.ndarray) -> np.ndarray:
        return weight if self.read is None else np.asarray(self.read(weight, list(self.value.shape)))


class _Asked:
    """In the place of keras-hub's loader: takes down what a converter asks for."""

    def __init__(self, family: Family, headed: bool):
        self._converter = importlib.import_module(f"keras_hub.src.utils.transformers.{family.converter}")
        self._prefix, self._headed = family.prefix, headed
        self.parts: list[_Part] = []

    def of(self, backbone: Any, config: Mapping[str, Any]) -> list[_Part]:
        self.parts = []
        self._converter.convert_weights(backbone, self, dict(config))
        return self.parts

    def get_tensor(self, name: str) -> np.ndarray:
        """Converters try names with it: the first ones they know are those that transformers writes."""
        raise KeyError(name)

    def port_weight(self, keras_variable: Any, hf_weight_key: str, hook_fn: Any = None) -> None:
        complete = not self._headed or hf_weight_key.startswith((self._prefix, "lm_head."))
        name = hf_weight_key if complete else self._prefix + hf_weight_key
        self.parts.append(_Part(name, np.asarray(keras_variable), hook_fn))


class AsItIs(np.ndarray):
    """An array that keeps its dtype: keras-hub reads Mistral's weights in float16, whatever they are."""

    def astype(self, *args: Any, **kwargs: Any) -> "AsItIs":
        return self


class ExactLoader(SafetensorLoader):
    """keras-hub's loader of a folder, whose weights stay what they are."""

    def get_tensor(self, hf_weight_key: str) -> np.ndarray:
        return super().get_tensor(hf_weight_key).view(AsItIs)


def _arranged(parts: list[_Part], width: int, family: Family) -> dict[str, np.ndarray]:
    """Hugging Face's weights by name."""
    together: dict[str, list[_Part]] = {}
    for part in parts:
        together.setdefault(part.name, []).append(part)
    return {name: _joined(same, width, family) for name, same in together.items()}


def _joined(parts: list[_Part], width: int, family: Family) -> np.ndarray:
    """The weight of which each of `parts` is made."""
    if parts[0].read is None:
        return np.ascontiguousarray(parts[0].value)
    shape = _shape(parts, width, family)
    size = math.prod(shape)
    places = np.arange(size, dtype="int32" if size < 2**31 else "int64").reshape(shape).view(AsItIs)
    whole = np.zeros(size, parts[0].value.dtype)
    for part in parts:
        whole[part.of(places)] = part.value
    return whole.reshape(shape)


def _shape(parts: list[_Part], width: int, family: Family) -> tuple[int, ...]:
    """The shape of Hugging Face's weight: [outputs, inputs], with heads and their channels along one axis."""
    name, first = parts[0].name, parts[0].value.shape
    size = sum(part.value.size for part in parts)
    if len(first) == 1 or name.endswith(".bias"):
        return (size,)
    if name.endswith("roberta.embeddings.position_embeddings.weight"):
        return (first[0] + ROBERTA_OFFSET, width)
    if _TABLES.search(name):
        return (first[0], width)
    outputs, inputs = (first[1], first[0])
    if len(first) == 3:
        outputs, inputs = (width, size // width) if _FROM_HEADS.search(name) else (size // width, width)
    return (inputs, outputs) if family.inputs_first else (outputs, inputs)


def _head(model: Any, family: Family) -> dict[str, np.ndarray]:
    """A classifier's own weights."""
    found = {}
    for name, attribute in family.head.items() if hasattr(model, "backbone") else ():
        layer = getattr(model, attribute)
        found[f"{name}.weight"] = np.ascontiguousarray(np.asarray(layer.kernel).T)
        found[f"{name}.bias"] = np.asarray(layer.bias)
    return found


def _check(file: Path, model: Any, parts: list[_Part], head: Mapping[str, np.ndarray]) -> None:
    """Reads the weights back as keras-hub does, and compares bits; every weight of the model must be among them."""
    with safetensors.safe_open(file, framework="np") as written:
        pairs = [(part.name, part.value, part.of(written.get_tensor(part.name).view(AsItIs))) for part in parts]
        pairs += [(name, value, written.get_tensor(name)) for name, value in head.items()]
        for name, value, found in pairs:
            if found.shape != value.shape or found.dtype != value.dtype or found.tobytes() != value.tobytes():
                raise TfvllmError(f"save_huggingface: {name} does not read back as it was written. Please report it.")
    own = {id(weight.variable): math.prod(weight.variable.shape) for weight in adapter_for(model).weights(model)}
    expected = sum(own.values())
    if sum(value.size for _, value, _ in pairs) != expected:
        raise TfvllmError(
            f"save_huggingface: {type(model).__name__} has {expected:,} weights, of which "
            f"{sum(value.size for _, value, _ in pairs):,} were written. Please report it."
        )

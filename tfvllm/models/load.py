"""Models from where they are: a `.keras` file, a preset, a Hugging Face folder, a GGUF file, inside a package."""

import importlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tfvllm.errors import InputError
from tfvllm.files import located
from tfvllm.models.huggingface import ExactLoader

_HUB_CLASS = {"classify": "TextClassifier", "generate": "CausalLM", "translate": "Seq2SeqLM"}
_IN_PYTHON = "Load it in Python, where they are known, and call tfvllm.export(model, ...)."


def load(where: str | os.PathLike, task: str = "generate") -> Any:
    """The model at `where`, for `task`.

    Args:
        where: a file that `model.save` wrote; a folder that `save_to_preset` wrote, or a Hugging Face folder of a
            family that keras-nlp reads (the backbone and the tokenizer, not the head of a classifier); a GGUF file of
            llama.cpp's (Llama, Qwen 2 and 3, Gemma 1 and 2, GPT-2; needs the package gguf); `PACKAGE:PATH`, one of
            these inside an installed package, which is not imported (PATH may hold * for one name); the name of a
            keras-nlp preset.
        task: one of `tfvllm.export.TASKS`.

    Raises:
        InputError: there is nothing, or no model that this process can load, or one that is for another task.

    Example:
        >>> tiny_bert().save(folder / "saved.keras")
        >>> type(tfvllm.models.load(folder / "saved.keras", "classify")).__name__
        'BertTextClassifier'
    """
    from tfvllm.models.llama3_tokenizer import kept_whole

    return kept_whole(_loaded(where, task))


def _loaded(where: str | os.PathLike, task: str) -> Any:
    path = located(where)
    if path is None:
        return _from_preset(str(where), task)
    if path.suffix == ".gguf":
        if task != "generate":
            raise InputError(f"{path} holds a causal language model; expected task 'generate', found {task!r}.")
        from tfvllm.models.gguf import load_gguf

        return load_gguf(path)
    return _from_folder(path, task) if path.is_dir() else _from_file(path)


def _from_preset(name: str, task: str) -> Any:
    import keras_nlp

    known = set(keras_nlp.models.Backbone.presets) | set(keras_nlp.models.Task.presets)
    if "://" not in name and name not in known:
        raise InputError(
            f"no file {name}, nor a keras-nlp preset of that name; expected a model saved by model.save('NAME.keras'), "
            "a preset folder, a GGUF file or PACKAGE:PATH."
        )
    kind = "TextEmbedder" if task == "embed" else _HUB_CLASS[task]
    try:
        return getattr(keras_nlp.models, kind).from_preset(name)
    except Exception as error:
        raise InputError(f"the preset {name} does not load as a keras-nlp {kind}: {_line(error)}") from None


def stated_options(model: Any, task: str) -> dict[str, Any]:
    """Options of the task that the model itself states: how keras-nlp's text embedders pool, and whether they scale."""
    mode = getattr(model, "pooling_mode", None)
    if task != "embed" or mode not in _POOLINGS:
        return {}
    return {"pooling": _POOLINGS[mode], "normalize": bool(getattr(model, "normalize", True))}


def forgotten(model: Any, path: Path, given: Iterable[str]) -> list[str]:
    """What saving has lost of the model in `path` and none of the options in `given` gives.

    keras-nlp saves no lengths with the preprocessor of a sequence-to-sequence model: they come back as its defaults.
    """
    preprocessor: Any = getattr(model, "preprocessor", None)
    lengths = {"max_length": "decoder_sequence_length", "max_source_length": "encoder_sequence_length"}
    if not all(hasattr(preprocessor, name) for name in lengths.values()):
        return []
    if all(name in preprocessor.get_config() for name in lengths.values()):
        return []
    missing = [option for option in lengths if option not in given]
    flags = " and ".join(f"--{option.replace('_', '-')}" for option in missing)
    if not missing:
        return []
    return [
        f"{path.name} does not hold its preprocessor's lengths (keras-nlp does not save them); the defaults are taken. "
        f"Give those it was trained with: {flags}"
    ]


_POOLINGS = {"mean": "mean", "max": "max", "cls": "first"}


def _from_file(path: Path) -> Any:
    import keras

    import tfvllm.families.registry  # noqa: F401  registers the classes of shrunk models

    try:
        return keras.saving.load_model(str(path), compile=False)
    except Exception as error:
        told, line = str(error), _line(error)
        if missing := re.search(r"Could not locate (?:class|object) '([^']+)'|Unknown layer:? '?([^'\s]+)", told):
            own = missing[1] or missing[2]
            raise InputError(
                f"{path} holds a class of your own, {own}, which this process does not know. {_IN_PYTHON}"
            ) from None
        if "lambda" in told.lower():
            raise InputError(
                f"{path} holds Python code (a Lambda layer), which is not run from a file. {_IN_PYTHON}"
            ) from None
        raise InputError(
            f"{path} does not load as a Keras model: {line}. Expected a file that model.save('NAME.keras') wrote."
        ) from None


def _from_folder(path: Path, task: str) -> Any:
    if (path / "saved_model.pb").is_file():
        raise InputError(
            f"{path} is a SavedModel already; expected a .keras file or a preset folder. "
            "Other targets and precisions: tfvllm simplify SRC DST."
        )
    config = _json(path / "config.json")
    if config is None:
        inside = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
        raise InputError(
            f"{path} has no readable config.json (found: {inside}); expected a folder that save_to_preset wrote, or a "
            "Hugging Face folder."
        )
    if task == "embed":
        return _embedder(path)
    if task == "classify":
        _check_head(path, config)
    import keras_nlp

    import tfvllm.families.registry  # noqa: F401  registers the classes of shrunk models

    try:
        if task == "generate" and config.get("model_type") in _MENDED:
            return _mended(path, config)
        return getattr(keras_nlp.models, _HUB_CLASS[task]).from_preset(str(path))
    except Exception as error:
        raise InputError(
            f"{path} does not load as a keras-nlp {_HUB_CLASS[task]}, which task {task!r} takes: {_line(error)}"
        ) from None


# Model type -> keras-hub's converter, and how the names of keras-nlp's classes begin.
_MENDED = {
    "gpt2": ("convert_gpt2", "GPT2"),
    "llama": ("convert_llama3", "Llama3"),
    "mistral": ("convert_mistral", "Mistral"),
    "qwen2": ("convert_qwen", "Qwen"),
}


def _mended(path: Path, config: dict) -> Any:
    """A causal language model of a Hugging Face folder of which keras-hub 0.32 would lose something.

    Of Llama the epsilon of its norms, and a SentencePiece tokenizer; of Mistral what float16 does not hold; of GPT-2
    the feed-forward width where it is not four times the hidden one; of Qwen 2 whether it attends within a window; of
    all how texts begin, and of Llama and Qwen 2 a size of heads that is not hidden size / heads.
    """
    import keras_nlp

    from tfvllm.families.llama import SHRUNK, TASKS

    models, family = keras_nlp.models, config["model_type"]
    module, name = _MENDED[family]
    converter = importlib.import_module(f"keras_hub.src.utils.transformers.{module}")
    sizes = converter.convert_backbone_config(config)
    if family == "gpt2":
        sizes["intermediate_dim"] = config.get("n_inner") or sizes["intermediate_dim"]
    elif family == "llama":
        sizes["layer_norm_epsilon"] = config.get("rms_norm_eps", 1e-6)
    elif family == "qwen2":
        sizes["use_sliding_window_attention"] = sizes.pop("use_sliding_window")
    options = {}
    if isinstance(starts := (_json(path / "tokenizer_config.json") or {}).get("add_bos_token"), bool):
        options["add_start_token"] = starts
    if family == "llama" and _is_sentence_piece(path):
        name = "Llama"
        options["tokenizer"] = models.LlamaTokenizer(str(path / "tokenizer.model"))
    backbone_class, task_class = getattr(models, f"{name}Backbone"), getattr(models, f"{name}CausalLM")
    heads, head_dim = config.get("num_attention_heads"), config.get("head_dim")
    if family in ("llama", "qwen2") and head_dim not in (None, config["hidden_size"] // heads):
        backbone_class, task_class = SHRUNK[backbone_class], TASKS[task_class]
        groups, neurons = config["num_key_value_heads"], config["intermediate_size"]
        block = {"heads": heads, "kv_heads": groups, "head_dim": head_dim, "ffn": neurons}
        sizes["structure"] = {"decoder": [block] * config["num_hidden_layers"]}
    backbone = backbone_class(**sizes)
    with ExactLoader(str(path)) as loader:
        converter.convert_weights(backbone, loader, config)
    preprocessor_class = getattr(models, f"{name}CausalLMPreprocessor")
    if "tokenizer" not in options:
        options["tokenizer"] = preprocessor_class.tokenizer_cls.from_preset(str(path))
    return task_class(backbone, preprocessor_class(**options))


def _is_sentence_piece(path: Path) -> bool:
    """Whether the tokenizer of a folder of Llama's is the one of Llama 2, not the byte pairs of Llama 3."""
    decoder = json.dumps((_json(path / "tokenizer.json") or {}).get("decoder"))
    return (path / "tokenizer.model").is_file() and "ByteLevel" not in decoder


def _check_head(path: Path, config: dict) -> None:
    """keras-nlp gives a classifier without saved head a random one, and says nothing."""
    saved = (_json(path / "task.json") or {}).get("class_name", "")
    if saved.endswith("Classifier") and (path / "task.weights.h5").is_file():
        return
    if "registered_name" not in config:
        raise InputError(
            f"{path} is a Hugging Face folder, of which keras-nlp reads no classifier's head; expected a folder that a "
            "trained classifier's save_to_preset wrote. Or train one on it: tfvllm compress with teacher.preset."
        )
    raise InputError(
        f"{path} holds {f'a {saved}' if saved else 'a backbone'}, no trained classifier; expected a folder that a "
        "classifier's save_to_preset wrote."
    )


def _embedder(path: Path) -> Any:
    """What has a backbone and a text preprocessor: keras-nlp's embedder, else the frame of a classifier."""
    import keras_nlp

    import tfvllm.families.registry  # noqa: F401  registers the classes of shrunk models

    first: Exception | None = None
    for name, options in (("TextEmbedder", {}), ("TextClassifier", {"num_classes": 2})):
        try:
            return getattr(keras_nlp.models, name).from_preset(str(path), **options)
        except Exception as error:
            first = first or error
    raise InputError(
        f"{path} does not load as a text encoder with its tokenizer, which task 'embed' takes: {_line(first)}"
    )


def _json(file: Path) -> dict | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _line(error: Exception | None) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")

"""Saved Keras models as a task needs them: a `.keras` file, a keras-nlp preset folder, a Hugging Face folder."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tfvllm.errors import InputError

_HUB_CLASS = {"classify": "TextClassifier", "generate": "CausalLM", "translate": "Seq2SeqLM"}
_IN_PYTHON = "Load it in Python, where they are known, and call tfvllm.export(model, ...)."


def load(path: Path, task: str) -> Any:
    """The model saved in `path`, for `task`.

    A preset folder is what `save_to_preset` wrote, or a Hugging Face folder of a family that keras-nlp reads. Of the
    latter it reads the backbone and the tokenizer, not the head of a classifier.

    Raises:
        InputError: there is nothing, or no model that this process can load, or one that is for another task.
    """
    if not path.exists():
        raise InputError(f"no file {path}; expected a model saved by model.save('NAME.keras') or a preset folder.")
    return _from_folder(path, task) if path.is_dir() else _from_file(path)


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

    import tfvllm.models  # noqa: F401  registers the classes of shrunk models

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

    import tfvllm.models  # noqa: F401  registers the classes of shrunk models

    try:
        return getattr(keras_nlp.models, _HUB_CLASS[task]).from_preset(str(path))
    except Exception as error:
        raise InputError(
            f"{path} does not load as a keras-nlp {_HUB_CLASS[task]}, which task {task!r} takes: {_line(error)}"
        ) from None


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

    import tfvllm.models  # noqa: F401  registers the classes of shrunk models

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

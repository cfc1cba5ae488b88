"""Text classifiers to compress: from scratch, from a preset, from a file."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import keras_nlp
import numpy as np

from tfvllm import models
from tfvllm.compress.artifacts import load_model
from tfvllm.compress.training import cross_entropy
from tfvllm.errors import InputError
from tfvllm.files import located
from tfvllm.models.tokenizer import settle


def plain(model: keras.Model) -> keras.Model:
    """The same layers and weights without the preprocessor, for training on tokens."""
    return keras.Model(model.input, model.output)


def bert_tokens(vocabulary: Sequence[str], length: int) -> Any:
    """BERT's uncased preprocessor over `vocabulary`, cutting at `length` tokens."""
    tokenizer = keras_nlp.models.BertTokenizer(vocabulary=list(vocabulary), lowercase=True, strip_accents=True)
    return keras_nlp.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=length)


def bert_classifier(
    preprocessor: Any, *, classes: int, layers: int, heads: int, hidden: int, ffn: int, dropout: float
) -> keras.Model:
    """A BERT-shaped classifier with random weights."""
    if hidden % heads:
        raise InputError(f"expected hidden as a multiple of heads, found hidden: {hidden} and heads: {heads}.")
    backbone = keras_nlp.models.BertBackbone(
        vocabulary_size=preprocessor.tokenizer.vocabulary_size(),
        num_layers=layers,
        num_heads=heads,
        hidden_dim=hidden,
        intermediate_dim=ffn,
        max_sequence_length=preprocessor.sequence_length,
        dropout=dropout,
    )
    return keras_nlp.models.BertTextClassifier(
        backbone=backbone, num_classes=classes, dropout=dropout, preprocessor=preprocessor
    )


def from_preset(preset: str, classes: int, length: int) -> keras.Model:
    """A classifier with a new head on a preset's backbone: a keras-nlp name, a folder, a file, or `package:path`.

    Raises:
        InputError: there is no such preset, or it reads fewer than `length` tokens.
    """
    try:
        path = located(preset)
    except InputError as error:
        raise InputError(f"teacher.preset: {error}") from None
    name = preset if path is None else str(path)
    try:
        if path is not None and path.is_file():
            trained = models.load(path, "classify")
            if not isinstance(trained, keras_nlp.models.TextClassifier) or trained.preprocessor is None:
                raise InputError(
                    f"expected a keras_nlp TextClassifier with its preprocessor in {path}, found a "
                    f"{type(trained).__name__}."
                )
            model = type(trained)(backbone=trained.backbone, preprocessor=trained.preprocessor, num_classes=classes)
        else:
            model = keras_nlp.models.TextClassifier.from_preset(name, num_classes=classes)
    except InputError as error:
        raise InputError(f"teacher.preset: {error}") from None
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(
            f"teacher.preset: expected a keras-nlp preset, a folder with a Hugging Face model or the .keras file of a "
            f"text classifier, could not load {name}: {line}"
        ) from error
    longest = getattr(model.backbone, "max_sequence_length", None) or length
    if length > longest:
        raise InputError(f"data.max_length: expected at most {longest} tokens, as the preset allows, found {length}.")
    model.preprocessor.sequence_length = length
    settle(model.preprocessor.tokenizer, untrained=True)
    if getattr(model.preprocessor.tokenizer, "split_on_cjk", True) is False:
        raise InputError(
            f"teacher.preset: {name} keeps Chinese characters together (tokenize_chinese_chars: false), which "
            "keras-nlp forgets when it saves a model. Use a preset that splits them."
        )
    return model


def from_file(path: Path, classes: int, length: int) -> keras.Model:
    """A trained classifier from a `.keras` file or a folder of `save_to_preset`, cutting at `length` tokens.

    Raises:
        InputError: it does not load, is no keras-nlp text classifier with a preprocessor, has other classes, gives each
            class a probability by itself, or reads fewer than `length` tokens.
    """
    if path.is_dir() and not (path / "task.json").is_file():
        raise InputError(
            f"teacher.model: expected a .keras file or a folder with a trained classifier (task.json, written by its "
            f"save_to_preset), found neither in {path}. A folder without a head is for teacher.preset."
        )
    try:
        if path.is_dir():
            model = keras_nlp.models.TextClassifier.from_preset(str(path))
        else:
            model = load_model(path)
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(f"teacher.model: expected a saved Keras model, could not load {path}: {line}") from error
    if not isinstance(model, keras_nlp.models.TextClassifier) or model.preprocessor is None:
        raise InputError(
            f"teacher.model: expected a keras_nlp TextClassifier with its preprocessor, found {type(model).__name__}."
        )
    if model.num_classes != classes:
        raise InputError(f"teacher.model: expected {classes} classes as in the data, found {model.num_classes}.")
    cross_entropy(model)  # refuses a head that does not choose between the classes
    longest = getattr(model.backbone, "max_sequence_length", None) or length
    if length > longest:
        raise InputError(
            f"data.max_length: expected at most {longest} tokens, as teacher.model allows, found {length}."
        )
    model.preprocessor.sequence_length = length
    return model


def stated_labels(path: Path) -> list[str] | None:
    """The classes in the order of a saved classifier's outputs, where something beside it states them.

    A compress run writes them into the `result.json` beside its models; Hugging Face's `config.json` has `id2label`.
    """
    folder = path if path.is_dir() else path.parent
    names: Any = _json(folder / "result.json").get("labels")
    if names is None:
        found = _json(folder / "config.json").get("id2label")
        if isinstance(found, dict) and sorted(found) == sorted(map(str, range(len(found)))):
            names = [found[str(i)] for i in range(len(found))]
            if names == [f"LABEL_{i}" for i in range(len(names))]:  # what is written where nobody named them
                names = None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class Order:
    """How well a classifier's outputs fit the labels as they stand, and in the order that fits best.

    `best[i]` is the label that output i stands for there; `better` says whether the difference is beyond chance.
    """

    accuracy: float
    best: tuple[int, ...]
    best_accuracy: float
    better: bool


def best_order(predicted: np.ndarray, labels: np.ndarray, classes: int) -> Order:
    """Looks for another order of the classes under which a classifier is much more often right.

    Args:
        predicted: the output with the largest logit, int[examples].
        labels: int[examples].

    Up to seven classes all orders are tried; beyond, outputs take their most frequent label, surest first. Better is
    an order with five points more and two standard errors of the examples on which the two orders differ (McNemar).
    """
    table = np.zeros((classes, classes), int)  # output, label
    np.add.at(table, (predicted, labels), 1)
    rows = np.arange(classes)
    if classes <= 7:
        best = max(itertools.permutations(range(classes)), key=lambda order: table[rows, list(order)].sum())
    else:
        chosen: dict[int, int] = {}
        for at in np.argsort(-table, axis=None, kind="stable"):
            output, label = divmod(int(at), classes)
            if output not in chosen and label not in chosen.values():
                chosen[output] = label
        best = tuple(chosen[output] for output in range(classes))
    as_is = predicted == labels
    other = np.asarray(best)[predicted] == labels
    gained, lost = int((other & ~as_is).sum()), int((as_is & ~other).sum())
    better = gained - lost > 2 * math.sqrt(max(1, gained + lost)) and gained - lost >= 0.05 * len(labels)
    return Order(float(as_is.mean()), best, float(other.mean()), better)

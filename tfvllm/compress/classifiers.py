"""Text classifiers to compress: from scratch, from a preset, from a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import keras_nlp

from tfvllm.compress.training import cross_entropy
from tfvllm.errors import InputError
from tfvllm.recipe import preset_folder


def save_model(model: keras.Model, path: Path) -> None:
    """Saves a model without its optimiser."""
    model.save(path, include_optimizer=False)


def load_model(path: Path) -> keras.Model:
    """Loads a `.keras` model, shrunk ones included, uncompiled."""
    import tfvllm.models  # noqa: F401  (registers the classes of shrunk models)

    return keras.saving.load_model(path, compile=False)


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
    """A classifier on a preset's backbone: a keras-nlp name, a folder, or `package:folder`.

    Raises:
        InputError: there is no such preset, or it reads fewer than `length` tokens.
    """
    name = preset_folder(preset)
    try:
        model = keras_nlp.models.TextClassifier.from_preset(name, num_classes=classes)
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(
            f"teacher.preset: expected a keras-nlp preset or a folder with a Hugging Face model, "
            f"could not load {name}: {line}"
        ) from error
    longest = getattr(model.backbone, "max_sequence_length", None) or length
    if length > longest:
        raise InputError(f"data.max_length: expected at most {longest} tokens, as the preset allows, found {length}.")
    model.preprocessor.sequence_length = length
    tokenizer = model.preprocessor.tokenizer
    if isinstance(tokenizer, keras_nlp.models.BertTokenizer) and tokenizer.lowercase:
        tokenizer.strip_accents = True  # BERT's uncased vocabularies have no accents; from_preset leaves this off
    return model


def from_file(path: Path, classes: int) -> keras.Model:
    """A trained classifier from a `.keras` file.

    Raises:
        InputError: it does not load, is no keras-nlp text classifier with a preprocessor, has other classes, or gives
            each class a probability by itself.
    """
    try:
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
    return model

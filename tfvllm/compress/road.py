"""The road: data, teacher, student, distillation, pruning, shrinking, export, simplifying, measuring, report."""

import json
from pathlib import Path
from typing import Any

import keras
import keras_nlp
import numpy as np

from tfvllm import data as text_data
from tfvllm.compress import training
from tfvllm.compress.console import Console
from tfvllm.compress.steps import Done, Workspace
from tfvllm.compress.vocabulary import learn_vocabulary
from tfvllm.errors import InputError
from tfvllm.files import digest, write_text
from tfvllm.recipe import Recipe, preset_folder


class Road:
    """One run: each method is one step and hands its result to the next."""

    def __init__(self, recipe: Recipe, workspace: Workspace, console: Console):
        self.recipe = recipe
        self.workspace = workspace
        self.console = console
        self._tokens: dict[str, training.Tokens] = {}
        self._teacher: keras.Model | None = None

    # --- data -------------------------------------------------------------------------------------------------------

    def data(self) -> Done:
        block = self.recipe.data
        if block.path is None:
            synthetic = block.synthetic.model_dump()
            folder = self.workspace.out / "data"
            marker = folder / "synthetic.json"
            if not marker.is_file() or json.loads(marker.read_text()) != synthetic:
                text_data.write_synthetic(folder, **synthetic, overwrite=True)
                write_text(marker, json.dumps(synthetic))
            self.text = text_data.load(folder, names=block.labels or {"0": "negative", "1": "positive"})
            self.text.notes.insert(0, text_data.SYNTHETIC_NOTE)
            source = "synthetic reviews"
        else:
            self.text = text_data.load(
                block.path,
                train=block.train,
                dev=block.dev,
                test=block.test,
                dev_share=block.dev_share,
                seed=self.recipe.seed,
                names=block.labels,
            )
            source = self.text.source

        def build(directory: Path, work: Path) -> dict[str, Any]:
            return {
                "source": source,
                "synthetic": block.path is None,
                "labels": self.text.labels,
                "train": len(self.text.train),
                "dev": len(self.text.dev),
                "test": len(self.text.test) if self.text.test else 0,
                "notes": self.text.notes,
            }

        content = {"digest": self.text.digest(), "max_length": block.max_length}
        done = self.workspace.do("data", content, [], build)
        for note in self.text.notes:
            self.console.line(f"  note: {note}")
        return done

    def tokens(self, split: str) -> training.Tokens:
        """The tokenised split, made once with the teacher's preprocessor, which the student shares."""
        if split not in self._tokens:
            self._tokens[split] = training.tokenize(getattr(self.text, split), self.teacher_model.preprocessor)
        return self._tokens[split]

    # --- teacher ----------------------------------------------------------------------------------------------------

    def teacher(self, data: Done) -> Done:
        block = self.recipe.teacher
        parameters: dict[str, Any] = {"seed": self.recipe.seed, **block.model_dump()}
        if block.model is not None:
            parameters = {"model": digest(Path(block.model))}
        elif block.preset is not None:
            for name in ("vocabulary", "layers", "heads", "hidden", "ffn", "dropout"):
                del parameters[name]

        def build(directory: Path, work: Path) -> dict[str, Any]:
            keras.utils.set_random_seed(self.recipe.seed)
            model = self._new_teacher()
            self._teacher = model
            trained = {}
            if block.epochs and block.model is None:
                trained = self._fit_teacher(model, work)
            save_model(model, directory / "model.keras")
            return {**trained, **self._describe(model)}

        done = self.workspace.do("teacher", parameters, [data], build)
        if self._teacher is None:
            self._teacher = load_model(done.directory / "model.keras")
        self.console.line(f"  teacher: {describe_scores(done.result)}")
        return done

    @property
    def teacher_model(self) -> keras.Model:
        assert self._teacher is not None
        return self._teacher

    def _new_teacher(self) -> keras.Model:
        block, length, classes = self.recipe.teacher, self.recipe.data.max_length, len(self.text.labels)
        if block.model is not None:
            return self._given_teacher(Path(block.model))
        if block.preset is not None:
            return preset_classifier(block.preset, classes, length)
        vocabulary = learn_vocabulary(self.text.train.texts, block.vocabulary)
        return bert_classifier(
            vocabulary,
            classes=classes,
            length=length,
            layers=block.layers,
            heads=block.heads,
            hidden=block.hidden,
            ffn=block.ffn,
            dropout=block.dropout,
        )

    def _given_teacher(self, path: Path) -> keras.Model:
        try:
            model = load_model(path)
        except Exception as error:
            line = " ".join(str(error).split())[:200]
            raise InputError(f"teacher.model: expected a saved Keras model, could not load {path}: {line}") from error
        if not isinstance(model, keras_nlp.models.TextClassifier) or model.preprocessor is None:
            raise InputError(
                f"teacher.model: expected a keras_nlp TextClassifier with its preprocessor, found {type(model).__name__}."
            )
        if model.num_classes != len(self.text.labels):
            raise InputError(
                f"teacher.model: expected {len(self.text.labels)} classes as in the data, found {model.num_classes}."
            )
        return model

    def _fit_teacher(self, model: keras.Model, work: Path) -> dict[str, Any]:
        block = self.recipe.teacher
        train = self.tokens("train")
        steps = block.epochs * -(-len(train) // block.batch_size)
        trained = plain_classifier(model)
        trained.compile(
            optimizer=training.adamw(block.learning_rate, steps, block.warmup, block.weight_decay),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=False,
        )
        return training.fit(
            trained,
            trained,
            train,
            self.tokens("dev"),
            epochs=block.epochs,
            batch_size=block.batch_size,
            seed=self.recipe.seed,
            state=work / "epochs",
            console=self.console,
            title="teacher",
        )

    # --- what is measured of a Keras model --------------------------------------------------------------------------

    def _describe(self, model: keras.Model) -> dict[str, Any]:
        function = training.logits_function(model)
        scores = {"dev_accuracy": training.accuracy(model, self.tokens("dev"), function=function)}
        if self.text.test:
            scores["test_accuracy"] = training.accuracy(model, self.tokens("test"), function=function)
        weights = [np.asarray(weight) for weight in model.weights]
        total = sum(weight.size for weight in weights)
        return {
            **scores,
            "parameters": int(total),
            "nonzero_share": float(sum(np.count_nonzero(weight) for weight in weights) / total),
        }


def describe_scores(result: dict[str, Any]) -> str:
    """One line: parameters and accuracies."""
    scores = [f"{split} accuracy {result[f'{split}_accuracy']:.2%}" for split in ("dev", "test") if f"{split}_accuracy" in result]
    return ", ".join([f"{result['parameters'] / 1e6:.2f} M parameters", *scores])


def save_model(model: keras.Model, path: Path) -> None:
    """Saves a model without its optimiser."""
    model.save(path, include_optimizer=False)


def load_model(path: Path) -> keras.Model:
    """Loads a `.keras` model for inference or further training."""
    return keras.saving.load_model(path, compile=False)


def plain_classifier(model: keras.Model) -> keras.Model:
    """The same layers and weights without the preprocessor, for training on tokens."""
    return keras.Model(model.input, model.output)


def bert_classifier(
    vocabulary: list[str], *, classes: int, length: int, layers: int, heads: int, hidden: int, ffn: int, dropout: float
) -> keras.Model:
    """A BERT-shaped classifier with random weights and an uncased WordPiece tokenizer."""
    tokenizer = keras_nlp.models.BertTokenizer(vocabulary=vocabulary, lowercase=True, strip_accents=True)
    backbone = keras_nlp.models.BertBackbone(
        vocabulary_size=len(vocabulary),
        num_layers=layers,
        num_heads=heads,
        hidden_dim=hidden,
        intermediate_dim=ffn,
        max_sequence_length=length,
        dropout=dropout,
    )
    return keras_nlp.models.BertTextClassifier(
        backbone=backbone,
        num_classes=classes,
        dropout=dropout,
        preprocessor=keras_nlp.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=length),
    )


def preset_classifier(preset: str, classes: int, length: int) -> keras.Model:
    """A classifier on a preset's backbone: a keras-nlp name, a folder, or `package:folder`."""
    name = preset_folder(preset)
    try:
        model = keras_nlp.models.TextClassifier.from_preset(name, num_classes=classes)
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(
            f"teacher.preset: expected a keras-nlp preset or a folder with a Hugging Face model, "
            f"could not load {name}: {line}"
        ) from error
    longest = getattr(model.backbone, "max_sequence_length", length)
    if length > longest:
        raise InputError(f"data.max_length: expected at most {longest} tokens, as the preset allows, found {length}.")
    model.preprocessor.sequence_length = length
    tokenizer = model.preprocessor.tokenizer
    if isinstance(tokenizer, keras_nlp.models.BertTokenizer) and tokenizer.lowercase:
        tokenizer.strip_accents = True  # BERT's uncased vocabularies have no accents; from_preset leaves this off
    return model

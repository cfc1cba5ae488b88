"""`task: classify`: sentences with a label, by accuracy."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import keras_nlp
import numpy as np
import tensorflow as tf

from tfvllm import data as text_data
from tfvllm.compress import batches, training
from tfvllm.compress.batches import Tokens
from tfvllm.compress.recipe import ClassifyRecipe
from tfvllm.compress.steps import StepResult
from tfvllm.compress.tasks import classifiers, classify_products
from tfvllm.compress.tasks.base import AnyModel, Lesson, Task
from tfvllm.compress.vocabulary import learn_vocabulary
from tfvllm.errors import InputError
from tfvllm.files import digest, write_text
from tfvllm.graph import probes


class Classify(Task[ClassifyRecipe]):
    """Text classification."""

    baseline = "teacher (Keras export)"
    score_name = "dev_accuracy"
    text: text_data.TextData
    preprocessor: Any = None  # the teacher's; the student shares it

    # --- data -------------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Reads the sentences, or writes synthetic ones."""
        block = self.recipe.data
        if block.path is None:
            assert block.synthetic is not None
            asked = block.synthetic.model_dump()
            folder = self.workspace.out / "data"
            made = folder / "synthetic.json"
            if not made.is_file() or json.loads(made.read_text()) != asked:
                text_data.write_synthetic(folder, **asked, overwrite=True)
                write_text(made, json.dumps(asked))
            self.text = text_data.load(folder, names=block.labels or {"0": "negative", "1": "positive"})
            self.text.notes.insert(0, text_data.SYNTHETIC_NOTE)
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
        self._put_in_order()

    def _put_in_order(self) -> None:
        """Numbers the labels as the teacher's outputs, where the recipe or something beside the teacher says how."""
        block = self.recipe.teacher
        if block.labels is not None:
            try:
                self.text = self.text.in_order(block.labels)
            except InputError as error:
                raise InputError(f"teacher.labels: {error}") from None
        elif block.model is not None and (stated := classifiers.stated_labels(Path(block.model))) is not None:
            try:
                self.text = self.text.in_order(stated)
            except InputError:
                self.text.notes.append(
                    f"the teacher calls its classes {', '.join(stated)}, the data {', '.join(self.text.labels)}: they "
                    "are taken to stand in this order; teacher.labels gives another"
                )

    @property
    def notes(self) -> list[str]:
        return self.text.notes

    def digest(self) -> str:
        return self.text.digest()

    def facts(self) -> dict[str, Any]:
        text, synthetic = self.text, self.recipe.data.path is None
        return {
            "source": "synthetic reviews" if synthetic else text.source,
            "synthetic": synthetic,
            "labels": text.labels,
            "train": len(text.train),
            "dev": len(text.dev),
            "test": len(text.test) if text.test else 0,
            "notes": text.notes,
        }

    def announced(self) -> str:
        text = self.text
        return f"{len(text.train)} sentences to train on, {len(text.dev)} dev, labels {', '.join(text.labels)}"

    def has(self, split: str) -> bool:
        return bool(getattr(self.text, split))

    # --- models -----------------------------------------------------------------------------------------------------

    def teacher_parameters(self) -> dict[str, Any]:
        block = self.recipe.teacher
        parameters: dict[str, Any] = block.model_dump()
        if block.model is not None:
            parameters = {"model": digest(*files_of(Path(block.model)))}
        elif block.preset is not None:
            for name in ("vocabulary", "layers", "heads", "hidden", "ffn", "dropout"):
                del parameters[name]
        parameters.pop("labels", None)  # the data's digest has their order
        return parameters

    def make_teacher(self, work: Path, fit: Callable[..., dict[str, Any]]) -> tuple[keras.Model, dict[str, Any]]:
        block = self.recipe.teacher
        model = self._untrained_teacher()
        self.adopt(model)
        if block.model is not None:
            self._check_order(model)
            return model, {}
        return model, fit(model, block, work, "teacher", average=block.average) if block.epochs else {}

    def _untrained_teacher(self) -> keras.Model:
        block, length, classes = self.recipe.teacher, self.recipe.data.max_length, len(self.text.labels)
        if block.model is not None:
            return classifiers.from_file(Path(block.model), classes, length)
        if block.preset is not None:
            return classifiers.from_preset(block.preset, classes, length)
        vocabulary = learn_vocabulary(self.text.train.texts, block.vocabulary)
        return classifiers.bert_classifier(
            classifiers.bert_tokens(vocabulary, length),
            classes=classes,
            layers=block.layers,
            heads=block.heads,
            hidden=block.hidden,
            ffn=block.ffn,
            dropout=block.dropout,
        )

    def adopt(self, teacher: keras.Model) -> None:
        self.preprocessor = teacher.preprocessor

    def _check_order(self, model: keras.Model) -> None:
        """Refuses a trained teacher whose outputs fit the labels far better in another order, unless it was given."""
        tokens, labels = self.rows("dev"), self.text.labels
        found = classifiers.best_order(training.predict_logits(model, tokens).argmax(-1), tokens.labels, len(labels))
        if not found.better:
            return
        other = ", ".join(labels[label] for label in found.best)
        told = (
            f"on dev its outputs fit the labels much better as {other} ({found.best_accuracy:.2%} right) than as "
            f"{', '.join(labels)} ({found.accuracy:.2%})"
        )
        if self.recipe.teacher.labels is None:
            raise InputError(
                f"teacher.model: expected the classes in the order of the data's labels; {told}. Give the order of its "
                f"outputs: teacher.labels: [{other}]"
            )
        self.console.line(f"  warning: teacher.labels: {told}; the order given is kept")

    def make_student(self, teacher: keras.Model) -> keras.Model:
        """Copied layers of the teacher, or a fresh BERT shape with its tokenizer."""
        from tfvllm.distillation import student_from

        block = self.recipe.student
        assert block is not None
        if block.start == "teacher":
            return student_from(teacher, layers=block.layers)
        if not isinstance(teacher, keras_nlp.models.BertTextClassifier):
            raise InputError(
                f"student.start: expected teacher (layers copied) for a {type(teacher).__name__}, found scratch: "
                "only BERT-shaped students can be made from scratch."
            )
        shape = teacher.backbone.get_config()
        return classifiers.bert_classifier(
            teacher.preprocessor,
            classes=len(self.text.labels),
            layers=block.layers,
            heads=block.heads or shape["num_heads"],
            hidden=block.hidden or shape["hidden_dim"],
            ffn=block.ffn or shape["intermediate_dim"],
            dropout=shape["dropout"],
        )

    # --- training ---------------------------------------------------------------------------------------------------

    def tokenize(self, split: str, model: keras.Model | None = None) -> Tokens:
        preprocessor = self.preprocessor if model is None else model.preprocessor
        return batches.tokenize(getattr(self.text, split), preprocessor)

    def trainable(self, model: keras.Model) -> keras.Model:
        return classifiers.plain(model)

    def loss(self, model: keras.Model) -> keras.losses.Loss:
        return training.cross_entropy(model)

    def score(self, model: keras.Model) -> training.Score:
        return training.dev_accuracy(model, self.rows("dev"))

    def losses(self, objective: Any) -> dict[str, Any]:
        from tfvllm.distillation import losses

        return {"logits": losses.ForwardKL(temperature=objective.temperature)}

    def lesson(self, objective: Any, teacher: StepResult, student: keras.Model, model_of: AnyModel) -> Lesson:
        train, change = self.rows("train"), None
        if objective.augment:
            tokenizer = self.preprocessor.tokenizer
            special = [tokenizer.token_to_id(token) for token in tokenizer.special_tokens]
            change = batches.random_words(objective.augment, special, getattr(tokenizer, "mask_token_id", None))
        if objective.hidden or objective.augment:
            return Lesson(model_of(teacher), train, change=change)
        # Every epoch asks the teacher the same, so it is asked once.
        train = replace(train, extra={"teacher_logits": self._teacher_logits(teacher, model_of)})
        return Lesson(training.recalled_teacher(len(self.text.labels)), train, from_logits={"teacher": True})

    def _teacher_logits(self, teacher: StepResult, model_of: AnyModel) -> np.ndarray:
        """What the teacher says to every training sentence, float32[sentences, classes]."""

        def build(directory: Path, work: Path) -> dict[str, Any]:
            with self.console.progress("teacher's logits", len(self.rows("train"))) as progress:
                logits = training.predict_logits(model_of(teacher), self.rows("train"), progress=progress)
            np.save(directory / "logits.npy", logits)
            return {}

        return np.load(self.workspace.do("teacher-logits", {}, [teacher], build).directory / "logits.npy")

    def calibration(self, count: int) -> tf.data.Dataset:
        """`count` training sentences, spread evenly over the file, with their labels, in batches of 32."""
        rows = np.unique(np.linspace(0, len(self.text.train) - 1, count).astype(int))
        texts = [self.text.train.texts[row] for row in rows]
        labels = [self.text.train.labels[row] for row in rows]
        return tf.data.Dataset.from_tensor_slices((texts, labels)).batch(32)

    def scores(self, model: keras.Model) -> dict[str, float]:
        """Accuracy on dev and test."""
        own = self.preprocessor.tokenizer.vocabulary_size() == model.preprocessor.tokenizer.vocabulary_size()
        function = training.logits_function(model)
        return {
            f"{split}_accuracy": training.accuracy(
                model, self.rows(split) if own else self.tokenize(split, model), function=function
            )
            for split in ("dev", "test")
            if self.has(split)
        }

    def describe(self, model: keras.Model) -> dict[str, Any]:
        return {**super().describe(model), "labels": self.text.labels}

    def shown(self, result: Mapping[str, Any]) -> list[str]:
        return [
            f"{split} accuracy {result[f'{split}_accuracy']:.2%}"
            for split in ("dev", "test")
            if f"{split}_accuracy" in result
        ]

    # --- products ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        if (wanted := self.recipe.simplify) is not None:
            probes.check_runs(wanted.target, wanted.precision)

    def export(self, model: StepResult, model_of: AnyModel, *, baseline: bool = False) -> StepResult:
        return classify_products.export(self.recipe, self.workspace, self.text, model, model_of, baseline=baseline)

    def simplify(self, exported: StepResult) -> StepResult:
        return classify_products.simplify(self.recipe, self.workspace, self.text, self.rows("dev").lengths, exported)

    def benchmark(
        self, products: Sequence[tuple[str, StepResult]], teacher: StepResult, model_of: AnyModel
    ) -> StepResult:
        return classify_products.benchmark(self.recipe, self.workspace, self.text, self.preprocessor, products)


def files_of(path: Path) -> list[Path]:
    """A file, or all files in a folder."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]

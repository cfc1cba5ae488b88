"""What text generation and translation have in common: rows of tokens, perplexity, teachers, what is distilled."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm import data as text_data
from tfvllm import models
from tfvllm.compress import batches, teacher_answers, training
from tfvllm.compress.batches import Tokens
from tfvllm.compress.steps import StepResult
from tfvllm.compress.tasks import language_products
from tfvllm.compress.tasks.base import AnyModel, AnyRecipe, Lesson, Task
from tfvllm.compress.tasks.classify import files_of
from tfvllm.errors import InputError
from tfvllm.families.matmuls import einsum_as_matmul
from tfvllm.files import digest, located, write_text
from tfvllm.graph import probes

_AT_ONCE = 16  # rows that are scored together
_SHAPE = ("vocabulary", "layers", "heads", "hidden", "ffn", "dropout")


class LanguageTask(Task[AnyRecipe]):
    """A task of language models: learnt token by token, judged by perplexity."""

    baseline = "teacher (tfvllm export)"
    score_name = "dev_perplexity"
    kind: str  # of synthetic data, see `tfvllm.data.write_synthetic`
    units: str  # what the data are counted in
    text: Any  # texts or pairs
    settings: dict[str, Any]  # how an export reads text: codec, start, stop and padding ids

    # --- data -------------------------------------------------------------------------------------------------------

    def read(self) -> None:
        block = self.recipe.data
        if block.path is None:
            assert block.synthetic is not None
            asked = {"kind": self.kind, **block.synthetic.model_dump()}
            folder = self.workspace.out / "data"
            made = folder / "synthetic.json"
            if not made.is_file() or json.loads(made.read_text()) != asked:
                text_data.write_synthetic(folder, **asked, overwrite=True)
                write_text(made, json.dumps(asked))
            self.text = self.load(folder)
            self.text.notes.insert(0, text_data.SYNTHETIC_NOTES[self.kind])
            return
        names = {split: getattr(block, split) for split in ("train", "dev", "test")}
        self.text = self.load(Path(block.path), **names, dev_share=block.dev_share, seed=self.recipe.seed)

    @abstractmethod
    def load(self, path: Path, **options: Any) -> Any:
        """The data in a file or folder."""

    @property
    def notes(self) -> list[str]:
        return self.text.notes

    def digest(self) -> str:
        return self.text.digest()

    def facts(self) -> dict[str, Any]:
        text, synthetic = self.text, self.recipe.data.path is None
        counts = {split: len(getattr(text, split) or ()) for split in ("train", "dev", "test")}
        source = f"synthetic {self.kind}" if synthetic else text.source
        return {"source": source, "synthetic": synthetic, "units": self.units, **counts, "notes": text.notes}

    def announced(self) -> str:
        text = self.text
        tests = f", {len(text.test)} test" if text.test else ""
        return f"{len(text.train)} {self.units} to train on, {len(text.dev)} dev{tests}"

    def has(self, split: str) -> bool:
        return bool(getattr(self.text, split))

    # --- models -----------------------------------------------------------------------------------------------------

    def teacher_parameters(self) -> dict[str, Any]:
        block = self.recipe.teacher
        known = {name: value for name, value in block.model_dump().items() if name not in _SHAPE}
        parameters: dict[str, Any] = {**known, "epochs": block.trained_epochs}
        if block.preset is None:
            parameters |= self.shape()
        elif (path := located(block.preset)) is not None:
            parameters["preset"] = digest(*files_of(path))
        return parameters

    def make_teacher(self, work: Path, fit: Callable[..., dict[str, Any]]) -> tuple[keras.Model, dict[str, Any]]:
        block = self.recipe.teacher
        if block.preset is None:
            model = self.scratch()
            scale_kernels(model)
        else:
            model = self._from_preset()
        self.adopt(model)
        if not block.trained_epochs:
            return model, {}
        return model, fit(model, block.model_copy(update={"epochs": block.trained_epochs}), work, "teacher")

    def _from_preset(self) -> keras.Model:
        name = self.recipe.teacher.preset
        try:
            model = models.load(name, self.recipe.task)
        except InputError as error:
            raise InputError(f"teacher.preset: {error}") from None
        self.refuse_other_models(model)
        return self.restored(_savable(model))

    def refuse_other_models(self, model: Any) -> None:
        """Refuses a teacher that cannot do the task, or that reads more than text."""
        from tfvllm.generation.model_generator import refuse_more_than_text

        try:
            refuse_more_than_text(model, {"generate": "CausalLM", "translate": "Seq2SeqLM"}[self.recipe.task])
        except InputError as error:
            raise InputError(f"teacher.preset: {error}") from None
        if getattr(model, "preprocessor", None) is None:
            raise InputError(
                f"teacher.preset: expected a model with its tokenizer, found a {type(model).__name__} without a "
                "preprocessor. Set model.preprocessor before saving it."
            )

    def shape(self) -> dict[str, Any]:
        """All that decides what `scratch` makes, beside the data."""
        return {name: getattr(self.recipe.teacher, name) for name in _SHAPE}

    @abstractmethod
    def scratch(self) -> keras.Model:
        """A model with random weights and a vocabulary learnt from the training data."""

    def adopt(self, teacher: keras.Model) -> None:
        self.settings = self.settings_of(teacher)
        self.inputs = {name: tensor.dtype for name, tensor in teacher.input.items()}
        self.pad_id = self.settings["pad_id"]
        self.vocabulary_size = int(teacher.output_shape[-1])

    @abstractmethod
    def settings_of(self, model: keras.Model) -> dict[str, Any]:
        """How an export of `model` reads text."""

    def make_student(self, teacher: keras.Model) -> keras.Model:
        from tfvllm.distillation import student_from

        try:
            return self.restored(student_from(teacher, layers=self.recipe.student.layers))
        except InputError as error:
            raise InputError(f"student.layers: {error}") from None

    # --- training ---------------------------------------------------------------------------------------------------

    def tokenize(self, split: str, model: keras.Model | None = None) -> Tokens:
        settings = self.settings if model is None else self.settings_of(model)
        return self.rows_of(split, settings)

    @abstractmethod
    def rows_of(self, split: str, settings: Mapping[str, Any]) -> Tokens:
        """The rows of a split, as an export with these settings reads text."""

    def trainable(self, model: keras.Model) -> keras.Model:
        return keras.Model(model.input, model.output)

    def loss(self, model: keras.Model) -> keras.losses.Loss:
        # keras-nlp's language models give logits; labels below 0 are of texts that the student wrote itself.
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)

    def score(self, model: keras.Model) -> training.Score:
        dev, total = self.rows("dev"), nll_function(model)
        return training.Score(
            self.score_name,
            lambda: math.exp(min(nll(model, dev, total)[0], 700.0)),
            lambda value: f"{value:.2f}",
            larger_is_better=False,
        )

    def losses(self, objective: Any) -> dict[str, Any]:
        from tfvllm.distillation import losses

        temperature = objective.temperature
        if objective.divergence == "jensen_shannon":
            return {"logits": losses.JensenShannon(beta=objective.beta, temperature=temperature)}
        kind = {"forward": losses.ForwardKL, "reverse": losses.ReverseKL}[objective.divergence]
        return {"logits": kind(temperature=temperature)}

    def lesson(self, objective: Any, teacher: StepResult, student: keras.Model, model_of: AnyModel) -> Lesson:
        rows, logits = self.taught(objective, teacher, model_of), {"teacher": True, "student": True}
        if objective.on_policy:
            from tfvllm.distillation import OnPolicy
            from tfvllm.rollouts import Rollouts

            policy = OnPolicy(
                Rollouts(student, temperature=objective.sampling_temperature),
                objective.on_policy,
                prompt=self.prompt_length,
                seed=self.recipe.seed,
            )

            def change(batch: tuple[Any, ...], rng: np.random.Generator) -> tuple[Any, ...]:
                features, labels, weights = batch
                x, y, kinds = policy.change(features, labels, weights, (int(rng.integers(1 << 30)),))
                # The tokens that were given mean nothing in a text that goes on otherwise.
                return x, np.where(kinds["task"] > 0, y, -1).astype("int32"), kinds

            names = ("task", "divergence")
            return Lesson(model_of(teacher), rows, logits, change, ahead=False, weights_for=names)
        if objective.hidden or objective.top_k is None or not objective.logits:
            return Lesson(model_of(teacher), rows, logits)
        kept = self._answers(objective, rows, teacher, model_of)
        return Lesson(kept, kept.among(rows), {"student": True})

    def taught(self, objective: Any, teacher: StepResult, model_of: AnyModel) -> Tokens:
        """The rows that a student learns from."""
        return self.rows("train")

    @abstractmethod
    def prompt_length(self, x: Any, y: Any, sample_weight: Any) -> np.ndarray:
        """How many tokens of each row are given where the student writes the rest itself, int[batch]."""

    def _answers(
        self, objective: Any, rows: Tokens, teacher: StepResult, model_of: AnyModel
    ) -> teacher_answers.KeptAnswers:
        """What the teacher says of every token: every epoch asks it the same, so it is asked once."""

        def build(directory: Path, work: Path) -> dict[str, Any]:
            size = teacher_answers.bytes_of(rows, objective.top_k, self.vocabulary_size)
            self.console.line(f"  {int(rows.lengths.sum()):,} tokens, about {size / 1e6:,.0f} MB on disk")
            with self.console.progress("teacher's answers", len(rows)) as progress:
                teacher_answers.write_answers(
                    *(self.trainable(model_of(teacher)), rows, directory),
                    top_k=objective.top_k,
                    temperature=objective.temperature,
                    progress=progress,
                )
            return {}

        parameters = {"top_k": objective.top_k, "temperature": objective.temperature, "rows": digest(rows.labels)}
        done = self.workspace.do("teacher-answers", parameters, [teacher], build)
        return teacher_answers.KeptAnswers(done.directory)

    def calibration(self, count: int) -> tf.data.Dataset:
        tokens = self.rows("train")
        rows = np.unique(np.linspace(0, len(tokens) - 1, count).astype(int))
        groups = [rows[at : at + 32] for at in range(0, len(rows), 32)]
        made = batches.Batches(tokens, 32).dataset().element_spec
        return tf.data.Dataset.from_generator(lambda: map(tokens.batch, groups), output_signature=made)

    def scores(self, model: keras.Model) -> dict[str, float]:
        """Perplexity per token, and bits per byte of text, which compares models of different vocabularies."""
        other = self.settings_of(model)["codec"].pieces.shape != self.settings["codec"].pieces.shape
        total, found = nll_function(model), {}
        for split in ("dev", "test"):
            if self.has(split):
                rows = self.tokenize(split, model) if other else self.rows(split)
                mean, count = nll(model, rows, total)
                found[f"{split}_perplexity"] = math.exp(min(mean, 700.0))
                found[f"{split}_bits_per_byte"] = mean * count / math.log(2) / self.learnt_bytes(split)
        return found

    @abstractmethod
    def learnt_bytes(self, split: str) -> int:
        """UTF-8 bytes of what a model is to predict in a split."""

    def shown(self, result: Mapping[str, Any]) -> list[str]:
        return [
            f"{split} perplexity {result[f'{split}_perplexity']:.2f}"
            for split in ("dev", "test")
            if f"{split}_perplexity" in result
        ]

    # --- products ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        if (wanted := self.recipe.export) is not None:
            probes.check_runs(wanted.target or probes.default_for(wanted.precision), wanted.precision)

    def simplify(self, exported: StepResult) -> StepResult:
        raise NotImplementedError  # no recipe of these tasks has the step

    def export(self, model: StepResult, model_of: AnyModel, *, baseline: bool = False) -> StepResult:
        options = {**self.export_options(), **({"precision": "float32", "target": None} if baseline else {})}
        return language_products.export(
            self.recipe, self.workspace, model, model_of, {k: v for k, v in options.items() if v is not None}
        )

    @abstractmethod
    def export_options(self) -> dict[str, Any]:
        """Options of `tfvllm.export` for the student; None: its default."""


def scale_kernels(model: keras.Model) -> None:
    """Scales the kernels of a new keras-nlp model to Glorot's deviation, sqrt(2 / (rows + columns)).

    Theirs, 0.02 whatever the size, is made for widths near 1000; at 128 it is a quarter of Glorot's, and the attention
    of a decoder to its source hardly begins to learn.
    """
    from tfvllm.pruning.prunable import prunable_weights

    for _, _, kernel, view in prunable_weights(model):
        found = float(np.std(np.asarray(kernel)))
        kernel.assign(kernel * (math.sqrt(2.0 / sum(view.matrix_shape)) / max(found, 1e-12)))


def _savable(model: Any) -> keras.Model:
    """The model, or the same as a class whose file says all of it: keras-nlp's Llama forgets a head that is tied."""
    from tfvllm.distillation import student_from

    try:
        told = models.adapter_for(model).config(model.backbone)
    except InputError:
        return model  # a family without an adapter: no layers are taken from it
    kept = model.backbone.get_config()
    return (
        student_from(model, layers={}, name=model.name) if any(told[name] for name in set(told) - set(kept)) else model
    )


def nll_function(model: keras.Model) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """(features, labels, weights) -> the sum of -log p in nats and the number of tokens, traced once."""
    wanted = list(model.input)

    @tf.function(reduce_retracing=True)
    def total(features: dict[str, tf.Tensor], labels: tf.Tensor, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with einsum_as_matmul(model):
            logits = model({name: features[name] for name in wanted}, training=False)
        logits = tf.boolean_mask(tf.cast(logits, tf.float32), weights > 0)
        labels = tf.boolean_mask(labels, weights > 0)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return tf.reduce_sum(losses), tf.size(losses)

    return total


def nll(model: keras.Model, tokens: Tokens, total: Callable | None = None) -> tuple[float, int]:
    """The mean of -log p over the tokens to be predicted, in nats, and how many there are."""
    total = total or nll_function(model)
    lost, count = 0.0, 0
    for batch in batches.Batches(tokens, _AT_ONCE):
        sums = total(*map(_tensors, batch))
        lost, count = lost + float(sums[0]), count + int(sums[1])
    return lost / max(count, 1), count


def _tensors(part: Any) -> Any:
    return tf.nest.map_structure(tf.convert_to_tensor, part)


def encoded(codec: Any, texts: Sequence[str], at_once: int = 512) -> list[list[int]]:
    """The tokens of each text, by the tokenizer of exports."""
    found: list[list[int]] = []
    for start in range(0, len(texts), at_once):
        found += codec.encode(tf.constant(list(texts[start : start + at_once]), tf.string)).to_list()
    return found


def padded(rows: Sequence[Sequence[int]], pad_id: int, length: int) -> np.ndarray:
    """int32[rows, length], filled up on the right."""
    array = np.full((len(rows), length), pad_id, "int32")
    for at, row in enumerate(rows):
        array[at, : len(row)] = row
    return array

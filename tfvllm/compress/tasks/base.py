"""What a task has to say to the steps of a run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import keras
import numpy as np
import tensorflow as tf

from tfvllm.compress.batches import Tokens
from tfvllm.compress.steps import StepResult, Workspace
from tfvllm.compress.training import Score

AnyRecipe = TypeVar("AnyRecipe")
AnyModel = Callable[[StepResult], keras.Model]


@dataclass(frozen=True)
class Lesson:
    """What a student is trained on: a teacher (a model or a cache of its answers), the rows, and what changes them."""

    teacher: Any
    train: Tokens
    from_logits: Mapping[str, bool] | None = None
    change: Callable | None = None
    ahead: bool = True  # see `batches.Batches`
    weights_for: Sequence[str] = ()


class Task(ABC, Generic[AnyRecipe]):
    """One task in one run. `read` comes first; `adopt` names the model whose tokens all others share."""

    baseline: str  # what reports call the teacher's SavedModel
    score_name: str  # of the figure that epochs are judged by, such as `dev_accuracy`; `scores` gives it too

    def __init__(self, recipe: AnyRecipe, workspace: Workspace):
        self.recipe: Any = recipe
        self.workspace = workspace
        self.console = workspace.console
        self._tokens: dict[str, Tokens] = {}

    # --- data -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def read(self) -> None:
        """Reads the data, or writes synthetic ones."""

    @property
    @abstractmethod
    def notes(self) -> list[str]:
        """What a reader of the report should know of the data."""

    @abstractmethod
    def digest(self) -> str:
        """A hash of all data."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Of the data, for the report: source, synthetic, train, dev, test (how many) and notes among them."""

    @abstractmethod
    def announced(self) -> str:
        """The data in a line."""

    @abstractmethod
    def has(self, split: str) -> bool:
        """Whether there is such a split: there need not be a test."""

    # --- models -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def teacher_parameters(self) -> dict[str, Any]:
        """All that the teacher depends on, beside the data."""

    @abstractmethod
    def make_teacher(self, work: Path, fit: Callable[..., dict[str, Any]]) -> tuple[keras.Model, dict[str, Any]]:
        """The trained teacher, which is adopted already, and what `fit(model, rates, work, title, average=…)` told."""

    @abstractmethod
    def adopt(self, teacher: keras.Model) -> None:
        """Takes the teacher's preprocessor, which all models of the run share."""

    @abstractmethod
    def make_student(self, teacher: keras.Model) -> keras.Model:
        """The untrained student."""

    # --- training ---------------------------------------------------------------------------------------------------

    def rows(self, split: str) -> Tokens:
        """The tokenised split, made once."""
        if split not in self._tokens:
            self._tokens[split] = self.tokenize(split)
        return self._tokens[split]

    @abstractmethod
    def tokenize(self, split: str, model: keras.Model | None = None) -> Tokens:
        """The rows of a split, by the preprocessor of `model` where its vocabulary is another than the teacher's."""

    def restored(self, model: keras.Model) -> keras.Model:
        """A loaded model with what saving forgets."""
        return model

    @abstractmethod
    def trainable(self, model: keras.Model) -> keras.Model:
        """The model as it is trained on rows: the same layers and weights."""

    @abstractmethod
    def loss(self, model: keras.Model) -> keras.losses.Loss:
        """The loss of the task itself."""

    @abstractmethod
    def score(self, model: keras.Model) -> Score:
        """By which epochs are judged."""

    @abstractmethod
    def losses(self, objective: Any) -> dict[str, Any]:
        """The loss on the teacher's logits, as `{"logits": loss}`."""

    @abstractmethod
    def lesson(self, objective: Any, teacher: StepResult, student: keras.Model, model_of: AnyModel) -> Lesson:
        """What the student is to learn from. Work that all epochs share is a step of its own."""

    @abstractmethod
    def calibration(self, count: int) -> tf.data.Dataset:
        """`count` training rows, spread evenly over the data, in batches of 32 as a compiled model is fitted on."""

    @abstractmethod
    def scores(self, model: keras.Model) -> dict[str, float]:
        """Figures of the model for the report, `<split>_<score>`."""

    @abstractmethod
    def shown(self, result: Mapping[str, Any]) -> list[str]:
        """The figures that `scores` gave, each as a few words."""

    def describe(self, model: keras.Model) -> dict[str, Any]:
        """The model's figures, its parameters, and the share of weights that are not zero."""
        result: dict[str, Any] = dict(self.scores(model))
        weights = [np.asarray(weight) for weight in model.weights]
        total = sum(weight.size for weight in weights)
        nonzero = sum(int(np.count_nonzero(weight)) for weight in weights)
        return {**result, "weights": int(total), "nonzero_share": nonzero / total}

    # --- products ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def check(self) -> None:
        """Refuses, before hours of training, a product that this machine cannot compute."""

    @abstractmethod
    def export(self, model: StepResult, model_of: AnyModel, *, baseline: bool = False) -> StepResult:
        """A step's Keras model as a SavedModel; `baseline` is the teacher's."""

    @abstractmethod
    def simplify(self, exported: StepResult) -> StepResult:
        """The graph simplifier on a SavedModel; only where the recipe asks for it."""

    @abstractmethod
    def benchmark(
        self, products: Sequence[tuple[str, StepResult]], teacher: StepResult, model_of: AnyModel
    ) -> StepResult:
        """Quality and speed of all SavedModels, taking turns in one run."""

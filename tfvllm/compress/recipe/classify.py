"""`task: classify`: sentences with a label."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tfvllm.compress.recipe.blocks import (
    BaseRecipe,
    Block,
    Count,
    Export,
    Part,
    Rate,
    Share,
    Training,
    Weight,
)


class Synthetic(Block):
    """Reviews written by the generator in `tfvllm.data`, not by people."""

    train: Count = 24000
    dev: Count = 2000
    test: Count = 2000
    seed: int = 7


class Data(Block):
    """Where the sentences come from: `path` (a folder or one TSV file), or `synthetic`."""

    path: str | None = None
    synthetic: Synthetic | None = None
    train: str = "train.tsv"
    dev: str = "dev.tsv"
    test: str | None = None
    dev_share: Annotated[float, Field(gt=0.0, le=0.4)] = 0.1
    labels: dict[str, str] = Field(default_factory=dict, description="label in the file: name to show")
    max_length: Annotated[int, Field(ge=8, le=512)] = Field(64, description="tokens; longer sentences are cut")

    @field_validator("labels", mode="before")
    @classmethod
    def _text_keys(cls, value: Any) -> Any:
        return {str(key): name for key, name in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_source(self) -> "Data":
        if self.path is not None and self.synthetic is not None:
            raise ValueError("expected either data.path or data.synthetic, found both")
        return self


class Teacher(Training):
    """A preset (`preset`), a trained Keras task (`model`), or else a BERT shape trained from scratch.

    `preset` is a keras-nlp preset name, a folder with a preset or a Hugging Face model, or `package:folder`, a folder
    inside an installed Python package; a new head is trained on it. `model` is taken as it is: a .keras file, or a
    folder that a classifier's `save_to_preset` wrote.
    """

    preset: str | None = None
    model: str | None = None
    labels: list[str] | None = Field(None, description="the data's labels in the order of the teacher's outputs")
    average: Count = Field(1, description="try the mean of the weights after the last epochs, this many")
    vocabulary: Annotated[int, Field(ge=100)] = Field(8000, description="most tokens of the learnt vocabulary")
    layers: Count = 4
    heads: Count = 4
    hidden: Count = 128
    ffn: Count = 512
    dropout: Share = 0.1

    @field_validator("labels", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        numbers = isinstance(value, list) and all(isinstance(item, int) for item in value)
        return [str(item) for item in value] if numbers else value

    @model_validator(mode="after")
    def _one_origin(self) -> "Teacher":
        if self.preset is not None and self.model is not None:
            raise ValueError("expected either teacher.preset or teacher.model, found both")
        return self


class Student(Block):
    """A smaller model: some of the teacher's layers, copied, or a fresh BERT shape."""

    start: Literal["teacher", "scratch"] = "teacher"
    layers: Count | list[Annotated[int, Field(ge=0)]] = Field(2, description="how many, or which ones (from 0)")
    heads: Count | None = None
    hidden: Count | None = None
    ffn: Count | None = None

    @model_validator(mode="after")
    def _copied_shape(self) -> "Student":
        shape = [name for name in ("heads", "hidden", "ffn") if getattr(self, name) is not None]
        if self.start == "teacher" and shape:
            raise ValueError(
                f"expected no student.{shape[0]} with start: teacher (copied layers keep the teacher's shape), "
                "found one; use start: scratch, or the shrink step"
            )
        if self.start == "scratch" and isinstance(self.layers, list):
            raise ValueError("expected student.layers as a count with start: scratch, found a list")
        return self


class Distill(Training):
    """Train the student on the teacher's logits (and hidden states) and the labels."""

    temperature: Annotated[float, Field(gt=0.0)] = 2.0
    logits: Weight = 0.8
    task: Weight = 0.2
    hidden: Weight = 0.0
    hidden_fade: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.0, description="share of the steps over which the weight of hidden falls to 0; 0: it stays"
    )
    rounds: Count | None = Field(
        None, description="train `epochs` this many times, each time more on what student and teacher differ most in"
    )
    augment: Share = Field(0.0, description="share of tokens replaced at random; the teacher judges the new text")

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Distill":
        if self.logits + self.task + self.hidden == 0:
            raise ValueError("expected a weight above 0 for logits, task or hidden, found 0 for each")
        if self.hidden_fade and not self.hidden:
            raise ValueError("expected distill.hidden above 0 with hidden_fade, found 0")
        if self.rounds and self.augment:
            raise ValueError("expected distill.rounds or distill.augment, found both")
        return self


class Shrink(Training):
    """Remove structure from the student, then distil again for `epochs` to recover.

    A float is the share removed, a whole number the count kept. The vocabulary is cut last, after recovery, so that
    teacher and student read the same token ids until then.
    """

    epochs: Annotated[int, Field(ge=0)] = 1
    learning_rate: Rate = 3e-4
    heads: Part | None = None
    ffn: Part | None = None
    width: Part | None = None
    vocabulary: Literal["seen"] | Part | None = Field(None, description="seen: keep the tokens that train uses")
    importance: Literal["taylor", "activation", "magnitude"] = "taylor"
    compensate: Literal["mean", "least_squares"] | None = Field(
        None, description="how what stays takes over from what goes; None: mean, where the family has biases"
    )
    calibration: Count = Field(1024, description="training sentences used to score importance")

    @model_validator(mode="after")
    def _something_to_remove(self) -> "Shrink":
        if (self.heads, self.ffn, self.width, self.vocabulary) == (None, None, None, None):
            raise ValueError(
                "expected at least one of shrink.heads, shrink.ffn, shrink.width, shrink.vocabulary, found none"
            )
        return self


class Simplify(Block):
    """The graph simplifier on the exported SavedModel."""

    target: Literal["portable", "onednn"] = "portable"
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    profile: Literal["data"] | str | None = Field(
        None,
        description="requests to be fast on, a JSON-lines file; data: single sentences and batches of 32 like dev's",
    )

    @model_validator(mode="after")
    def _int8_target(self) -> "Simplify":
        if self.precision == "int8" and self.target != "onednn":
            raise ValueError("expected simplify.target onednn for precision int8, found portable")
        return self


class Benchmark(Block):
    """Latency of student and teacher export, interleaved in one run."""

    shapes: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = Field(
        [[1, 32], [8, 32], [32, 32]], description="(batch, tokens of each sentence)"
    )
    repeats: Annotated[int, Field(ge=3)] = 40
    warmup: Annotated[int, Field(ge=1)] = 5


class ClassifyRecipe(BaseRecipe):
    """Sentiment and other classes of texts."""

    task: Literal["classify"] = "classify"
    data: Data = Data()  # type: ignore[call-arg]
    teacher: Teacher = Teacher()  # type: ignore[call-arg]
    student: Student | None = None
    distill: Distill | None = None
    shrink: Shrink | None = None
    export: Export | None = None
    simplify: Simplify | None = None
    benchmark: Benchmark | None = None

    @staticmethod
    def default_distill() -> Distill:
        """What a shrunk student recovers by, where no distill step says it."""
        return Distill()  # type: ignore[call-arg]  # all have defaults

    @model_validator(mode="after")
    def _products_fit(self) -> "ClassifyRecipe":
        if self.simplify and not self.export:
            raise ValueError("expected an export step beside simplify, found none: simplify works on its SavedModel")
        if self.export and self.benchmark:
            longest = max(length for _, length in self.benchmark.shapes)
            if longest > self.data.max_length:
                raise ValueError(
                    f"expected benchmark.shapes within data.max_length ({self.data.max_length} tokens), found {longest}"
                )
        return self


def unused_keys(recipe: Any) -> list[tuple[str, list[str], str]]:
    """(block, keys, why this run does not read them)."""
    shape = ["vocabulary", "layers", "heads", "hidden", "ffn", "dropout"]  # of a teacher from scratch
    training = list(Training.model_fields)
    if recipe.teacher.model is not None:
        return [("teacher", [*training, "average", *shape], "teacher.model is taken as it is")]
    found = []
    if recipe.teacher.preset is not None:
        found.append(("teacher", shape, "teacher.preset has its own"))
    if not recipe.teacher.epochs:
        found.append(("teacher", training[1:], "teacher.epochs is 0"))
    return found

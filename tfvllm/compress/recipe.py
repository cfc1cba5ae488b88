"""The recipe of a compress run: what it may say, checked before any work starts."""

import contextlib
import difflib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tfvllm.compress.recipe_errors import blocks, explain, kind
from tfvllm.errors import InputError

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


class _Training(_Block):
    """How a step trains: AdamW, linear warm-up, cosine decay to zero."""

    epochs: Annotated[int, Field(ge=0)] = 3
    batch_size: Count = 32
    learning_rate: Rate = 5e-4
    warmup: Share = Field(0.1, description="share of the steps over which the rate rises")
    weight_decay: Weight = 0.01


class Synthetic(_Block):
    """Reviews written by the generator in `tfvllm.data`, not by people."""

    train: Count = 24000
    dev: Count = 2000
    test: Count = 2000
    seed: int = 7


class Data(_Block):
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


class Teacher(_Training):
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


class Student(_Block):
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


class Distill(_Training):
    """Train the student on the teacher's logits (and hidden states) and the labels."""

    temperature: Annotated[float, Field(gt=0.0)] = 2.0
    logits: Weight = 0.8
    task: Weight = 0.2
    hidden: Weight = 0.0
    hidden_fade: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.0, description="share of the steps over which the weight of hidden falls to 0; 0: it stays"
    )
    augment: Share = Field(0.0, description="share of tokens replaced at random; the teacher judges the new text")

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Distill":
        if self.logits + self.task + self.hidden == 0:
            raise ValueError("expected a weight above 0 for logits, task or hidden, found 0 for each")
        if self.hidden_fade and not self.hidden:
            raise ValueError("expected distill.hidden above 0 with hidden_fade, found 0")
        return self


class Prune(_Block):
    """Magnitude pruning while the student is distilled (masks; they do not speed up serving by themselves)."""

    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    initial: Share = 0.0
    begin: Share = Field(0.1, description="share of the distillation's steps before the first mask")
    end: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.7, description="share at which the sparsity is reached")
    frequency: Count = 50

    @model_validator(mode="after")
    def _in_order(self) -> "Prune":
        if self.begin >= self.end:
            raise ValueError(f"expected prune.begin below prune.end, found {self.begin} and {self.end}")
        return self


Part = Annotated[float, Field(gt=0.0, lt=1.0)] | Count


class Shrink(_Training):
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


class Export(_Block):
    """The student as a SavedModel: strings in, `classes` and `scores` out."""

    check: Literal["here", "fresh"] = Field(
        "here", description="compare with the Keras model here or in a fresh process"
    )
    serving_kit: bool = Field(False, description="also write batching parameters, a Dockerfile and a KServe manifest")


class Simplify(_Block):
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


class Benchmark(_Block):
    """Latency of student and teacher export, interleaved in one run."""

    shapes: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = Field(
        [[1, 32], [8, 32], [32, 32]], description="(batch, tokens of each sentence)"
    )
    repeats: Annotated[int, Field(ge=3)] = 40
    warmup: Annotated[int, Field(ge=1)] = 5


class Recipe(_Block):
    """A whole compress run. A step that is left out is not done; `data` and `teacher` have defaults."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "model"
    task: Literal["classify"] = "classify"
    seed: int = 1
    data: Data = Data()  # type: ignore[call-arg]
    teacher: Teacher = Teacher()  # type: ignore[call-arg]
    student: Student | None = None
    distill: Distill | None = None
    prune: Prune | None = None
    shrink: Shrink | None = None
    export: Export | None = None
    simplify: Simplify | None = None
    benchmark: Benchmark | None = None

    @model_validator(mode="after")
    def _steps_fit(self) -> "Recipe":
        if self.prune and not (self.distill and self.distill.epochs):
            raise ValueError(
                "expected a distill step (with epochs) beside prune, found none: masks grow while it trains"
            )
        if self.simplify and not self.export:
            raise ValueError("expected an export step beside simplify, found none: simplify works on its SavedModel")
        if self.benchmark and not self.export:
            raise ValueError("expected an export step beside benchmark, found none: SavedModels are measured")
        if self.export and self.benchmark:
            longest = max(length for _, length in self.benchmark.shapes)
            if longest > self.data.max_length:
                raise ValueError(
                    f"expected benchmark.shapes within data.max_length ({self.data.max_length} tokens), found {longest}"
                )
        return self


def read_recipe(
    path: str | os.PathLike, *, data: str | os.PathLike | None = None, overrides: Sequence[str] = ()
) -> Recipe:
    """Reads and checks a recipe file.

    Args:
        path: a YAML file.
        data: takes the place of `data.path` and of `data.synthetic`.
        overrides: `key=value` texts; the key has dots (`teacher.epochs=1`), the value is YAML.

    Raises:
        InputError: one line that names the key, what was expected and the nearest valid name.

    Example:
        >>> from tfvllm.compress.recipe import read_recipe
        >>> read_recipe("examples/sentiment.yaml", overrides=["teacher.epochs=1"]).teacher.epochs
        1
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.y*ml")], 1)
        hint = f"; is it {path.parent / near[0]}?" if near else "; expected a YAML recipe"
        raise InputError(f"cannot read the recipe {path}: {error.strerror}{hint}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found the byte 0x{error.object[error.start]:02x}.") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where}: expected YAML, found {getattr(error, 'problem', 'an error')}.") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys such as data: and teacher:, found {kind(content)}.")
    for override in overrides:
        _override(content, override)
    if data is not None:
        block = content.get("data")
        block = dict(block) if isinstance(block, dict) else {}
        block.pop("synthetic", None)
        content["data"] = {**block, "path": str(data)}
    return parse_recipe(content, where=str(path))


def parse_recipe(content: dict, *, where: str = "recipe") -> Recipe:
    """Checks a recipe given as nested dicts; raises InputError as `read_recipe` does.

    Example:
        >>> from tfvllm.compress.recipe import parse_recipe
        >>> try:
        ...     parse_recipe({"teacher": {"layer": 2}})
        ... except tfvllm.errors.InputError as error:
        ...     print("layers" in str(error))
        True
    """
    try:
        recipe = Recipe.model_validate(_floats(content, Recipe))
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, content, Recipe)}") from None
    if recipe.data.path is None and recipe.data.synthetic is None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"synthetic": Synthetic()})})
    if recipe.data.path is not None and not Path(recipe.data.path).exists():
        raise InputError(f"{where}: data.path: expected a folder or a TSV file, found no {recipe.data.path}.")
    if recipe.teacher.model is not None and not Path(recipe.teacher.model).exists():
        raise InputError(
            f"{where}: teacher.model: expected a .keras file or a preset folder, found no {recipe.teacher.model}."
        )
    profile = recipe.simplify.profile if recipe.simplify else None
    if profile not in (None, "data") and not Path(profile).is_file():
        raise InputError(f"{where}: simplify.profile: expected data or a JSON-lines file, found no {profile}.")
    if recipe.teacher.preset is not None:
        preset_folder(recipe.teacher.preset)
    return recipe


_SHAPE = ("vocabulary", "layers", "heads", "hidden", "ffn", "dropout")  # of a teacher from scratch


def unused_keys(recipe: Recipe) -> list[str]:
    """What the recipe says and this run does not read, each with the reason, such as a trained teacher's `epochs`."""
    found = []

    def passed_over(block: str, keys: Sequence[str], reason: str) -> None:
        given = [key for key in keys if key in getattr(recipe, block).model_fields_set]
        if given:
            found.append(f"not used: {', '.join(f'{block}.{key}' for key in given)} ({reason})")

    training = list(_Training.model_fields)
    if recipe.teacher.model is not None:
        passed_over("teacher", [*training, "average", *_SHAPE], "teacher.model is taken as it is")
    elif recipe.teacher.preset is not None:
        passed_over("teacher", _SHAPE, "teacher.preset has its own")
    for block in ("teacher", "distill", "shrink"):
        if (part := getattr(recipe, block)) and not part.epochs and recipe.teacher.model is None:
            passed_over(block, training[1:], f"{block}.epochs is 0")
    if recipe.data.path is None:
        passed_over("data", ("train", "dev", "test", "dev_share"), "the data are synthetic")
    elif Path(recipe.data.path).is_file():
        passed_over("data", ("train", "dev", "test"), "data.path is one file, which is split")
    else:
        passed_over("data", ("dev_share",), "data.path is a folder, whose files are taken as they are")
    if recipe.shrink and (recipe.shrink.heads, recipe.shrink.ffn, recipe.shrink.width) == (None, None, None):
        keys = [*training, "importance", "compensate", "calibration"]
        passed_over("shrink", keys, "without shrink.heads, shrink.ffn or shrink.width only the vocabulary is cut")
    return found


def preset_folder(preset: str) -> str:
    """Resolves `package:folder` to a folder and checks a folder; any other name goes to keras-nlp as it is."""
    package, colon, inside = preset.partition(":")
    if colon and package.isidentifier() and "//" not in inside:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise InputError(
                f"teacher.preset: expected an installed Python package, found no {package}; "
                f"pip install {package.replace('_', '-')}, or --set teacher.preset=FOLDER."
            )
        preset = str(Path(spec.origin).parent / inside)
        if not Path(preset).is_dir():
            raise InputError(f"teacher.preset: expected a folder {inside} inside the package {package}, found none.")
    elif preset.startswith((".", "/", "~")) and not Path(preset).expanduser().is_dir():
        raise InputError(f"teacher.preset: expected a folder, found no {preset}.")
    return str(Path(preset).expanduser()) if Path(preset).expanduser().is_dir() else preset


def _override(content: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set: expected key=value such as teacher.epochs=1, found {override!r}.")
    *parents, last = key.strip().split(".")
    block = content
    for parent in parents:
        if block.get(parent) is None:
            block[parent] = {}
        block = block[parent]
        if not isinstance(block, dict):
            raise InputError(f"--set {override}: expected {parent} to be a block of keys, found {kind(block)}.")
    try:
        block[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"--set {override}: expected a YAML value, found {value!r}.") from None


def _floats(content: Any, model: type[BaseModel]) -> Any:
    """Reads `5e-4`, which YAML 1.1 takes for text, as the number it is where a number is expected; `{}` for `step:`."""
    if not isinstance(content, dict):
        return content
    read = {}
    for key, value in content.items():
        field = model.model_fields.get(key)
        if field is not None:
            block = next(blocks(field.annotation), None)
            if value is None and not field.is_required() and field.annotation is block:
                value = {}
            elif block is not None:
                value = _floats(value, block)
            elif isinstance(value, str) and field.annotation is float:
                with contextlib.suppress(ValueError):
                    value = float(value)
        read[key] = value
    return read

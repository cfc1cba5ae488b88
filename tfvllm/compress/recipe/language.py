"""`task: generate` and `task: translate`: language models."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tfvllm.compress.recipe.blocks import BaseRecipe, Block, Count, Export, Part, Rate, Share, Training, Weight

Length = Annotated[int, Field(ge=8, le=32768)]


class Synthetic(Block):
    """Texts or pairs written by a generator in `tfvllm.data`, not by people."""

    train: Count = 20000
    dev: Count = 500
    test: Count = 500
    seed: int = 7


class _Data(Block):
    path: str | None = None
    synthetic: Synthetic | None = None
    train: str | None = Field(None, description="the file in the folder; None: the one called train")
    dev: str | None = None
    test: str | None = None
    dev_share: Annotated[float, Field(gt=0.0, le=0.4)] = 0.1

    @model_validator(mode="after")
    def _one_source(self) -> "_Data":
        if self.path is not None and self.synthetic is not None:
            raise ValueError("expected either data.path or data.synthetic, found both")
        return self


class Texts(_Data):
    """Texts: a file (.txt, or .jsonl with text, or with prompt and completion) or a folder of them, or `synthetic`."""

    max_length: Length = Field(128, description="tokens of a row; longer texts are cut into several")


class Pairs(_Data):
    """Sentence pairs: a TSV file, a folder, two parallel files told apart by their endings, or `synthetic`."""

    source: str | None = Field(None, description="ending of the files to translate from, such as de")
    target: str | None = Field(None, description="ending of the files to translate to, such as en")
    swap: bool = Field(False, description="the second column is what is translated from")
    max_length: Length = Field(64, description="tokens of a translation; longer ones are cut")
    max_source_length: Length | None = Field(None, description="tokens of a source; None: as max_length")

    @model_validator(mode="after")
    def _both_endings(self) -> "Pairs":
        if (self.source is None) != (self.target is None):
            raise ValueError("expected data.source and data.target together, found one of them")
        if self.swap and self.source is not None:
            raise ValueError("expected data.swap, or data.source and data.target the other way round, found both")
        return self


class Teacher(Training):
    """A model from where it is (`preset`), or one trained from scratch: a GPT-2 shape, to translate a BART shape.

    `preset` is a keras-nlp preset name, a folder with one or with a Hugging Face model, a `.keras` file, a GGUF file,
    or `package:path` inside an installed Python package. It is taken as it is unless `epochs` asks for training.
    """

    preset: str | None = None
    epochs: Annotated[int, Field(ge=0)] | None = Field(  # type: ignore[assignment]
        None, description="None: 3 from scratch, 0 of a preset"
    )
    vocabulary: Annotated[int, Field(ge=300)] = Field(
        4000, description="most tokens of the learnt byte-pair vocabulary"
    )
    layers: Count = 4
    heads: Count = 4
    hidden: Count = 128
    ffn: Count = 512
    dropout: Share = 0.1

    @model_validator(mode="after")
    def _heads_fit(self) -> "Teacher":
        if self.preset is None and self.hidden % self.heads:
            raise ValueError(
                "expected teacher.hidden as a multiple of teacher.heads, found "
                f"hidden: {self.hidden} and heads: {self.heads}"
            )
        return self

    @property
    def trained_epochs(self) -> int:
        return self.epochs if self.epochs is not None else 3 if self.preset is None else 0


Layers = Count | list[Annotated[int, Field(ge=0)]]


class Student(Block):
    """Some of the teacher's layers, copied; `shrink` takes away what is inside them."""

    layers: Layers | dict[Literal["encoder", "decoder"], Layers] = Field(
        2, description="how many, or which ones (from 0)"
    )


class Distill(Training):
    """Train the student on the teacher's logits, token by token, and on the data."""

    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward"
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.5, description="of jensen_shannon")
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    logits: Weight = 0.8
    task: Weight = 0.2
    hidden: Weight = 0.0
    hidden_fade: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.0, description="share of the steps over which the weight of hidden falls to 0; 0: it stays"
    )
    rounds: Count | None = Field(
        None, description="train `epochs` this many times, each time more on what student and teacher differ most in"
    )
    top_k: Count | None = Field(
        32, description="the teacher's largest logits of each token are kept on disk; None: it runs at every step"
    )
    on_policy: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.0, description="share of the batches that the student itself writes"
    )
    sampling_temperature: Annotated[float, Field(gt=0.0)] = Field(1.0, description="of what the student writes")

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Distill":
        if self.logits + self.task + self.hidden == 0:
            raise ValueError("expected a weight above 0 for logits, task or hidden, found 0 for each")
        if self.hidden_fade and not self.hidden:
            raise ValueError("expected distill.hidden above 0 with hidden_fade, found 0")
        if self.rounds and self.on_policy:
            raise ValueError("expected distill.rounds or distill.on_policy, found both")
        if self.on_policy and not self.logits:
            raise ValueError("expected distill.logits above 0 with on_policy (the teacher judges the texts), found 0")
        return self


class DistillTranslation(Distill):
    """The same; `targets: teacher` trains on the teacher's own translations (sequence-level distillation)."""

    targets: Literal["references", "teacher"] = "references"
    beams: Count = Field(4, description="of the teacher's translations; 1: greedy")


class Shrink(Training):
    """Remove structure from the student, then distil again for `epochs` to recover.

    A float is the share removed, a whole number the count kept. The vocabulary is cut last, after recovery, so that
    teacher and student read the same token ids until then.
    """

    epochs: Annotated[int, Field(ge=0)] = 1
    learning_rate: Rate = 3e-4
    heads: Part | None = Field(None, description="with grouped queries whole groups go")
    ffn: Part | None = None
    width: Part | None = None
    experts: Part | None = None
    vocabulary: Literal["seen"] | Part | None = Field(None, description="seen: keep the tokens that train uses")
    importance: Literal["taylor", "activation", "magnitude"] = "taylor"
    adaptive: bool = Field(False, description="one budget over all layers instead of the same share in each")
    compensate: Literal["mean", "least_squares"] | None = Field(
        None, description="how what stays takes over from what goes; None: mean, where the family has biases"
    )
    calibration: Count = Field(256, description="training rows used to score importance")

    @model_validator(mode="after")
    def _something_to_remove(self) -> "Shrink":
        units = (self.heads, self.ffn, self.width, self.experts, self.vocabulary)
        if all(unit is None for unit in units):
            raise ValueError(
                "expected at least one of shrink.heads, shrink.ffn, shrink.width, shrink.experts, shrink.vocabulary, "
                "found none"
            )
        return self


class _LanguageExport(Export):
    precision: Literal["float32", "bfloat16"] = "float32"
    target: Literal["portable", "onednn"] | None = Field(None, description="None: portable for float32")


class ExportGenerator(_LanguageExport):
    """The student as a SavedModel: prompts in, texts out."""

    max_length: Length | None = Field(
        None, description="tokens of prompt and answer together; None: as data.max_length"
    )
    max_new_tokens: Count = 64


class ExportTranslator(_LanguageExport):
    """The student as a SavedModel: sources in, translations out."""

    beams: Count = 1
    length_penalty: Weight = 1.0


class Benchmark(Block):
    """Speed of the student's and the teacher's SavedModels and of the teacher in keras-nlp, interleaved in one run."""

    batches: list[Count] = Field([1, 8], min_length=1)
    prompt_tokens: Count = Field(16, description="words of a prompt, from the dev data (generate)")
    new_tokens: Annotated[int, Field(ge=2)] = Field(48, description="most tokens of an answer")
    repeats: Annotated[int, Field(ge=1)] = 5
    warmup: Annotated[int, Field(ge=1)] = 1
    examples: Annotated[int, Field(ge=0)] = Field(20, description="shown side by side in the report")


class _LanguageRecipe(BaseRecipe):
    teacher: Teacher = Teacher()  # type: ignore[call-arg]
    student: Student | None = None
    shrink: Shrink | None = None
    benchmark: Benchmark | None = None

    @property
    def simplify(self) -> None:
        """A generator is written with its loop as fast as it gets: there is nothing left to simplify."""


class GenerateRecipe(_LanguageRecipe):
    """Text generation."""

    task: Literal["generate"] = "generate"
    data: Texts = Texts()  # type: ignore[call-arg]
    distill: Distill | None = None
    export: ExportGenerator | None = None

    @staticmethod
    def default_distill() -> Distill:
        """What a shrunk student recovers by, where no distill step says it."""
        return Distill()  # type: ignore[call-arg]  # all have defaults

    @model_validator(mode="after")
    def _one_side(self) -> "GenerateRecipe":
        if self.student and isinstance(self.student.layers, dict) and "encoder" in self.student.layers:
            raise ValueError(
                "expected student.layers of a decoder alone with task: generate, found those of an encoder"
            )
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> "GenerateRecipe":
        if self.export and self.benchmark:
            longest = self.export.max_length or self.data.max_length
            asked = self.benchmark.prompt_tokens + self.benchmark.new_tokens
            if asked > longest:
                raise ValueError(
                    "expected benchmark.prompt_tokens and new_tokens within export.max_length or data.max_length "
                    f"({longest} tokens), found {asked}"
                )
        return self


class TranslateRecipe(_LanguageRecipe):
    """Machine translation."""

    task: Literal["translate"] = "translate"
    data: Pairs = Pairs()  # type: ignore[call-arg]
    distill: DistillTranslation | None = None
    export: ExportTranslator | None = None

    @staticmethod
    def default_distill() -> DistillTranslation:
        """What a shrunk student recovers by, where no distill step says it."""
        return DistillTranslation()  # type: ignore[call-arg]  # all have defaults


def unused_keys(recipe: Any) -> list[tuple[str, list[str], str]]:
    """(block, keys, why this run does not read them)."""
    training = list(Training.model_fields)
    teacher, found = recipe.teacher, []
    if teacher.preset is not None:
        found.append(
            ("teacher", ["vocabulary", "layers", "heads", "hidden", "ffn", "dropout"], "teacher.preset has its own")
        )
    if not teacher.trained_epochs:
        found.append(("teacher", training[1:], "teacher.epochs is 0"))
    if recipe.distill and recipe.distill.rounds:
        found.append(("distill", ["top_k"], "in rounds the teacher runs at every step"))
    elif recipe.distill and recipe.distill.on_policy:
        found.append(("distill", ["top_k"], "the teacher judges what the student writes"))
    elif recipe.distill and recipe.distill.hidden:
        found.append(("distill", ["top_k"], "hidden states are not kept"))
    if recipe.distill and not recipe.distill.on_policy:
        found.append(("distill", ["sampling_temperature"], "distill.on_policy is 0"))
    if recipe.distill and recipe.distill.divergence != "jensen_shannon":
        found.append(("distill", ["beta"], f"distill.divergence is {recipe.distill.divergence}"))
    if recipe.distill and getattr(recipe.distill, "targets", None) == "references":
        found.append(("distill", ["beams"], "distill.targets is references"))
    if recipe.task == "translate" and recipe.export and recipe.export.beams == 1:
        found.append(("export", ["length_penalty"], "export.beams is 1"))
    return found

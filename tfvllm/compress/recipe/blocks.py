"""What the recipes of all tasks have in common: how a block of keys is read, how a step trains, what may be removed."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Part = Annotated[float, Field(gt=0.0, lt=1.0)] | Count  # the share that goes, or how many stay


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


class Training(Block):
    """How a step trains: AdamW, linear warm-up, cosine decay to zero."""

    epochs: Annotated[int, Field(ge=0)] = 3
    batch_size: Count = 32
    learning_rate: Rate = 5e-4
    warmup: Share = Field(0.1, description="share of the steps over which the rate rises")
    weight_decay: Weight = 0.01


class Prune(Block):
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


class Export(Block):
    """The student as a SavedModel."""

    check: Literal["here", "fresh"] = Field(
        "here", description="compare with the Keras model here or in a fresh process"
    )
    serving_kit: bool = Field(False, description="also write batching parameters, a Dockerfile and a KServe manifest")


class BaseRecipe(Block):
    """A whole compress run. A step that is left out is not done; `data` and `teacher` have defaults."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "model"
    task: Any
    seed: Annotated[int, Field(ge=0)] = 1
    data: Any
    teacher: Any
    student: Any = None
    distill: Any = None
    prune: Prune | None = None
    shrink: Any = None
    export: Any = None
    benchmark: Any = None

    @model_validator(mode="after")
    def _steps_fit(self) -> "BaseRecipe":
        if self.prune and not (self.distill and self.distill.epochs):
            raise ValueError(
                "expected a distill step (with epochs) beside prune, found none: masks grow while it trains"
            )
        if self.benchmark and not self.export:
            raise ValueError("expected an export step beside benchmark, found none: SavedModels are measured")
        return self

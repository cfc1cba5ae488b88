"""The road to a smaller model: data, teacher, student, distillation with masks, shrinking. Each method is one step."""

import math
from pathlib import Path
from typing import Any

import keras

from tfvllm.compress import optimizer, training
from tfvllm.compress.artifacts import load_model, save_model
from tfvllm.compress.recipe import Recipe, unused_keys
from tfvllm.compress.recipe.blocks import Prune, Training
from tfvllm.compress.steps import StepResult, Workspace
from tfvllm.compress.tasks.base import Task
from tfvllm.families.matmuls import einsum_as_matmul
from tfvllm.files import new_directory

_RATES = tuple(Training.model_fields)
_UNITS = ("heads", "ffn", "experts", "width")  # what shrinking removes before recovery


class Pipeline:
    """One run's training steps. Each returns a `StepResult`; `model_of(done)` is its Keras model."""

    def __init__(self, recipe: Recipe, workspace: Workspace, task: Task[Any]):
        self.recipe = recipe
        self.workspace = workspace
        self.console = workspace.console
        self.task = task
        self._teacher: StepResult | None = None
        self._models: dict[str, keras.Model] = {}

    def model_of(self, done: StepResult) -> keras.Model:
        """The Keras model that a step made, loaded once."""
        if done.key not in self._models:
            self._models[done.key] = self._loaded(done)
        return self._models[done.key]

    def _loaded(self, done: StepResult) -> keras.Model:
        return self.task.restored(load_model(done.directory / "model.keras"))

    def data(self) -> StepResult:
        """Reads the data, or writes synthetic ones."""
        task = self.task
        task.check()
        task.read()
        lengths = {name: value for name, value in self.recipe.data.model_dump().items() if name.endswith("_length")}
        parameters = {"digest": task.digest(), **lengths}
        done = self.workspace.do("data", parameters, [], lambda directory, work: task.facts())
        self.console.line(f"  {task.announced()}")
        for note in [*task.notes, *unused_keys(self.recipe)]:
            self.console.line(f"  note: {note}")
        return done

    def teacher(self, data: StepResult) -> StepResult:
        """Trains the teacher, or takes a trained one."""
        parameters = {"seed": self.recipe.seed, **self.task.teacher_parameters()}

        def build(directory: Path, work: Path) -> dict[str, Any]:
            training.seeded(self.recipe.seed)
            model, trained = self.task.make_teacher(work, self._train_alone)
            save_model(model, directory / "model.keras")
            return {**trained, **self.task.describe(model)}

        self._teacher = self._say(self.workspace.do("teacher", parameters, [data], build))
        self.task.adopt(self.model_of(self._teacher))
        return self._teacher

    def _train_alone(self, model: keras.Model, rates: Any, work: Path, title: str, average: int = 1) -> dict[str, Any]:
        trained = self.task.trainable(model)
        trained.compile(optimizer=self._optimizer(rates), loss=self.task.loss(trained), jit_compile=False)
        return self._fit(trained, trained, rates, work, title, train=self.task.rows("train"), average=average)

    def student(self, teacher: StepResult) -> StepResult:
        """The untrained student."""
        block = self.recipe.student
        assert block is not None

        def build(directory: Path, work: Path) -> dict[str, Any]:
            training.seeded(self.recipe.seed + 1)
            model = self.task.make_student(self.model_of(teacher))
            save_model(model, directory / "model.keras")
            return self.task.describe(model)

        parameters = {"seed": self.recipe.seed, **block.model_dump()}
        return self._say(self.workspace.do("student", parameters, [teacher], build))

    # --- distillation, with masks -----------------------------------------------------------------------------------

    def distill(self, student: StepResult) -> StepResult:
        """Trains the student on the teacher; masks grow meanwhile where the recipe prunes."""
        block, prune = self.recipe.distill, self.recipe.prune
        assert block is not None
        parameters = {"seed": self.recipe.seed, **block.model_dump(), "prune": prune.model_dump() if prune else None}

        def build(directory: Path, work: Path) -> dict[str, Any]:
            training.seeded(self.recipe.seed + 2)  # first: loading draws the seeds of dropout
            model = self._loaded(student)
            callbacks, best_from = [], 0
            if prune:
                from tfvllm.pruning.schedules import PolynomialDecay

                schedule = PolynomialDecay(
                    prune.initial, prune.sparsity, **_when(prune, self._steps(block, block.rounds))
                )
                callbacks = [_pruning(model, schedule)]
                best_from = math.ceil(prune.end * block.epochs)
            trained = self._distill(model, block, block, work, "distil", callbacks=callbacks, best_from=best_from)
            save_model(model, directory / "model.keras")
            return {**trained, **self.task.describe(model)}

        return self._say(self.workspace.do("distill", parameters, [student], build))

    def _distill(
        self, model: keras.Model, objective: Any, rates: Any, work: Path, title: str, **options: Any
    ) -> dict[str, Any]:
        """Trains `model` on the teacher: `objective` says what to learn, `rates` for how long and how fast."""
        from tfvllm.distillation import losses
        from tfvllm.distillation.distiller import Distiller

        assert self._teacher is not None
        lesson = None if objective.rounds else self.task.lesson(objective, self._teacher, model, self.model_of)
        teacher = self.model_of(self._teacher) if lesson is None else lesson.teacher
        # What a distiller is made with is drawn from here, whatever had to be loaded and made for the lesson.
        training.seeded(self.recipe.seed + 5)
        terms: dict[str, Any] = self.task.losses(objective)
        weights = {"logits": objective.logits}
        if objective.hidden:
            terms["hidden"] = losses.HiddenStates(layers="uniform")
            weights["hidden"] = objective.hidden
            if objective.hidden_fade:
                falling = max(1, round(objective.hidden_fade * self._steps(rates, objective.rounds)))
                weights["hidden"] = keras.optimizers.schedules.PolynomialDecay(objective.hidden, falling, 0.0)
        distiller = Distiller(
            *(teacher, model),
            losses=terms,
            loss_weights=weights,
            task_weight=objective.task,
            from_logits=lesson.from_logits if lesson else None,
        )
        chosen = self._optimizer(rates, objective.rounds)
        distiller.compile(optimizer=chosen, loss=self.task.loss(model), jit_compile=False)
        if lesson is None:
            return self._in_rounds(distiller, objective, rates, work, title, options.get("callbacks", ()))
        changed = {"change": lesson.change, "ahead": lesson.ahead, "weights_for": lesson.weights_for}
        return self._fit(distiller, model, rates, work, title, train=lesson.train, **changed, **options)

    def _in_rounds(
        self, distiller: Any, objective: Any, rates: Any, work: Path, title: str, callbacks: Any
    ) -> dict[str, Any]:
        """Each round trains more on what student and teacher differ most in; the best round's weights stay."""
        from tfvllm.distillation import iterate

        train, dev = (self.task.rows(split).arrays() for split in ("train", "dev"))
        with self.console.progress(title, objective.rounds) as progress, einsum_as_matmul(distiller.student):
            told = iterate(
                distiller,
                train,
                dev,
                rounds=objective.rounds,
                epochs=rates.epochs,
                batch_size=rates.batch_size,
                seed=self.recipe.seed,
                callbacks=[*callbacks, _Counted(progress)],
                backup=work / "rounds",
                verbose=0,
            ).to_dict()
        found = self.task.score(distiller.student).of()
        shown = ", ".join(f"{entry['divergence']:.4f}" for entry in told["rounds"])
        self.console.line(f"  {title}: divergence on dev by round {shown}; {told['stopped']}")
        history = [{"round": entry["round"], "dev_divergence": entry["divergence"]} for entry in told["rounds"]]
        return {"rounds": history, "best_round": told["best"], self.task.score_name: found}

    # --- structure --------------------------------------------------------------------------------------------------

    def shrink(self, student: StepResult) -> StepResult:
        """Removes heads, neurons or channels, distils again to recover, and cuts the vocabulary last."""
        from tfvllm import pruning

        block, prune = self.recipe.shrink, self.recipe.prune
        assert block is not None
        objective = self.recipe.distill or type(self.recipe).default_distill()
        structure = {name: getattr(block, name) for name in _UNITS if hasattr(block, name)}
        parameters = {
            "seed": self.recipe.seed,
            **block.model_dump(),
            "objective": {name: value for name, value in objective.model_dump().items() if name not in _RATES},
            "sparsity": prune.sparsity if prune else None,
        }

        def build(directory: Path, work: Path) -> dict[str, Any]:
            training.seeded(self.recipe.seed + 3)
            model = self._loaded(student)
            told: dict[str, Any] = {}
            if any(value is not None for value in structure.values()):
                removed = work / "structure"  # kept, so that a resumed recovery goes on from the very same model
                if not removed.is_dir():
                    model.compile(loss=self.task.loss(model))  # taylor scores are gradients of this loss
                    small = pruning.shrink(
                        model,
                        **structure,
                        importance=block.importance,
                        adaptive=getattr(block, "adaptive", False),
                        compensate=block.compensate,
                        data=self.task.calibration(block.calibration),
                        limit=-(-block.calibration // 32),
                    )
                    model = self.task.restored(small)
                    with new_directory(removed) as partial:
                        save_model(model, partial / "model.keras")
                training.seeded(self.recipe.seed + 4)
                model = self.task.restored(load_model(removed / "model.keras"))
                told["before_recovery"] = self.task.describe(model)
                self.console.line(f"  structure removed: {self._figures(told['before_recovery'])}")
                if block.epochs:
                    callbacks = []
                    if prune:
                        from tfvllm.pruning.schedules import ConstantSparsity

                        often = min(prune.frequency, max(1, self._steps(block, objective.rounds) // 4))
                        callbacks = [_pruning(model, ConstantSparsity(prune.sparsity, 0, frequency=often))]
                    # masked weights need an epoch
                    start = None if prune else told["before_recovery"][self.task.score_name]
                    told |= self._distill(model, objective, block, work, "recover", callbacks=callbacks, start=start)
            if block.vocabulary is not None:
                data = self.task.calibration(len(self.task.rows("train")))
                model = self.task.restored(pruning.shrink(model, vocabulary=block.vocabulary, data=data, limit=10**9))
            save_model(model, directory / "model.keras")
            return {**told, **self.task.describe(model)}

        return self._say(self.workspace.do("shrink", parameters, [student], build))

    # --- shared -----------------------------------------------------------------------------------------------------

    def _steps(self, rates: Any, rounds: int | None = None) -> int:
        return (rounds or 1) * rates.epochs * -(-len(self.task.rows("train")) // rates.batch_size)

    def _optimizer(self, rates: Any, rounds: int | None = None) -> keras.optimizers.Optimizer:
        return optimizer.adamw(rates.learning_rate, self._steps(rates, rounds), rates.warmup, rates.weight_decay)

    def _fit(
        self, model: keras.Model, student: keras.Model, rates: Any, work: Path, title: str, **options: Any
    ) -> dict:
        return training.fit(
            model,
            student,
            options.pop("train"),
            self.task.score(student),
            epochs=rates.epochs,
            batch_size=rates.batch_size,
            seed=self.recipe.seed,
            state=work / "epochs",
            console=self.console,
            title=title,
            **options,
        )

    def _figures(self, result: dict[str, Any]) -> str:
        """One line: size and scores."""
        size = f"{result['weights'] / 1e6:.2f} M weights ({result['nonzero_share']:.0%} not zero)"
        return ", ".join([size, *self.task.shown(result)])

    def _say(self, done: StepResult) -> StepResult:
        self.console.line(f"  {done.name}: {self._figures(done.result)}")
        return done


class _Counted(keras.callbacks.Callback):
    """Shows how far rounds have come."""

    def __init__(self, progress: Any):
        super().__init__()
        self._progress, self._done = progress, 0

    def on_train_end(self, logs: Any = None) -> None:
        self._done += 1
        self._progress.at(self._done)


def _when(prune: Prune, steps: int) -> dict[str, int]:
    """Shares of a training of `steps` steps as a schedule's steps.

    Masks are renewed every `frequency` steps from `begin_step`, so the last step has to be one of those: else the
    sparsity asked for would not quite be reached.
    """
    begin = round(prune.begin * steps)
    room = max(1, round(prune.end * steps) - begin)
    frequency = min(prune.frequency, max(1, room // 8))
    return {"begin_step": begin, "end_step": begin + room // frequency * frequency, "frequency": frequency}


def _pruning(model: keras.Model, schedule: Any) -> keras.callbacks.Callback:
    from tfvllm.pruning.callbacks import MagnitudePruning

    return MagnitudePruning(model, schedule=schedule)

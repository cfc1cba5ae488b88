"""The road to a smaller model: data, teacher, student, distillation with masks, shrinking. Each method is one step."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import keras_nlp
import numpy as np
import tensorflow as tf

from tfvllm import data as text_data
from tfvllm.compress import batches, classifiers, optimizer, training
from tfvllm.compress.classifiers import load_model, save_model
from tfvllm.compress.recipe import Distill, Prune, Recipe, unused_keys
from tfvllm.compress.steps import StepResult, Workspace
from tfvllm.compress.vocabulary import learn_vocabulary
from tfvllm.errors import InputError
from tfvllm.files import digest, new_directory, write_text
from tfvllm.graph import probes

_OBJECTIVE = ("temperature", "logits", "task", "hidden", "hidden_fade", "augment")


class Pipeline:
    """One run's training steps. Each returns a `StepResult`; `model_of(done)` is its Keras model."""

    def __init__(self, recipe: Recipe, workspace: Workspace):
        self.recipe = recipe
        self.workspace = workspace
        self.console = workspace.console
        self.text: text_data.TextData
        self.preprocessor: Any = None  # the teacher's; the student shares it
        self._tokens: dict[str, batches.Tokens] = {}
        self._teacher: StepResult | None = None
        self._models: dict[str, keras.Model] = {}

    def model_of(self, done: StepResult) -> keras.Model:
        """The Keras model that a step made, loaded once."""
        if done.key not in self._models:
            self._models[done.key] = load_model(done.directory / "model.keras")
        return self._models[done.key]

    # --- data -------------------------------------------------------------------------------------------------------

    def data(self) -> StepResult:
        """Reads the sentences, or writes synthetic ones."""
        if (wanted := self.recipe.simplify) is not None:  # before hours of training
            probes.check_runs(wanted.target, wanted.precision)
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
        text = self.text

        def build(directory: Path, work: Path) -> dict[str, Any]:
            return {
                "source": "synthetic reviews" if block.path is None else text.source,
                "synthetic": block.path is None,
                "labels": text.labels,
                "train": len(text.train),
                "dev": len(text.dev),
                "test": len(text.test) if text.test else 0,
                "notes": text.notes,
            }

        done = self.workspace.do("data", {"digest": text.digest(), "max_length": block.max_length}, [], build)
        self.console.line(
            f"  {len(text.train)} sentences to train on, {len(text.dev)} dev, labels {', '.join(text.labels)}"
        )
        for note in [*text.notes, *unused_keys(self.recipe)]:
            self.console.line(f"  note: {note}")
        return done

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

    def tokens(self, split: str) -> batches.Tokens:
        """The tokenised split, made once with the teacher's preprocessor, which the student shares."""
        if split not in self._tokens:
            self._tokens[split] = batches.tokenize(getattr(self.text, split), self.preprocessor)
        return self._tokens[split]

    # --- teacher ----------------------------------------------------------------------------------------------------

    def teacher(self, data: StepResult) -> StepResult:
        """Trains the teacher, or takes a trained one."""
        block = self.recipe.teacher
        parameters: dict[str, Any] = {"seed": self.recipe.seed, **block.model_dump()}
        if block.model is not None:
            parameters = {"model": digest(*_files(Path(block.model)))}
        elif block.preset is not None:
            for name in ("vocabulary", "layers", "heads", "hidden", "ffn", "dropout"):
                del parameters[name]
        parameters.pop("labels", None)  # the data's digest has their order

        def build(directory: Path, work: Path) -> dict[str, Any]:
            keras.utils.set_random_seed(self.recipe.seed)
            model = self._untrained_teacher()
            self.preprocessor = model.preprocessor
            trained = self._train_teacher(model, work) if block.epochs and block.model is None else {}
            described = self._describe(model)
            if block.model is not None:
                self._check_order(model)
            save_model(model, directory / "model.keras")
            return {**trained, **described}

        self._teacher = self._say(self.workspace.do("teacher", parameters, [data], build))
        self.preprocessor = self.model_of(self._teacher).preprocessor
        return self._teacher

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

    def _check_order(self, model: keras.Model) -> None:
        """Refuses a trained teacher whose outputs fit the labels far better in another order, unless it was given."""
        tokens, labels = self.tokens("dev"), self.text.labels
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

    def _train_teacher(self, model: keras.Model, work: Path) -> dict[str, Any]:
        block = self.recipe.teacher
        trained = classifiers.plain(model)
        trained.compile(optimizer=self._optimizer(block), loss=training.cross_entropy(trained), jit_compile=False)
        return self._fit(trained, trained, block, work, "teacher", self.tokens("train"), average=block.average)

    # --- student ----------------------------------------------------------------------------------------------------

    def student(self, teacher: StepResult) -> StepResult:
        """The untrained student: copied layers of the teacher, or a fresh BERT shape with its tokenizer."""
        block = self.recipe.student
        assert block is not None

        def build(directory: Path, work: Path) -> dict[str, Any]:
            from tfvllm.distillation import student_from

            keras.utils.set_random_seed(self.recipe.seed + 1)
            if block.start == "teacher":
                model = student_from(self.model_of(teacher), layers=block.layers)
            else:
                model = self._fresh_student(self.model_of(teacher))
            save_model(model, directory / "model.keras")
            return self._describe(model)

        parameters = {"seed": self.recipe.seed, **block.model_dump()}
        return self._say(self.workspace.do("student", parameters, [teacher], build))

    def _fresh_student(self, teacher: keras.Model) -> keras.Model:
        block = self.recipe.student
        assert block is not None and isinstance(block.layers, int)
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

    # --- distillation, with masks -----------------------------------------------------------------------------------

    def distill(self, student: StepResult) -> StepResult:
        """Trains the student on the teacher; masks grow meanwhile where the recipe prunes."""
        block, prune = self.recipe.distill, self.recipe.prune
        assert block is not None
        parameters = {"seed": self.recipe.seed, **block.model_dump(), "prune": prune.model_dump() if prune else None}

        def build(directory: Path, work: Path) -> dict[str, Any]:
            model = load_model(student.directory / "model.keras")
            keras.utils.set_random_seed(self.recipe.seed + 2)
            callbacks, best_from = [], 0
            if prune:
                from tfvllm.pruning.schedules import PolynomialDecay

                schedule = PolynomialDecay(prune.initial, prune.sparsity, **_when(prune, self._steps(block)))
                callbacks = [_pruning(model, schedule)]
                best_from = math.ceil(prune.end * block.epochs)
            trained = self._distill(model, block, block, work, "distil", callbacks, best_from)
            save_model(model, directory / "model.keras")
            return {**trained, **self._describe(model)}

        return self._say(self.workspace.do("distill", parameters, [student], build))

    def _distill(self, model, objective, rates, work, title, callbacks=(), best_from=0, start=None) -> dict[str, Any]:
        """Trains `model` on the teacher: `objective` says what to learn, `rates` for how long and how fast."""
        from tfvllm.distillation import losses
        from tfvllm.distillation.distiller import Distiller

        assert self._teacher is not None
        terms: dict[str, Any] = {"logits": losses.ForwardKL(temperature=objective.temperature)}
        weights = {"logits": objective.logits}
        change, train = None, self.tokens("train")
        if objective.hidden:
            terms["hidden"] = losses.HiddenStates(layers="uniform")
            weights["hidden"] = objective.hidden
            if objective.hidden_fade:
                falling = max(1, round(objective.hidden_fade * self._steps(rates)))
                weights["hidden"] = keras.optimizers.schedules.PolynomialDecay(objective.hidden, falling, 0.0)
        if objective.augment:
            tokenizer = self.preprocessor.tokenizer
            special = [tokenizer.token_to_id(token) for token in tokenizer.special_tokens]
            change = batches.random_words(objective.augment, special, getattr(tokenizer, "mask_token_id", None))
        if objective.hidden or objective.augment:
            teacher = self.model_of(self._teacher)
        else:  # every epoch asks the teacher the same, so it is asked once
            train = replace(train, extra={"teacher_logits": self._teacher_logits()})
            teacher = training.recalled_teacher(len(self.text.labels))
        known = {"teacher": True} if train.extra else None
        distiller = Distiller(
            teacher, model, losses=terms, loss_weights=weights, task_weight=objective.task, from_logits=known
        )
        distiller.compile(optimizer=self._optimizer(rates), loss=training.cross_entropy(model), jit_compile=False)
        return self._fit(distiller, model, rates, work, title, train, callbacks, change, best_from, start=start)

    def _teacher_logits(self) -> np.ndarray:
        """What the teacher says to every training sentence, float32[sentences, classes]."""
        teacher = self._teacher
        assert teacher is not None

        def build(directory: Path, work: Path) -> dict[str, Any]:
            with self.console.progress("teacher's logits", len(self.tokens("train"))) as progress:
                logits = training.predict_logits(self.model_of(teacher), self.tokens("train"), progress=progress)
            np.save(directory / "logits.npy", logits)
            return {}

        return np.load(self.workspace.do("teacher-logits", {}, [teacher], build).directory / "logits.npy")

    # --- structure --------------------------------------------------------------------------------------------------

    def shrink(self, student: StepResult) -> StepResult:
        """Removes heads, neurons or channels, distils again to recover, and cuts the vocabulary last."""
        from tfvllm import pruning

        block, prune = self.recipe.shrink, self.recipe.prune
        assert block is not None
        objective = self.recipe.distill or Distill()  # type: ignore[call-arg]  # all have defaults
        structure = {name: getattr(block, name) for name in ("heads", "ffn", "width")}
        parameters = {
            "seed": self.recipe.seed,
            **block.model_dump(),
            "objective": {name: getattr(objective, name) for name in _OBJECTIVE},
            "sparsity": prune.sparsity if prune else None,
        }

        def build(directory: Path, work: Path) -> dict[str, Any]:
            model = load_model(student.directory / "model.keras")
            keras.utils.set_random_seed(self.recipe.seed + 3)
            told: dict[str, Any] = {}
            if any(value is not None for value in structure.values()):
                removed = work / "structure"  # kept, so that a resumed recovery goes on from the very same model
                if removed.is_dir():
                    model = load_model(removed / "model.keras")
                else:
                    model.compile(loss=training.cross_entropy(model))  # taylor scores are gradients of this loss
                    model = pruning.shrink(
                        model,
                        **structure,
                        importance=block.importance,
                        compensate=block.compensate,
                        data=self._calibration(block.calibration),
                        limit=-(-block.calibration // 32),
                    )
                    with new_directory(removed) as partial:
                        save_model(model, partial / "model.keras")
                told["before_recovery"] = self._describe(model)
                self.console.line(f"  structure removed: {describe_scores(told['before_recovery'])}")
                if block.epochs:
                    callbacks = []
                    if prune:
                        from tfvllm.pruning.schedules import ConstantSparsity

                        often = min(prune.frequency, max(1, self._steps(block) // 4))
                        callbacks = [_pruning(model, ConstantSparsity(prune.sparsity, 0, frequency=often))]
                    start = None if prune else told["before_recovery"]["dev_accuracy"]  # masked weights need an epoch
                    told |= self._distill(model, objective, block, work, "recover", callbacks, start=start)
            if block.vocabulary is not None:
                model = pruning.shrink(
                    model, vocabulary=block.vocabulary, data=self._calibration(len(self.text.train)), limit=10**9
                )
            save_model(model, directory / "model.keras")
            return {**told, **self._describe(model)}

        return self._say(self.workspace.do("shrink", parameters, [student], build))

    def _calibration(self, count: int) -> tf.data.Dataset:
        """`count` training sentences, spread evenly over the file, with their labels, in batches of 32."""
        rows = np.unique(np.linspace(0, len(self.text.train) - 1, count).astype(int))
        texts = [self.text.train.texts[row] for row in rows]
        labels = [self.text.train.labels[row] for row in rows]
        return tf.data.Dataset.from_tensor_slices((texts, labels)).batch(32)

    # --- shared -----------------------------------------------------------------------------------------------------

    def _steps(self, rates: Any) -> int:
        return rates.epochs * -(-len(self.tokens("train")) // rates.batch_size)

    def _optimizer(self, rates: Any) -> keras.optimizers.Optimizer:
        return optimizer.adamw(rates.learning_rate, self._steps(rates), rates.warmup, rates.weight_decay)

    def _fit(
        self,
        model: keras.Model,
        student: keras.Model,
        rates: Any,
        work: Path,
        title: str,
        train: batches.Tokens,
        callbacks: Sequence = (),
        change: Callable | None = None,
        best_from: int = 0,
        average: int = 1,
        start: float | None = None,
    ) -> dict[str, Any]:
        return training.fit(
            model,
            student,
            train,
            self.tokens("dev"),
            epochs=rates.epochs,
            batch_size=rates.batch_size,
            seed=self.recipe.seed,
            state=work / "epochs",
            console=self.console,
            title=title,
            callbacks=callbacks,
            change=change,
            best_from=best_from,
            average=average,
            start=start,
        )

    def _describe(self, model: keras.Model) -> dict[str, Any]:
        """Parameters, share of weights that are not zero, accuracy on dev and test."""
        result: dict[str, Any] = {}
        own = self.preprocessor.tokenizer.vocabulary_size() == model.preprocessor.tokenizer.vocabulary_size()
        function = training.logits_function(model)
        for split in ("dev", "test"):
            if part := getattr(self.text, split):
                tokens = self.tokens(split) if own else batches.tokenize(part, model.preprocessor)
                result[f"{split}_accuracy"] = training.accuracy(model, tokens, function=function)
        weights = [np.asarray(weight) for weight in model.weights]
        total = sum(weight.size for weight in weights)
        nonzero = sum(int(np.count_nonzero(weight)) for weight in weights)
        return {**result, "weights": int(total), "nonzero_share": nonzero / total, "labels": self.text.labels}

    def _say(self, done: StepResult) -> StepResult:
        self.console.line(f"  {done.name}: {describe_scores(done.result)}")
        return done


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def describe_scores(result: dict[str, Any]) -> str:
    """One line: size and accuracies."""
    scores = [
        f"{split} accuracy {result[f'{split}_accuracy']:.2%}"
        for split in ("dev", "test")
        if f"{split}_accuracy" in result
    ]
    return ", ".join([f"{result['weights'] / 1e6:.2f} M weights ({result['nonzero_share']:.0%} not zero)", *scores])


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

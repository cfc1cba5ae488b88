"""A Keras model that trains a student to do what its teacher does."""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfvllm.distillation import inputs as batch_inputs
from tfvllm.distillation.answers import Heads, between, logits_of
from tfvllm.distillation.cache import TeacherCache, without_entries
from tfvllm.distillation.checks import (
    check_names,
    check_pair,
    checked_from_logits,
    checked_losses,
    checked_weights,
    named,
)
from tfvllm.distillation.chunks import SMALL
from tfvllm.distillation.losses import DistillationLoss
from tfvllm.distillation.losses.base import check_classes
from tfvllm.distillation.pairing import Pair, pairs_of, widths
from tfvllm.distillation.reduction import Weights, weighted_mean
from tfvllm.distillation.scheduled import Scheduled, check_scheduled, deserialize, serialize, value_at
from tfvllm.distillation.task_loss import CrossEntropyByName, by_name
from tfvllm.distillation.teacher_logits import deferred, split_head
from tfvllm.errors import InputError
from tfvllm.families.heads import Head
from tfvllm.families.outputs import Outputs, run


@keras.saving.register_keras_serializable(package="tfvllm")
class Distiller(keras.Model):
    """Trains `student` on its task and on its difference from `teacher`.

    Use it as any Keras model: `compile`, `fit`, `evaluate`, `predict`. Raw strings go through the student's
    preprocessor; preprocessed batches are taken as they are. `distiller.student` stays a plain model.

    The total loss is

        task_weight · task + Σ loss_weights[name] · losses[name] + student.losses

    where `task` is the loss given to `compile`, and each distillation loss is averaged over the examples (or real,
    unpadded positions) after multiplying by `sample_weight`, which a dataset may give apart for both:
    `{"task": …, "divergence": …}`. The teacher runs once a batch, in inference mode, and is frozen
    (`teacher.trainable` is set to False).

    Args:
        teacher: the trained model, or a `tfvllm.distillation.TeacherCache` of its outputs; or several, as
            `{name: model}` or a list. None in a Distiller that only predicts and evaluates.
        student: the model to train. Shares no variable with the teacher.
        losses: `{name: loss}` of `tfvllm.losses`. Each is reported as the metric `<name>_loss`. The default is
            `{"logits": ForwardKL(temperature=2.0)}`.
        loss_weights: `{name: weight}`, each 1.0 where not given; numbers or schedules of the training step (a
            `keras.optimizers.schedules.LearningRateSchedule` or a function of the step).
        task_weight: the weight of the task's own loss, a number or a schedule; 0 trains on the teacher alone.
        teacher_weights: `{name: weight}` of several teachers, equal where not given. A loss is the weighted mean of the
            losses against each teacher.
        mask: where padding is: "auto" (the input `padding_mask`, or a Keras mask), the name of an input, a function of
            the batch's inputs, or None where every position is real.
        from_logits: whether the models give logits (True) or probabilities (False), of all or as `{"student": …,
            "teacher": …}` (or the teachers' names). None, or a model not named: it is found out, from the operations
            that make the output and from its values, and asked for where they do not tell. Softmax and sigmoid heads
            are read before their activation; the outputs of a sigmoid are compared each by itself.
    Raises:
        InputError: models, names or settings that do not fit together; the message lists what is valid.

    Example:
        >>> distiller = tfvllm.Distiller(teacher=tiny_net(), student=tiny_net())
        >>> distiller.compile("adamw", loss="sparse_categorical_crossentropy")
        >>> history = distiller.fit(points, kinds, verbose=0).history
        >>> sorted(history)
        ['logits_loss', 'loss', 'task_loss']
    """

    def __init__(
        self,
        teacher: Any = None,
        student: keras.Model | None = None,
        losses: Mapping[str, DistillationLoss] | DistillationLoss | None = None,
        loss_weights: Mapping[str, Scheduled] | None = None,
        task_weight: Scheduled = 0.2,
        *,
        teacher_weights: Mapping[str, float] | None = None,
        mask: batch_inputs.Mask = "auto",
        from_logits: bool | Mapping[str, bool] | None = None,
        name: str = "distiller",
        **kwargs: Any,
    ):
        check_names(kwargs, "Distiller")
        if not isinstance(student, keras.Model):
            raise InputError(f"student must be a keras.Model, found {type(student).__name__}.")
        kwargs.setdefault("dtype", student.dtype_policy)
        super().__init__(name=name, **kwargs)
        self.student = student
        self.distillation_losses = checked_losses(losses)
        self.loss_weights = checked_weights(loss_weights, self.distillation_losses)
        self.task_weight = check_scheduled(task_weight, "task_weight")
        self.mask = mask
        self._trackers = {key: keras.metrics.Mean(name=f"{key}_loss") for key in ("task", *self.distillation_losses)}
        self.teacher_weights = dict(teacher_weights or {})
        self.projections: dict[
            str, list[keras.layers.Dense]
        ] = {}  # student width -> teacher width, by loss and teacher
        self._ran = threading.local()  # one per replica thread: the student's outputs for this batch
        self._held = _Held()
        self._by_default = losses is None
        self._named_loss: CrossEntropyByName | None = None
        self.from_logits = from_logits
        self.teacher = teacher
        self.built = student.built

    @property
    def teacher(self) -> Any:
        """The teacher, `{name: teacher}` of several, or None. It is no part of this model's weights nor of its file."""
        teachers = self._held.teachers
        return teachers["teacher"] if set(teachers) == {"teacher"} else dict(teachers) or None

    @teacher.setter
    def teacher(self, teacher: Any) -> None:
        teachers = named(teacher)
        unknown = sorted(set(self.teacher_weights) - set(teachers))
        if teachers and unknown:
            raise InputError(f"teacher_weights names {unknown}, but the teachers are {sorted(teachers)}.")
        plans = {}
        for name, model in teachers.items():
            if isinstance(model, TeacherCache):
                plans[name] = self._plan_for_cache(model)
                continue
            if not isinstance(model, keras.Model):
                raise InputError(f"the teacher must be a keras.Model or a TeacherCache, found {type(model).__name__}.")
            check_pair(model, self.student)
            plans[name] = {key: pairs_of(loss, model, self.student) for key, loss in self.distillation_losses.items()}
            self._check_classes(model)
        for name, model in teachers.items():
            if not isinstance(model, TeacherCache):
                self._make_projections(name, model, plans[name])
                model.trainable = False
        self._held.heads = Heads(checked_from_logits(self.from_logits, teachers))
        self._held.teachers, self._held.plans = teachers, plans
        self._held.trunks = {name: found for name, model in teachers.items() if (found := _large_head(model))}

    def _plan_for_cache(self, cache: TeacherCache) -> dict[str, list[Pair]]:
        shape = getattr(self.student, "output_shape", None)
        for key, loss in self.distillation_losses.items():
            if loss.reads != "logits":
                raise InputError(
                    f"the loss {key!r} reads the teacher's {loss.reads}, but the teacher is a cache, which holds "
                    "logits only. Use the teacher itself, or losses on logits."
                )
            if isinstance(shape, tuple) and shape:
                check_classes(loss, (cache.classes,), shape)
        return {key: [] for key in self.distillation_losses}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher":  # past Keras, which would take it for a layer of this model
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _make_projections(self, teacher: str, model: keras.Model, plan: dict[str, list[Pair]]) -> None:
        for key, pairs in plan.items():
            loss = self.distillation_losses[key]
            if loss.reads != "hidden_states":
                continue
            shapes = widths(pairs, model, self.student)
            if loss.project == "auto" and all(narrow == wide for narrow, wide in shapes):
                continue
            self._projections_for(f"{key}_{teacher}", shapes)

    def _projections_for(self, name: str, shapes: list[tuple[int, int]]) -> None:
        made = self.projections.get(name)
        if made is not None:
            found = [tuple(layer.kernel.shape) for layer in made]
            if found != [tuple(shape) for shape in shapes]:
                raise InputError(
                    f"the projections {name!r} were trained for widths (student, teacher) {found}, but this teacher "
                    f"needs {shapes}. Use the teacher they were trained with, or make a new Distiller."
                )
            return
        layers = []
        for index, (narrow, wide) in enumerate(shapes):
            layer = keras.layers.Dense(wide, use_bias=False, dtype="float32", name=f"{name}_projection_{index}")
            layer.build((None, narrow))
            layers.append(layer)
        self.projections[name] = layers

    def _check_classes(self, teacher: keras.Model) -> None:
        """Refuses, before any training, logits over unlike classes."""
        for loss in self.distillation_losses.values():
            shapes = [getattr(model, "output_shape", None) for model in (teacher, self.student)]
            if loss.reads == "logits" and all(isinstance(shape, tuple) and shape for shape in shapes):
                check_classes(loss, shapes[0] or (), shapes[1] or ())

    # ------------------------------------------------------------------ Keras lifecycle

    def compile(self, optimizer: Any = "adamw", loss: Any = "auto", *, metrics: Any = None, **kwargs: Any) -> None:
        """As `keras.Model.compile`. `loss="auto"` takes the loss that the student was compiled with, if any.

        A cross-entropy named by a string is computed from logits where the student gives logits (as keras-nlp's tasks
        do), since Keras would take them for probabilities.

        Raises:
            InputError: an argument of the distiller in keras.io's example; the message names what takes its place.
        """
        check_names(kwargs, "compile")
        if isinstance(loss, str) and loss == "auto":
            loss = getattr(self.student, "loss", None)
        loss = by_name(loss)
        self._named_loss = loss if isinstance(loss, CrossEntropyByName) else None
        self._held.heads.forget()
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles as recorded in a saved file, optimizer state included."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def build(self, input_shape: Any = None) -> None:
        if not self.student.built:
            self.student.build(input_shape)
        self.built = True

    def train_step(self, data: Any) -> Any:
        """As `keras.Model.train_step`, begun once the batch is there: the student may be writing it (`OnPolicy`).

        Else what needs no batch would run meanwhile: weight decay, which changes the weights, and counting steps.
        """
        there = [part for part in tf.nest.flatten(data, expand_composites=True) if tf.is_tensor(part)]
        with tf.control_dependencies(there):
            return super().train_step(data)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The student's prediction."""
        outputs = self._run(self.student, inputs, training, "student")
        self._ran.outputs = outputs  # the loss reads inside this forward pass: the student runs once a batch
        return outputs.answer

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool | None = True
    ) -> tf.Tensor:
        """The total loss, a float32 scalar; each part updates its own metric."""
        if y_pred is None:
            y_pred = self(x, training=training)
        student = self._ran.__dict__.pop("outputs", None)
        step = self._step()
        total = tf.zeros(())
        weights = Weights.of(sample_weight)
        own = list(self.student.losses)  # before anything else is run
        if self._named_loss is not None and y is not None:
            self._named_loss.head = self._head("student", self.student, x, y_pred)
        if self._compile_loss is not None and y is not None:
            task = tf.cast(self._compile_loss(y, y_pred, weights.task), tf.float32)
            self._trackers["task"].update_state(task * _replicas(), sample_weight=weights.rows(x, weights.task))
            total += value_at(self.task_weight, step) * task
        for loss in own:
            total += tf.reduce_sum(tf.cast(loss, tf.float32)) / _replicas()
        if not self._held.teachers:
            if training:
                raise InputError(_NO_TEACHER)
            return total
        if student is None or student.answer is not y_pred:  # called by hand, without this model's own forward pass
            student = self._run(self.student, x, training, "student") if self._reads("student") else Outputs(y_pred)
        teachers = {name: self._run(model, x, False, name) for name, model in self._held.teachers.items()}
        shares = {name: self.teacher_weights.get(name, 1.0) for name in teachers}
        for key, loss in self.distillation_losses.items():
            value = tf.zeros(())
            for name, teacher in teachers.items():
                share = shares[name] / sum(shares.values())
                for values, mask, part in self._values(key, loss, name, teacher, student, x, step):
                    value += share * part * weighted_mean(values, mask, weights.divergence)
            self._trackers[key].update_state(value * _replicas(), sample_weight=weights.rows(x, weights.divergence))
            total += value_at(self.loss_weights[key], step) * value
        return total

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        if y is None:
            return self.get_metrics_result()
        return super().compute_metrics(x, y, y_pred, Weights.of(sample_weight).task)

    def get_metrics_result(self) -> dict[str, Any]:
        """As Keras's, without the metrics that have not seen a label yet."""
        compiled = self._compile_metrics
        if compiled is None or compiled.built:
            return super().get_metrics_result()
        return {metric.name: metric.result() for metric in self.metrics if metric is not compiled}

    def _step(self) -> Any:
        return self.optimizer.iterations if getattr(self, "optimizer", None) is not None else 0

    def _reads(self, whose: str) -> tuple[list[str], list[str]] | None:
        """What losses read inside a model: (kinds of outputs of its blocks, names of its layers); None: nothing."""
        plans = self._held.plans.values() if whose == "student" else [self._held.plans[whose]]
        blocks, layers = [], []
        for plan in plans:
            for key, pairs in plan.items():
                for pair in pairs:
                    layer = pair.student if whose == "student" else pair.teacher
                    if isinstance(layer, str):
                        layers.append(layer)
                    else:
                        blocks.append(self.distillation_losses[key].reads)
        if not blocks and not layers:
            return None
        return list(dict.fromkeys(blocks)), list(dict.fromkeys(layers))

    def _run(self, model: keras.Model, x: Any, training: bool | None, whose: str) -> Outputs:
        if isinstance(model, TeacherCache):
            return Outputs(model.outputs(x))
        x = batch_inputs.select(model, without_entries(x))
        read, layers = self._reads(whose) or ((), ())
        if whose not in self._held.trunks:
            return run(model, x, read=read, layers=layers, training=training)
        trunk, head = self._held.trunks[whose]  # large logits are computed a few rows at a time, by the loss
        outputs = run(trunk, x, read=read, layers=layers, training=training)
        outputs.answer = deferred(outputs.answer, head)
        return outputs

    def _values(
        self, key: str, loss: DistillationLoss, name: str, teacher: Outputs, student: Outputs, x: Any, step: Any
    ) -> Iterator[tuple[tf.Tensor, tf.Tensor | None, float]]:
        """(unreduced values, their mask, their share of the loss): one, or one for each kind of blocks."""
        if loss.reads == "logits":
            model = self._held.teachers[name]
            heads = self._head(name, model, x, teacher.answer), self._head("student", self.student, x, student.answer)
            logits = logits_of(student.answer, self.student, heads[1])
            if self._by_default and logits.shape[-1] == 1 and {head.kind for head in heads} == {"logits"}:
                raise InputError(_ONE_NUMBER)
            values = between(loss, logits_of(teacher.answer, model, heads[0]), logits, heads, step)
            yield values, self._mask_for(key, values.shape.rank, x, student.answer, "decoder"), 1.0
            return
        pairs = self._held.plans[name][key]
        for kind in dict.fromkeys(pair.kind for pair in pairs):
            of_kind = [pair for pair in pairs if pair.kind == kind]
            of_teacher = [pair.of_teacher(teacher, loss.reads) for pair in of_kind]
            of_student = [pair.of_student(student, loss.reads) for pair in of_kind]
            projections = self.projections.get(f"{key}_{name}")
            if projections is not None:
                chosen = [layer for layer, pair in zip(projections, pairs) if pair.kind == kind]
                of_student = [layer(tf.cast(state, tf.float32)) for layer, state in zip(chosen, of_student)]
            rank = 2 if loss.reads != "hidden_states" else of_student[0].shape.rank - 1
            mask = self._mask_for(key, rank, x, student.answer, kind) if rank == 2 else None
            yield loss(of_teacher, of_student, mask=mask, step=step), mask, len(of_kind) / len(pairs)

    def _head(self, name: str, model: Any, x: Any, answer: Any) -> Head:
        return self._held.heads.of(name, model, without_entries(x), answer)

    def _mask_for(self, key: str, rank: int, x: Any, y_pred: Any, kind: str) -> tf.Tensor | None:
        if rank < 2 or self.mask is None:
            return None
        found = batch_inputs.padding_mask(without_entries(x), y_pred, self.mask, kind)
        if found is None:
            names = sorted(x) if isinstance(x, Mapping) else "a single tensor"
            raise InputError(
                f"the loss {key!r} has one value for each position, but nothing says which are padding: expected an "
                f"input 'padding_mask' or a Keras mask, found {names}. Pass Distiller(mask=...): an input's name, a "
                "function of the inputs, or None if every position is real."
            )
        return found

    # ------------------------------------------------------------------ raw strings

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        *,
        sample_weight: Any = None,
        validation_data: Any = None,
        validation_split: float = 0.0,
        shuffle: bool = True,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """As `keras.Model.fit`; raw strings in `x` and `validation_data` go through the student's preprocessor."""
        if not self._held.teachers:
            raise InputError(_NO_TEACHER)
        if not self.student.trainable or (self.student.built and not self.student.trainable_variables):
            raise InputError(
                f"the student {self.student.name} is frozen: it has no trainable variables. Set student.trainable = "
                "True and compile again (a model made from a frozen teacher may be frozen too)."
            )
        if batch_inputs.has_strings(x):
            if validation_split and validation_data is None:
                (x, y, sample_weight), validation_data = batch_inputs.split_rows(
                    (x, y, sample_weight), validation_split
                )
                validation_split = 0.0
            x = self._preprocessed(x, y, sample_weight, batch_size, shuffle)
            held_out_batch, batch_size, y, sample_weight = batch_size, None, None, None
        else:
            held_out_batch = batch_size
        if validation_data is not None:
            if isinstance(validation_data, tf.data.Dataset):
                if batch_inputs.has_strings(validation_data):
                    validation_data = self._preprocessed(validation_data, None, None, None, False)
            else:
                held_x, held_y, weight = keras.utils.unpack_x_y_sample_weight(tuple(validation_data))
                if batch_inputs.has_strings(held_x):
                    validation_data = self._preprocessed(held_x, held_y, weight, held_out_batch, False)
        self._build_optimizer()
        return super().fit(
            x=x,
            y=y,
            batch_size=batch_size,
            epochs=epochs,
            sample_weight=sample_weight,
            validation_data=validation_data,
            validation_split=validation_split,
            shuffle=shuffle and not isinstance(x, tf.data.Dataset),
            **kwargs,
        )

    def _build_optimizer(self) -> None:
        # Variables that are made while the training step is traced make TensorFlow trace it a second time.
        layers = [self.student, *(layer for layers in self.projections.values() for layer in layers)]
        if self.optimizer is not None and not self.optimizer.built and all(layer.built for layer in layers):
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)

    def evaluate(
        self, x: Any = None, y: Any = None, batch_size: int | None = None, *, sample_weight: Any = None, **kwargs: Any
    ) -> Any:
        """As `keras.Model.evaluate`; raw strings go through the student's preprocessor."""
        if batch_inputs.has_strings(x):
            x = self._preprocessed(x, y, sample_weight, batch_size, False)
            y = sample_weight = batch_size = None
        return super().evaluate(x, y, batch_size=batch_size, sample_weight=sample_weight, **kwargs)

    def predict(self, x: Any, batch_size: int | None = None, **kwargs: Any) -> Any:
        """As `keras.Model.predict` of the student; raw strings go through its preprocessor."""
        if batch_inputs.has_strings(x):
            x, batch_size = self._preprocessed(x, None, None, batch_size, False), None
        return super().predict(x, batch_size=batch_size, **kwargs)

    def train_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, **kwargs: Any) -> Any:
        """As `keras.Model.train_on_batch`; raw strings go through the student's preprocessor."""
        if batch_inputs.has_strings(x):
            x, y, sample_weight = batch_inputs.preprocess_batch(x, y, sample_weight, self._preprocess())
        return super().train_on_batch(x, y, sample_weight, **kwargs)

    def test_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, **kwargs: Any) -> Any:
        """As `keras.Model.test_on_batch`; raw strings go through the student's preprocessor."""
        if batch_inputs.has_strings(x):
            x, y, sample_weight = batch_inputs.preprocess_batch(x, y, sample_weight, self._preprocess())
        return super().test_on_batch(x, y, sample_weight, **kwargs)

    def predict_on_batch(self, x: Any) -> Any:
        """As `keras.Model.predict_on_batch`; raw strings go through the student's preprocessor."""
        if batch_inputs.has_strings(x):
            x, _, _ = batch_inputs.preprocess_batch(x, None, None, self._preprocess())
        return super().predict_on_batch(x)

    def _preprocess(self) -> Any:
        if batch_inputs.takes_strings(self.student):
            for name, teacher in self._held.teachers.items():
                if isinstance(teacher, keras.Model) and not batch_inputs.takes_strings(teacher):
                    raise InputError(
                        f"the student {self.student.name} reads raw strings itself, but the {name} {teacher.name} "
                        "reads what a preprocessor makes of them; expected models that read the same."
                    )
        return self._held.reader.of(self.student)

    def _preprocessed(
        self, x: Any, y: Any, sample_weight: Any, batch_size: int | None, shuffle: bool
    ) -> tf.data.Dataset:
        return batch_inputs.dataset_of(x, y, sample_weight, batch_size, self._preprocess(), shuffle)

    # ------------------------------------------------------------------ saving

    def get_config(self) -> dict[str, Any]:
        """All but the teacher: set `distiller.teacher` again before further training."""
        return {
            "student": keras.saving.serialize_keras_object(self.student),
            "losses": {
                key: keras.saving.serialize_keras_object(loss) for key, loss in self.distillation_losses.items()
            },
            "loss_weights": {key: serialize(weight) for key, weight in self.loss_weights.items()},
            "task_weight": serialize(self.task_weight),
            "teacher_weights": dict(self.teacher_weights),
            "mask": keras.saving.serialize_keras_object(self.mask) if callable(self.mask) else self.mask,
            "from_logits": dict(self.from_logits) if isinstance(self.from_logits, Mapping) else self.from_logits,
            "projections": {
                name: [list(layer.kernel.shape) for layer in layers] for name, layers in self.projections.items()
            },
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "Distiller":
        load = keras.saving.deserialize_keras_object
        config = dict(config)
        projections = config.pop("projections", {})
        distiller = cls(
            **{
                **config,
                "student": load(config["student"], custom_objects=custom_objects),
                "losses": {key: load(loss, custom_objects=custom_objects) for key, loss in config["losses"].items()},
                "loss_weights": {key: deserialize(weight) for key, weight in config["loss_weights"].items()},
                "task_weight": deserialize(config["task_weight"]),
                "mask": load(config["mask"]) if isinstance(config["mask"], dict) else config["mask"],
            }
        )
        for name, shapes in projections.items():
            distiller._projections_for(name, shapes)
        return distiller


_NO_TEACHER = "this Distiller has no teacher (it is not saved with it); set distiller.teacher before training."

_ONE_NUMBER = (
    "the models give one number without an activation: the logit of a yes or no, or a quantity? Pass "
    "losses={'logits': tfvllm.losses.ForwardKL(temperature=2.0)} for a logit, tfvllm.losses.Logits() for a quantity."
)


class _Held:
    """Holds the teacher where Keras does not look, so that its weights are neither trained nor saved."""

    def __init__(self) -> None:
        self.heads = Heads({})
        self.reader = batch_inputs.Reader()
        self.teachers: dict[str, keras.Model] = {}
        self.plans: dict[str, dict[str, list[Pair]]] = {}
        self.trunks: dict[str, tuple[keras.Model, keras.Layer]] = {}


def _large_head(model: keras.Model) -> tuple[keras.Model, keras.Layer] | None:
    shape = None if isinstance(model, TeacherCache) else getattr(model, "output_shape", None)
    return split_head(model) if isinstance(shape, tuple) and (shape[-1] or 0) > SMALL else None


def _replicas() -> int:
    return tf.distribute.get_strategy().num_replicas_in_sync

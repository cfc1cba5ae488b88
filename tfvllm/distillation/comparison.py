"""How far a student is from its teacher, and where."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.distillation.inputs import Mask, dataset_of, has_strings, padding_mask, select
from tfvllm.distillation.losses import ForwardKL
from tfvllm.errors import InputError
from tfvllm.models.products import flat_products


@dataclass
class Difference:
    """One example where teacher and student differ.

    Attributes:
        index: of the example in the data.
        text: its input, where the data are raw strings.
        divergence: KL(teacher ‖ student) in nats (mean over real positions of a sequence).
        teacher, student: the classes they choose (of a sequence: None).
        label: the right class, where the data tell.
    """

    index: int
    text: str | None
    divergence: float
    teacher: int | None
    student: int | None
    label: int | None


@dataclass
class Comparison:
    """Teacher and student on the same data.

    Attributes:
        agreement: share of examples (real positions) where both choose the same class, in [0, 1].
        divergence: mean KL(teacher ‖ student) in nats.
        teacher_accuracy, student_accuracy: against the labels, in [0, 1]; None without labels or for sequences.
        worst: where they differ most, the worst first.
        divergences: float32 [examples], one for each.
    """

    agreement: float
    divergence: float
    teacher_accuracy: float | None
    student_accuracy: float | None
    worst: list[Difference] = field(repr=False)
    divergences: np.ndarray = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the value of every example."""
        told = {
            name: getattr(self, name) for name in ("agreement", "divergence", "teacher_accuracy", "student_accuracy")
        }
        return {**told, "worst": [vars(difference) for difference in self.worst]}


def compare(
    teacher: keras.Model,
    student: keras.Model,
    x: Any,
    y: Any = None,
    *,
    batch_size: int = 32,
    worst: int = 20,
    mask: Mask = "auto",
    both: Callable[[Any], tuple[tf.Tensor, ...]] | None = None,
) -> Comparison:
    """Runs both models over the same inputs.

    Args:
        teacher, student: models with logits over the same classes, reading the same inputs.
        x: raw strings, an array, or a dict of these; not a dataset (examples are told by their place).
        y: labels int [examples], or None.
        batch_size: examples at once.
        worst: how many examples to list.
        mask: as for `tfvllm.Distiller`.
        both: `side_by_side(teacher, student, mask)`, to trace the models once for many comparisons.

    Example:
        >>> found = tfvllm.distillation.compare(tiny_net(), tiny_net(), points, kinds)
        >>> 0 <= found.agreement <= 1 and len(found.divergences) == len(kinds)
        True
    """
    if isinstance(x, tf.data.Dataset):
        raise InputError("compare expects arrays or strings, found a dataset; pass its x and y.")
    strings = has_strings(x)
    if strings:
        batches = dataset_of(x, None, None, batch_size, student.preprocess_samples, shuffle=False)
    else:
        batches = tf.data.Dataset.from_tensor_slices(x).batch(batch_size)
    both = both or side_by_side(teacher, student, mask)
    parts = []
    for batch in batches:
        x_batch = batch[0] if isinstance(batch, tuple) else batch
        parts.append([part.numpy() for part in both(x_batch)])
    divergences, same, counts, of_teacher, of_student = (np.concatenate(part) for part in zip(*parts))
    labels = None if y is None else np.asarray(y)
    labels = labels if labels is not None and labels.ndim == 1 and of_teacher[0] >= 0 else None
    total = max(float(counts.sum()), 1.0)

    def told(index: int) -> Difference:
        text = _text(x, index) if strings else None
        t, s = (int(part[index]) if part[index] >= 0 else None for part in (of_teacher, of_student))
        return Difference(index, text, float(divergences[index]), t, s, None if labels is None else int(labels[index]))

    return Comparison(
        agreement=float((same * counts).sum() / total),
        divergence=float((divergences * counts).sum() / total),
        teacher_accuracy=None if labels is None else float((of_teacher == labels).mean()),
        student_accuracy=None if labels is None else float((of_student == labels).mean()),
        worst=[told(int(index)) for index in np.argsort(-divergences, kind="stable")[:worst]],
        divergences=divergences,
    )


def side_by_side(
    teacher: keras.Model, student: keras.Model, mask: Mask = "auto"
) -> Callable[[Any], tuple[tf.Tensor, ...]]:
    """A function from a batch to, each [batch]: KL in nats, share of agreement, real positions behind them, the
    teacher's and the student's class (-1 for sequences)."""
    from tfvllm.distillation.distiller import logits_of

    loss = ForwardKL()

    @tf.function(reduce_retracing=True)
    def both(x: Any) -> tuple[tf.Tensor, ...]:
        with flat_products(teacher, student):
            answer = student(select(student, x), training=False)
            of_teacher = logits_of(teacher(select(teacher, x), training=False), teacher)
        of_student = logits_of(answer, student)
        values, chosen = loss(of_teacher, of_student), [tf.argmax(part, -1) for part in (of_teacher, of_student)]
        same = tf.cast(tf.equal(*chosen), tf.float32)
        real = padding_mask(x, answer, mask) if values.shape.rank == 2 else None
        real = tf.ones_like(values) if real is None else tf.cast(real, tf.float32)
        if values.shape.rank == 1:
            return values, same, real, *chosen
        count = tf.reduce_sum(real, axis=1)
        values, same = (tf.math.divide_no_nan(tf.reduce_sum(part * real, axis=1), count) for part in (values, same))
        return values, same, count, tf.fill(tf.shape(count), -1), tf.fill(tf.shape(count), -1)

    return both


def _text(x: Any, index: int) -> str:
    if isinstance(x, Mapping):
        return " ||| ".join(_text(part, index) for part in x.values())
    text = x[index]
    text = text.numpy() if isinstance(text, tf.Tensor) else text
    return text.decode() if isinstance(text, bytes) else str(text)

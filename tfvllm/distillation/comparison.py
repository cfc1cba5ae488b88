"""How far a student is from its teacher, and where."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.distillation.answers import Heads, between, logits_of
from tfvllm.distillation.checks import checked_from_logits
from tfvllm.distillation.inputs import Mask, as_arrays, dataset_of, has_strings, padding_mask, preprocess_of, select
from tfvllm.distillation.losses import ForwardKL
from tfvllm.errors import InputError
from tfvllm.families.matmuls import einsum_as_matmul


@dataclass
class Difference:
    """One example where teacher and student differ.

    Attributes:
        index: of the example in the data.
        text: its input, where the data are raw strings.
        divergence: KL(teacher ‖ student) in nats (mean over real positions of a sequence).
        teacher, student: the classes they choose (of a sequence, or of several labels: None).
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
        agreement: share of examples (real positions; labels) where both choose the same class, in [0, 1].
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
    from_logits: bool | Mapping[str, bool] | None = None,
    both: Callable[[Any], tuple[tf.Tensor, ...]] | None = None,
) -> Comparison:
    """Runs both models over the same inputs.

    Args:
        teacher, student: models with logits or probabilities of the same classes, reading the same inputs.
        x: raw strings, an array, or a dict or tuple of these; not a dataset (examples are told by their place).
        y: labels int [examples], or None.
        batch_size: examples at once.
        worst: how many examples to list.
        mask, from_logits: as for `tfvllm.Distiller`.
        both: `side_by_side(teacher, student, mask)`, to trace the models once for many comparisons.

    Example:
        >>> found = tfvllm.distillation.compare(tiny_net(), tiny_net(), points, kinds)
        >>> 0 <= found.agreement <= 1 and len(found.divergences) == len(kinds)
        True
    """
    if isinstance(x, tf.data.Dataset):
        raise InputError("compare expects arrays or strings, found a dataset; pass its x and y.")
    strings = has_strings(x)
    as_is = keras.utils.pack_x_y_sample_weight
    batches = dataset_of(x, None, None, batch_size, preprocess_of(student) if strings else as_is, shuffle=False)
    both = both or side_by_side(teacher, student, mask, from_logits)
    parts = []
    for batch in batches:
        x_batch = batch[0] if isinstance(batch, tuple) else batch
        parts.append([part.numpy() for part in both(x_batch)])
    divergences, same, counts, of_teacher, of_student = (np.concatenate(part) for part in zip(*parts))
    arrays = as_arrays(x)
    labels = None if y is None else np.asarray(y)
    labels = labels[:, 0] if labels is not None and labels.ndim == 2 and labels.shape[1] == 1 else labels
    labels = labels if labels is not None and labels.ndim == 1 and of_teacher[0] >= 0 else None
    total = max(float(counts.sum()), 1.0)

    def told(index: int) -> Difference:
        text = _text(arrays, index) if strings else None
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
    teacher: keras.Model,
    student: keras.Model,
    mask: Mask = "auto",
    from_logits: bool | Mapping[str, bool] | None = None,
) -> Callable[[Any], tuple[tf.Tensor, ...]]:
    """A function from a batch to, each [batch]: KL in nats, share of agreement, real positions behind them, the
    teacher's and the student's class (-1 for sequences and for several labels)."""
    loss = ForwardKL()
    heads = Heads(checked_from_logits(from_logits, {"teacher": teacher}))

    @tf.function(reduce_retracing=True)
    def both(x: Any) -> tuple[tf.Tensor, ...]:
        with einsum_as_matmul(teacher, student):
            answer = student(select(student, x), training=False)
            answered = teacher(select(teacher, x), training=False)
        read = heads.of("teacher", teacher, x, answered), heads.of("student", student, x, answer)
        of_teacher: Any = logits_of(answered, teacher, read[0])
        of_student: Any = logits_of(answer, student, read[1])
        values = between(loss, of_teacher, of_student, read)
        if of_student.shape[-1] == 1 or any(head.independent for head in read):
            chosen = [tf.cast(part > 0, tf.int64) for part in (of_teacher, of_student)]
            same = tf.reduce_mean(tf.cast(tf.equal(*chosen), tf.float32), axis=-1)
            chosen = [part[..., 0] if part.shape[-1] == 1 else tf.fill(tf.shape(same), -1) for part in chosen]
        else:
            chosen = [tf.argmax(part, -1) for part in (of_teacher, of_student)]
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
    if isinstance(x, (Mapping, tuple)):
        return " ||| ".join(_text(part, index) for part in (x.values() if isinstance(x, Mapping) else x))
    text = x[index]
    text = text.numpy() if isinstance(text, tf.Tensor) else text
    return text.decode() if isinstance(text, bytes) else str(text)

"""What a distillation run shows in TensorBoard."""

from typing import Any

import keras
import tensorflow as tf

from tfvllm.distillation.distiller import Distiller
from tfvllm.distillation.scheduled import value_at
from tfvllm.errors import InputError
from tfvllm.summaries import write_scalars


class DistillationSummaries(keras.callbacks.Callback):
    """TensorBoard curves of a `Distiller`: every part of its loss, and the weights by which the parts count.

    `log_dir/train` and `log_dir/validation` get one curve `epoch_<metric>` for each metric of the epoch, named as
    `keras.callbacks.TensorBoard` names them, so that both lie in one chart. `log_dir/train` also gets `weight/<part>`,
    the (scheduled) weight of each part at the end of the epoch, and `weighted/<part>`, the part times that weight. The
    tensorboard package is needed to look at the curves, not to write them.

    Args:
        log_dir: folder of the event files.

    Raises:
        InputError: `log_dir` is not a non-empty string or path, or the model being fitted is not a `Distiller`.

    Example:
        >>> distiller = tfvllm.Distiller(teacher=tiny_net(), student=tiny_net())
        >>> distiller.compile("adamw", loss="sparse_categorical_crossentropy")
        >>> curves = tfvllm.callbacks.DistillationSummaries(folder / "distillation")
        >>> history = distiller.fit(points, kinds, verbose=0, callbacks=[curves])
        >>> [path.name for path in (folder / "distillation").iterdir()]
        ['train']
    """

    def __init__(self, log_dir: Any):
        super().__init__()
        if not log_dir or (not isinstance(log_dir, str) and not hasattr(log_dir, "__fspath__")):
            raise InputError(f"log_dir={log_dir!r}: expected a non-empty path.")
        self.log_dir = str(log_dir)
        self._writers: dict[str, Any] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        if not isinstance(self.model, Distiller):
            raise InputError(
                f"DistillationSummaries follows a tfvllm.Distiller, found {type(self.model).__name__}; for other "
                "models use keras.callbacks.TensorBoard."
            )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        curves: dict[str, dict[str, float]] = {"train": {}, "validation": {}}
        for name, value in (logs or {}).items():
            kind = "validation" if name.startswith("val_") else "train"
            curves[kind][f"epoch_{name.removeprefix('val_')}"] = float(value)
        step = int(self.model.optimizer.iterations.numpy())
        for part, weight in {"task": self.model.task_weight, **self.model.loss_weights}.items():
            now = float(value_at(weight, step))
            curves["train"][f"weight/{part}"] = now
            if f"{part}_loss" in (logs or {}):
                curves["train"][f"weighted/{part}"] = now * float(logs[f"{part}_loss"])
        for kind, values in curves.items():
            if values:
                if kind not in self._writers:
                    self._writers[kind] = tf.summary.create_file_writer(f"{self.log_dir}/{kind}")
                write_scalars(self._writers[kind], values, epoch)

    def on_train_end(self, logs: Any = None) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

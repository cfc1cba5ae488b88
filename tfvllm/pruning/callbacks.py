"""Keras callbacks that drive the masks."""

import importlib.util
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.pruning import masks
from tfvllm.pruning.masks import MaskState, find_states
from tfvllm.pruning.prunable import PruneKernels, PruningPolicy, prunable_weights
from tfvllm.summaries import write_scalars


class UpdatePruningStep(keras.callbacks.Callback):
    """Counts steps and renews the masks of a model made by `prune_low_magnitude` (TFMOT's callback).

    Before every training step: step += 1, masks are renewed if the schedule says so, masked weights are zeroed. After
    every optimiser step masked weights are zero again. In a loop of your own call `set_model`, `on_train_begin`,
    `on_train_batch_begin`, `on_epoch_end`, `on_train_end`.

    Example:
        >>> pruned = tfvllm.prune_low_magnitude(keras.Sequential([keras.Input([8]), keras.layers.Dense(4)]))
        >>> pruned.compile("sgd", "mse")
        >>> step = tfvllm.callbacks.UpdatePruningStep()
        >>> history = pruned.fit(np.ones([8, 8]), np.ones([8, 4]), verbose=0, callbacks=[step])
        >>> len(step.states), step.states[0].pruning_step
        (1, 1)
    """

    def __init__(self) -> None:
        super().__init__()
        self.states: list[MaskState] = []

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        masks.forget_functions(model)

    def on_train_begin(self, logs: Any = None) -> None:
        self.states = self._find()
        for state in self.states:
            state.start()

    def _find(self) -> list[MaskState]:
        return find_states(self.model)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        steps = int(getattr(self.model, "steps_per_execution", 1) or 1)
        for state in self.states:
            state.advance(steps)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        for state in self.states:
            state.apply()

    def on_train_end(self, logs: Any = None) -> None:
        for state in self.states:
            state.apply()


class MagnitudePruning(UpdatePruningStep):
    """Prunes a model while it trains, alone or inside another model such as a `Distiller`.

    Masks belong to the model from construction to the end of training, so a checkpoint written meanwhile carries masks
    and step: build model and callback anew, load the weights, and training goes on. At the end of `fit` the masks go,
    the weights stay sparse and the model is an ordinary one. Another `fit` with the same callback goes on.

    Args:
        model: a built Keras 3 model.
        schedule: a schedule, or a mapping from weight-name patterns (`"transformer_layer_0/*"`) to schedules; the first
            match decides, weights without a match stay dense.
        policy: which layers are pruned; default: products, not embeddings (`PruneKernels`).
        block_size, block_pooling_type, sparsity_m_by_n: as for `prune_low_magnitude`.
        scope: "tensor": every weight reaches the schedule's sparsity by itself, as in TFMOT; "global": all weights of a
            schedule are ranked together.
        keep_masks: leave masks attached at the end of training.

    Raises:
        InputError: no schedule, nothing to prune, an M:N that does not divide.

    Example:
        >>> model = tiny_net()
        >>> model.compile("sgd", "sparse_categorical_crossentropy")
        >>> schedule = tfvllm.schedules.PolynomialDecay(0.0, 0.75, begin_step=0, end_step=2, frequency=1)
        >>> pruning = tfvllm.callbacks.MagnitudePruning(model, schedule)
        >>> history = model.fit(points, kinds, batch_size=8, epochs=2, verbose=0, callbacks=[pruning])
        >>> round(pruning.sparsity, 2)
        0.75
    """

    def __init__(
        self,
        model: Any,
        schedule: Any,
        *,
        policy: PruningPolicy | None = None,
        block_size: Any = (1, 1),
        block_pooling_type: str = "AVG",
        sparsity_m_by_n: Any = None,
        scope: str = "tensor",
        keep_masks: bool = False,
    ):
        super().__init__()
        if not isinstance(model, keras.Model):
            raise InputError(f"MagnitudePruning takes a keras.Model, got {type(model).__name__}.")
        if not model.built:
            raise InputError(f"{model.name} is not built: it has no weights yet. Call it on data once.")
        self.target = model
        self.keep_masks = keep_masks
        policy = PruneKernels() if policy is None else policy
        policy.ensure_model_supports_pruning(model)
        self._options = {
            "block_size": block_size,
            "block_pooling_type": block_pooling_type,
            "sparsity_m_by_n": sparsity_m_by_n,
            "scope": scope,
        }
        self._schedule = schedule
        self._policy = policy
        self._past: tuple[int, list[np.ndarray]] | None = None
        self._attach()

    _scored = False

    def _attach(self) -> None:
        targets = list(prunable_weights(self.target, self._policy))
        self.state = MaskState(targets, self._schedule, scored=self._scored, **self._options)
        masks.attach(self.target, self.state)
        if self._past is not None:
            step, values = self._past
            self.state.step_variable.assign(step)
            for variable, value in zip([*self.state.mask_variables, *self.state.score_variables], values):
                variable.assign(value)

    def set_model(self, model: Any) -> None:
        if masks.find_own(self.target) is None:
            self._attach()
        super().set_model(model)

    def _find(self) -> list[MaskState]:
        return [self.state]

    def on_train_end(self, logs: Any = None) -> None:
        super().on_train_end(logs)
        self._past = (
            self.state.pruning_step,
            [np.asarray(v) for v in (*self.state.mask_variables, *self.state.score_variables)],
        )
        if not self.keep_masks:
            masks.detach(self.target)
            masks.forget_functions(self.model)

    @property
    def sparsity(self) -> float:
        """Share of zeros among the pruned weights, as they are now."""
        zeros = sum(int(np.count_nonzero(np.asarray(t.variable) == 0)) for t in self.state.targets)
        return zeros / sum(int(np.prod(t.variable.shape)) for t in self.state.targets)


class MovementPruning(MagnitudePruning):
    """Prunes what the training moves towards zero, whatever its size (Sanh et al. 2020, arXiv:2005.07683).

    Score: the sum over steps of W x (change of W in the step), which for plain gradient descent is the learning rate
    times the paper's -W dL/dW; so any optimiser's own step counts. "Hard" movement pruning: masked weights are zero in
    the forward pass and while masked gather no score. Meant for fine-tuning, with a schedule that begins after some
    hundred steps. Arguments as for `MagnitudePruning`.

    Example:
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(4)])
        >>> model.compile("sgd", "mse")
        >>> pruning = tfvllm.callbacks.MovementPruning(model, tfvllm.ConstantSparsity(0.5, 2, frequency=1))
        >>> history = model.fit(np.ones([8, 8]), np.ones([8, 4]), batch_size=2, verbose=0, callbacks=[pruning])
        >>> round(pruning.sparsity, 1)
        0.5
    """

    _scored = True

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        super().on_train_batch_begin(batch, logs)
        self._before = [tf.identity(weight) for weight, _, _ in self.state.pruning_vars]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        for score, before, (after, _, _) in zip(self.state.score_variables, self._before, self.state.pruning_vars):
            change = tf.cast(after - before, tf.float32)
            score.value.assign_add(change * tf.cast(before, tf.float32))


# TensorFlow no longer brings TensorBoard; its event files can be written without it.
_HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
_TensorBoard = keras.callbacks.TensorBoard if _HAS_TENSORBOARD else keras.callbacks.Callback


class PruningSummaries(_TensorBoard):  # type: ignore[misc, valid-type]
    """TensorBoard with the sparsity and the threshold of every mask, at every epoch (TFMOT's callback).

    Where the tensorboard package is not installed only the masks' curves are written.

    Args:
        log_dir: folder of the event files; the masks' curves go to `log_dir/metrics`.
        update_freq, **kwargs: as for `keras.callbacks.TensorBoard`.

    Raises:
        InputError: `log_dir` is not a non-empty string or path.

    Example:
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(4)])
        >>> model.compile("sgd", "mse")
        >>> pruning = tfvllm.callbacks.MagnitudePruning(model, tfvllm.ConstantSparsity(0.5, 0, frequency=1))
        >>> curves = tfvllm.callbacks.PruningSummaries(folder / "logs")
        >>> history = model.fit(np.ones([8, 8]), np.ones([8, 4]), verbose=0, callbacks=[pruning, curves])
        >>> len(list((folder / "logs" / "metrics").iterdir()))
        1
    """

    def __init__(self, log_dir: Any, update_freq: Any = "epoch", **kwargs: Any):
        if not log_dir or (not isinstance(log_dir, str | bytes) and not hasattr(log_dir, "__fspath__")):
            raise InputError(f"log_dir={log_dir!r}: expected a non-empty path.")
        if _HAS_TENSORBOARD:
            super().__init__(log_dir=str(log_dir), update_freq=update_freq, **kwargs)
        else:
            super().__init__()
            self.log_dir = str(log_dir)
        self._mask_writer: Any = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_begin(epoch, logs)
        self._write()

    def on_train_end(self, logs: Any = None) -> None:
        self._write()
        super().on_train_end(logs)
        if self._mask_writer is not None:
            self._mask_writer.close()
            self._mask_writer = None

    def _write(self) -> None:
        states = find_states(self.model)
        if not states:
            return
        if self._mask_writer is None:
            self._mask_writer = tf.summary.create_file_writer(f"{self.log_dir}/metrics")
        step = int(self.model.optimizer.iterations.numpy())
        curves = {}
        for state in states:
            for target, mask, threshold in zip(state.targets, state.mask_variables, state.threshold_variables):
                curves[f"{target.name}/mask/sparsity"] = 1.0 - float(np.mean(np.asarray(mask, np.float32)))
                curves[f"{target.name}/threshold"] = float(np.asarray(threshold, np.float32))
        write_scalars(self._mask_writer, curves, step)

"""Keras callbacks that drive the masks."""

import importlib.util
import warnings
import zlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.pruning import masks
from tfvllm.pruning.masks import MaskState, find_states
from tfvllm.pruning.prunable import PruneKernels, PruningPolicy, Selection, say_what_stays_dense, select
from tfvllm.summaries import write_scalars


class UpdatePruningStep(keras.callbacks.Callback):
    """Counts steps and renews the masks of a model made by `prune_low_magnitude` (TFMOT's callback).

    Before every training step: step += 1, masks are renewed if the schedule says so, masked weights are zeroed. After
    every optimiser step masked weights are zero again, and so are an optimizer's averages of them. In a loop of your
    own call `set_model`, `on_train_begin`, `on_train_batch_begin`, `on_epoch_end`, `on_train_end`.

    At the end of `fit`, after every other callback, masked weights are zero whatever the others put there. Where one of
    them has put back an earlier epoch (`EarlyStopping(restore_best_weights=True)`), the model has the sparsity of that
    epoch: a warning says so, and `restored_step` is its step (else None).

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
        self.restored_step: int | None = None
        # (step, masked share) of each epoch's end by the checksum of its weights
        self._epochs: dict[int, tuple[int, float]] = {}
        self._history: Any = None

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        masks.forget_functions(model)

    def on_train_begin(self, logs: Any = None) -> None:
        self.states = self._find()
        self.restored_step = None
        self._epochs = {}
        for state in self.states:
            state.start()
        # Keras runs the history after all callbacks it is given: the place where others have done what they do.
        history = getattr(self.model, "history", None)
        # In a loop of one's own there is none, or that of a `fit` before, which knows its epochs.
        if isinstance(history, keras.callbacks.History) and not getattr(history, "epoch", None):
            earlier = history.on_train_end

            def last(logs: Any = None) -> None:
                earlier(logs)
                self._end()

            vars(history)["on_train_end"] = last
            self._history = history
        else:
            self._history = None

    def _find(self) -> list[MaskState]:
        return find_states(self.model)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        steps = int(getattr(self.model, "steps_per_execution", 1) or 1)
        if any([state.advance(steps) for state in self.states]):
            self._mask_averages()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._mask_averages()  # other callbacks may put them into the model, and save it, before this one's epoch ends

    def on_epoch_end(self, epoch: int = -1, logs: Any = None, *, batch: int = -1) -> None:
        """Keras gives `epoch`; TFMOT's loop of one's own calls it with `batch`. Neither is used."""
        self._apply()
        if self.states:
            self._epochs[self._checksum()] = self.states[0].pruning_step, self._masked_share()

    def _masked_share(self) -> float:
        return float(np.mean([share for state in self.states for share in state.sparsity().values()]))

    def _checksum(self) -> int:
        found = 0
        for state in self.states:
            for target in state.targets:
                found = zlib.crc32(np.asarray(target.variable).tobytes(), found)
        return found

    def on_train_end(self, logs: Any = None) -> None:
        if self._history is None:
            self._end()

    def _apply(self) -> None:
        for state in self.states:
            state.apply()
        self._mask_averages()

    def _mask_averages(self) -> None:
        """Zeroes masked weights in the averages that an optimizer with `use_ema` keeps and puts into the model."""
        masked = {id(t.variable): m for s in self.states for t, m in zip(s.targets, s.mask_variables)}
        waiting: list[Any] = [getattr(self.model, "optimizer", None)]
        while waiting:
            optimizer = waiting.pop()
            if optimizer is None:
                continue
            waiting += [getattr(optimizer, "inner_optimizer", None), *getattr(optimizer, "optimizers", ())]
            if getattr(optimizer, "use_ema", False) and getattr(optimizer, "built", False):
                for weight, average in zip(optimizer._trainable_variables, optimizer._model_variables_moving_average):
                    if id(weight) in masked:
                        mask = tf.convert_to_tensor(masked[id(weight)])
                        average.assign(tf.convert_to_tensor(average) * tf.cast(mask, average.dtype))

    def _end(self) -> None:
        if self._history is not None:
            vars(self._history).pop("on_train_end", None)
            self._history = None
        last, asked = max(self._epochs.values(), default=(0, 0.0))
        step, share = self._epochs.get(self._checksum(), (last, asked))
        if step < last:
            self.restored_step = step
            for state in self.states:
                state.take_masks_from_weights(step)
        if share < asked:
            warnings.warn(
                f"the weights are again those of pruning step {step} of {last}, where on average {share:.1%} of each "
                f"pruned weight was zero, not {asked:.1%}. Let only epochs after the schedule's end count as best: "
                "EarlyStopping(start_from_epoch=...).",
                stacklevel=2,
            )
        self._apply()


class MagnitudePruning(UpdatePruningStep):
    """Prunes a model while it trains, alone or inside another model such as a `Distiller`.

    Masks belong to the model from construction to the end of training, so a checkpoint written meanwhile carries masks
    and step: build model and callback anew, load the weights, and training goes on. At the end of `fit` the masks go,
    the weights stay sparse and the model is an ordinary one. Another `fit` with the same callback goes on.

    Frozen weights, and layers of one's own without `get_prunable_weights()`, stay dense and a warning names them;
    `dense` lists them. Other callbacks of Keras may stand before it or behind it.

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
        InputError: no schedule, nothing to prune, a layer with LoRA (merge it first) or one that is quantised.

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
        if not model.variables:
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
        self._past: tuple[int, dict[str, np.ndarray]] | None = None
        self._attach(self._select())

    _scored = False

    def _select(self) -> Selection:
        found = select(self.target, self._policy)
        if not found.targets and found.frozen:
            raise InputError(
                f"{self.target.name}: all {len(found.frozen)} kernels are frozen, so nothing would be pruned. Set "
                "trainable = True, or take tfvllm.pruning.sparsify, which does not train."
            )
        say_what_stays_dense(found, stacklevel=4)
        self.dense = [*found.frozen, *found.unknown]
        self._trained = [id(target.variable) for target in found.targets]
        return found

    def _attach(self, found: Selection) -> None:
        self.state = MaskState(found.targets, self._schedule, scored=self._scored, **self._options)
        masks.attach(self.target, self.state)
        if self._past is not None:
            step, values = self._past
            self.state.step_variable.assign(step)
            for variable in self._kept():
                if variable.name in values:
                    variable.assign(values[variable.name])

    def _kept(self) -> list[Any]:
        return [*self.state.mask_variables, *self.state.score_variables]

    def _remember(self) -> None:
        known = {} if self._past is None else self._past[1]
        self._past = self.state.pruning_step, known | {v.name: np.asarray(v) for v in self._kept()}

    def set_model(self, model: Any) -> None:
        attached = masks.find_own(self.target)
        trained = [id(target.variable) for target in select(self.target, self._policy).targets]
        if attached is None or trained != self._trained:  # layers may have been frozen, or thawed, since
            if attached is not None:
                self._remember()
                masks.detach(self.target)
            self._attach(self._select())
        super().set_model(model)

    def _find(self) -> list[MaskState]:
        return [self.state]

    def _end(self) -> None:
        super()._end()
        self._remember()
        if not self.keep_masks:
            masks.detach(self.target)
            masks.forget_functions(self.model)

    @property
    def sparsity(self) -> float:
        """Share of zeros among the pruned weights, as they are now; what stays `dense` is not counted."""
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
            before = tf.cast(before, tf.float32)
            score.value.assign_add((tf.cast(after, tf.float32) - before) * before)


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

"""Masks on the weights of a Keras 3 model, renewed by TFMOT's own mask update."""

import contextlib
import fnmatch
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.pruning._tfmot import tfmot
from tfvllm.pruning.prunable import Prunable, channel_view, is_trained

ATTRIBUTE = "tfvllm_masks"  # where a model keeps its MaskState, so that checkpoints carry it


class KeepMasked(keras.constraints.Constraint):
    """Weight x mask after every optimiser step: momentum and weight decay cannot revive a masked weight."""

    def __init__(self, mask: Any, then: Any = None):
        self.mask = mask
        self.then = then

    def __call__(self, w: Any) -> Any:
        value = tf.convert_to_tensor(self.then(w) if self.then is not None else w)
        return value * tf.cast(tf.convert_to_tensor(self.mask), value.dtype)


class _Ranked(NamedTuple):
    """How one weight is ranked."""

    target: Prunable
    score: Any  # a tf.Variable, or None to go by size

    def values(self) -> Any:
        """What TFMOT ranks by size, at least float32: the weight, or its score moved up so that none is negative."""
        if self.score is not None:
            return self.score - tf.reduce_min(self.score)
        weight = tf.convert_to_tensor(self.target.variable.value)
        return weight if weight.dtype.size >= 4 else tf.cast(weight, tf.float32)

    @property
    def is_exact(self) -> bool:
        """Whether the share is met although values are equal: TFMOT keeps all that equal the threshold.

        Scores often are (0 where no gradient came), and so are numbers of 16 bits.
        """
        return self.score is not None or tf.as_dtype(self.target.variable.dtype).size < 4


def _pruning_class() -> type:
    base = tfmot().impl.Pruning

    class Pruning(base):  # type: ignore[misc, valid-type]
        """TFMOT's `Pruning` with a 2-D view for weights of other ranks, and masks over several weights at once."""

        def __init__(self, ranked: Mapping[int, _Ranked], scope: str, renew: bool, **kwargs: Any):
            self._ranked = ranked
            self._scope = scope
            self._renew = renew
            super().__init__(**kwargs)

        def _validate_block(self) -> None:  # ours gives every weight two dimensions
            pass

        def _maybe_update_block_mask(self, weights: Any) -> tuple[Any, Any]:
            ranked = self._ranked[id(weights)]
            value = ranked.values()
            if self._sparsity_m_by_n:
                view = channel_view(ranked.target)
                threshold, mask = super()._maybe_update_block_mask(view.to_matrix(value))
                return threshold, view.from_matrix(mask)
            if self._block_size == [1, 1]:
                return self._chosen(value, ranked.is_exact)
            view = ranked.target.view
            threshold, mask = self._block_mask(view.to_matrix(value), ranked.is_exact)
            return threshold, view.from_matrix(mask)

        def _block_mask(self, matrix: Any, exact: bool) -> tuple[Any, Any]:
            """TFMOT's block mask, step by step: its pooling drops axes of size one and then fails on thin weights."""
            utils = tfmot().utils
            rows, columns = matrix.shape
            height, width = self._block_size
            pooled = utils.factorized_pool(
                tf.abs(matrix), self._block_size, self._block_pooling_type, self._block_size, "SAME"
            )
            threshold, mask = self._chosen(tf.reshape(pooled, [-(-rows // height), -(-columns // width)]), exact)
            return threshold, utils.expand_tensor(mask, self._block_size)[:rows, :columns]

        def _chosen(self, values: Any, exact: bool) -> tuple[Any, Any]:
            if not exact:
                return self._update_mask(values)
            share = tf.cast(self._pruning_schedule(self._step_fn())[1], tf.float32)
            flat = tf.reshape(tf.abs(values), [-1])
            count = tf.cast(tf.maximum(tf.round(tf.cast(tf.size(flat), tf.float32) * (1 - share)), 1), tf.int32)
            best, places = tf.math.top_k(flat, k=count)
            mask = tf.scatter_nd(places[:, None], tf.ones_like(best), tf.shape(flat))
            return best[-1], tf.reshape(mask, values.shape)

        def is_turn(self) -> Any:
            """Whether masks are renewed at the present step."""
            turn = self._pruning_schedule(self._step_fn())[0]
            if self._sparsity_m_by_n:
                first = tf.equal(self._step_fn(), 1)
                return tf.logical_or(first, turn) if self._renew else first
            return turn

        def update_masks(self) -> None:
            """Renews thresholds and masks from the weights as they are. What is frozen meanwhile stays as it is."""
            trained = [
                (self._ranked[id(weight)], mask, threshold)
                for weight, mask, threshold in self._pruning_vars
                if is_trained(self._ranked[id(weight)].target)
            ]
            if self._scope == "global" and trained:
                flat = [tf.reshape(tf.cast(ranked.values(), tf.float32), [-1]) for ranked, _, _ in trained]
                exact = any(ranked.is_exact for ranked, _, _ in trained)
                found, joint = self._chosen(tf.concat(flat, 0), exact)
                parts = tf.split(joint, [int(part.shape[0]) for part in flat])
                updates = [(found, tf.reshape(part, mask.shape)) for part, (_, mask, _) in zip(parts, trained)]
            else:
                updates = [self._maybe_update_block_mask(ranked.target.variable.value) for ranked, _, _ in trained]
            for (_, mask, threshold), (new_threshold, new_mask) in zip(trained, updates):
                threshold.assign(tf.cast(new_threshold, threshold.dtype))
                mask.assign(tf.cast(new_mask, mask.dtype))

    return Pruning


class MaskState(keras.layers.Layer):
    """Masks, thresholds and the step counter of some weights, as weights of a layer, so that checkpoints carry them.

    Attributes:
        pruning_vars: (weight, mask, threshold) as tf.Variables.
        pruning_step: int64 steps taken, -1 before training.
    """

    def __init__(
        self,
        targets: Sequence[Prunable],
        schedule: Any,
        *,
        block_size: Sequence[int] = (1, 1),
        block_pooling_type: str = "AVG",
        sparsity_m_by_n: Sequence[int] | None = None,
        scope: str = "tensor",
        renew_m_by_n: bool = True,
        scored: bool = False,
        name: str = "pruning_masks",
    ):
        super().__init__(name=name, trainable=False, dtype="float32")
        block_size, sparsity_m_by_n = check_options(block_size, block_pooling_type, sparsity_m_by_n, scope)
        targets = with_groups(targets, sparsity_m_by_n)
        if not targets:
            raise InputError(
                "nothing to prune: expected built Dense-like, convolution or Embedding layers that are trained."
            )
        groups = _groups(targets, schedule)
        self.targets = tuple(target for _, members in groups for target in members)
        # A plain tuple behind a closure: Keras must not track the weights as this layer's own.
        self._weight_of = {target.name: (lambda v=target.variable: v) for target in self.targets}
        self.mask_variables: list[Any] = []
        self.threshold_variables: list[Any] = []
        self.score_variables: list[Any] = []
        with _strategy_scope(self.targets):
            for target in self.targets:
                label = target.name.replace("/", ".")
                dtype = target.variable.dtype
                shape = tuple(target.variable.shape)
                self.mask_variables.append(self._own(f"{label}.mask", shape, "ones", dtype))
                self.threshold_variables.append(self._own(f"{label}.threshold", (), "zeros", dtype))
                if scored:
                    self.score_variables.append(self._own(f"{label}.score", shape, "zeros", "float32"))
            self.step_variable = self._own("pruning_step", (), keras.initializers.Constant(-1), "int64")
        self.built = True
        self.pruning_vars = tuple(
            (t.variable.value, m.value, h.value)
            for t, m, h in zip(self.targets, self.mask_variables, self.threshold_variables)
        )
        scores = [s.value for s in self.score_variables] or [None] * len(self.targets)
        ranked = {id(t.variable.value): _Ranked(t, score) for t, score in zip(self.targets, scores)}
        self._pruners = []
        position = 0
        for group_schedule, members in groups:
            self._pruners.append(
                _pruning_class()(
                    ranked,
                    scope,
                    renew_m_by_n,
                    training_step_fn=lambda: self.step_variable.value,
                    pruning_vars=list(self.pruning_vars[position : position + len(members)]),
                    pruning_schedule=group_schedule,
                    block_size=block_size,
                    block_pooling_type=block_pooling_type,
                    sparsity_m_by_n=sparsity_m_by_n,
                )
            )
            position += len(members)
        for target, mask in zip(self.targets, self.mask_variables):
            before = target.variable.constraint
            if isinstance(before, KeepMasked):
                raise InputError(f"{target.name} is pruned already. Call tfvllm.strip_pruning(model) first.")
            target.variable.constraint = KeepMasked(mask, before)

    def _own(self, name: str, shape: tuple[int, ...], initializer: Any, dtype: str) -> Any:
        variable = self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            dtype=dtype,
            trainable=False,
            autocast=False,
            aggregation="mean" if dtype != "int64" else "only_first_replica",
        )
        variable.tfvllm_pruning_state = True
        return variable

    @property
    def pruning_step(self) -> int:
        return int(self.step_variable.numpy())

    def start(self) -> None:
        """Sets the step to 0 if training has not begun; a restored state goes on where it stopped."""
        if self.pruning_step < 0:
            self.step_variable.assign(0)

    def advance(self, steps: int = 1) -> bool:
        """Before a training step: counts it, renews the masks if it is their turn, zeroes masked weights.

        Returns:
            Whether any mask was renewed.
        """
        renewed = False
        with _strategy_scope(self.targets):
            for _ in range(steps):
                self.step_variable.assign_add(1)
                for pruner in self._pruners:
                    if bool(pruner.is_turn()):
                        pruner.update_masks()
                        renewed = True
        if renewed:
            self.apply()
        return renewed

    def update(self) -> None:
        """Renews all masks now, at the present step's sparsity, and zeroes the weights."""
        with _strategy_scope(self.targets):
            for pruner in self._pruners:
                pruner.update_masks()
        self.apply()

    def take_masks_from_weights(self, step: int) -> None:
        """Masks what is zero in the weights as they are, those of an earlier `step`."""
        self.step_variable.assign(step)
        with _strategy_scope(self.targets):
            for weight, mask, _ in self.pruning_vars:
                mask.assign(tf.cast(tf.not_equal(weight, 0), mask.dtype))

    def apply(self) -> None:
        """weight <- weight x mask."""
        with _strategy_scope(self.targets):
            for weight, mask, _ in self.pruning_vars:
                weight.assign(weight * tf.cast(mask, weight.dtype))

    def release(self) -> None:
        """Masks the weights a last time and lets them go."""
        self.apply()
        for target in self.targets:
            constraint = target.variable.constraint
            if isinstance(constraint, KeepMasked):
                target.variable.constraint = constraint.then

    def sparsity(self) -> dict[str, float]:
        """Share of masked entries by weight name."""
        return {
            target.name: 1.0 - float(np.mean(np.asarray(mask, np.float32)))
            for target, mask in zip(self.targets, self.mask_variables)
        }

    def call(self, inputs: Any) -> Any:
        return inputs


def check_options(
    block_size: Any, pooling: str, m_by_n: Any, scope: str = "tensor"
) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """(block size, M:N) as pairs of integers.

    Raises:
        InputError: one of them, the pooling or the scope is none, or they exclude each other.
    """
    if pooling not in ("AVG", "MAX"):
        raise InputError(f"block_pooling_type={pooling!r}: expected 'AVG' or 'MAX'.")
    if scope not in ("tensor", "global"):
        raise InputError(f"scope={scope!r}: expected 'tensor' (each weight by itself) or 'global' (all together).")
    block_size = _two(block_size, "block_size")
    if min(block_size) < 1:
        raise InputError(f"block_size={block_size}: expected two integers >= 1.")
    if m_by_n is not None:
        m_by_n = _two(m_by_n, "sparsity_m_by_n")
        zeros, of = m_by_n
        if not 0 < zeros < of:
            raise InputError(f"sparsity_m_by_n={m_by_n}: expected (m, n) with 0 < m < n, m zeros in every n.")
        if block_size != (1, 1):
            raise InputError("sparsity_m_by_n and block_size exclude each other; leave block_size at (1, 1).")
    if scope == "global" and (m_by_n is not None or block_size != (1, 1)):
        raise InputError("scope='global' works element by element; expected no block_size and no sparsity_m_by_n.")
    return block_size, m_by_n


def with_groups(targets: Sequence[Prunable], m_by_n: tuple[int, int] | None) -> list[Prunable]:
    """The targets that M:N is for: TFMOT leaves 3-D convolutions dense, and vectors have no groups of inputs."""
    if m_by_n is None:
        return list(targets)
    vector = next((target for target in targets if len(target.view.shape) < 2), None)
    if vector is not None:
        raise InputError(
            f"sparsity_m_by_n={m_by_n}: {vector.name} is a vector; expected weights with inputs and outputs."
        )
    dense = [target.name for target in targets if isinstance(target.layer, keras.layers.Conv3D)]
    if dense:
        warnings.warn(f"not pruned, as M:N is not for 3-D convolutions: {', '.join(dense)}", stacklevel=3)
    return [target for target in targets if target.name not in dense]


def _two(value: Any, name: str) -> tuple[int, int]:
    try:
        return tfmot().utils.convert_to_tuple_of_two_int(value, name)
    except ValueError as error:
        raise InputError(f"{error} Expected two integers, e.g. (2, 4).") from error


def _groups(targets: Sequence[Prunable], schedule: Any) -> list[tuple[Any, list[Prunable]]]:
    """Weights by schedule. A mapping gives patterns of weight names; the first that matches decides, None is dense."""
    if not isinstance(schedule, Mapping):
        if not callable(schedule):
            raise InputError(
                f"schedule={schedule!r}: expected one such as tfvllm.schedules.PolynomialDecay(0.0, 0.8, 0, 1000), "
                "or a mapping from weight-name patterns to schedules."
            )
        return [(schedule, list(targets))]
    groups: dict[str, list[Prunable]] = {pattern: [] for pattern in schedule}
    for target in targets:
        pattern = next((p for p in schedule if fnmatch.fnmatch(target.name, p)), None)
        if pattern is not None:
            groups[pattern].append(target)
    idle = [pattern for pattern, members in groups.items() if not members]
    if idle:
        names = ", ".join(t.name for t in targets[:4])
        raise InputError(f"schedule: no weight matches {', '.join(idle)}. Expected patterns of names such as {names}.")
    found = [(schedule[pattern], members) for pattern, members in groups.items() if schedule[pattern] is not None]
    if not found:
        raise InputError("schedule: every pattern maps to None, so nothing would be pruned.")
    return found


@contextlib.contextmanager
def _strategy_scope(targets: Iterable[Prunable]) -> Iterator[None]:
    """The scope of the tf.distribute strategy the weights live under, if any."""
    for target in targets:
        strategy = getattr(target.variable.value, "distribute_strategy", None)
        if strategy is not None and tf.distribute.get_strategy() is not strategy and strategy.num_replicas_in_sync > 1:
            with strategy.scope():
                yield
            return
        break
    yield


def attach(model: Any, state: MaskState) -> None:
    """Makes `state` a part of `model`, so that its weights are saved and restored with the model's."""
    if find_own(model) is not None:
        raise InputError(f"{model.name} is pruned already. Call tfvllm.strip_pruning(model) first.")
    locked = model._tracker.locked
    model._tracker.unlock()
    try:
        setattr(model, ATTRIBUTE, state)
    finally:
        if locked:
            model._tracker.lock()
    forget_functions(model)


def detach(model: Any) -> None:
    """Masks the weights a last time and removes the state: an ordinary model again."""
    state = find_own(model)
    if state is None:
        return
    state.release()
    locked = model._tracker.locked
    model._tracker.unlock()
    try:
        model._tracker.untrack(state)
        delattr(model, ATTRIBUTE)
    finally:
        if locked:
            model._tracker.lock()
    forget_functions(model)


def find_own(model: Any) -> MaskState | None:
    return vars(model).get(ATTRIBUTE)


def forget_functions(model: Any) -> None:
    """Drops the traced training step: it was traced with, or without, the masks."""
    if hasattr(model, "train_function"):
        model.train_function = None


def find_states(model: Any) -> list[MaskState]:
    """Every MaskState in `model`, in wrappers, attached to it or to models inside it."""
    found: dict[int, MaskState] = {}
    for layer in model._flatten_layers():
        for candidate in (layer, vars(layer).get(ATTRIBUTE)):
            if isinstance(candidate, MaskState):
                found[id(candidate)] = candidate
    return list(found.values())

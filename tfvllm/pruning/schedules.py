"""TFMOT's pruning schedules, with the same names, arguments and meaning, and a config that loads again."""

from typing import Any

import keras
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.pruning._tfmot import tfmot

_schedule: Any = tfmot().schedule
PruningSchedule = _schedule.PruningSchedule


class _FromConfig:
    """TFMOT's `get_config` wraps its arguments in {"class_name", "config"} and its `from_config` does not unwrap."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(**config.get("config", config))


@keras.saving.register_keras_serializable(package="tfvllm")
class ConstantSparsity(_FromConfig, _schedule.ConstantSparsity):
    """The same sparsity from `begin_step` to `end_step`, renewed every `frequency` steps (TFMOT's `ConstantSparsity`).

    Args:
        target_sparsity: share of zeros, in [0, 1).
        begin_step: first step; steps count from 1 during training.
        end_step: last step, -1 for no end.
        frequency: masks are renewed when (step - begin_step) is a multiple of it.

    Raises:
        InputError: a share outside [0, 1), a schedule that ends before it begins, a frequency below 1.

    Example:
        >>> schedule = tfvllm.schedules.ConstantSparsity(0.5, begin_step=10, frequency=5)
        >>> should_prune, share = schedule(tf.constant(15))
        >>> bool(should_prune), float(share)
        (True, 0.5)
    """

    def __init__(self, target_sparsity: float, begin_step: int, end_step: int = -1, frequency: int = 100):
        try:
            super().__init__(target_sparsity, begin_step, end_step, frequency)
        except ValueError as error:
            raise _explain(error, begin_step, end_step, frequency, target_sparsity) from error


@keras.saving.register_keras_serializable(package="tfvllm")
class PolynomialDecay(_FromConfig, _schedule.PolynomialDecay):
    """Sparsity from `initial_sparsity` to `final_sparsity`, fast first (TFMOT's `PolynomialDecay`).

    s(t) = final + (initial - final) x (1 - (t - begin) / (end - begin))^power, Zhu and Gupta 2017, arXiv:1710.01878.

    Args:
        initial_sparsity, final_sparsity: shares of zeros, in [0, 1).
        begin_step, end_step: first and last step; steps count from 1 during training.
        power: exponent.
        frequency: masks are renewed when (step - begin_step) is a multiple of it.

    Raises:
        InputError: a share outside [0, 1), a schedule that ends before it begins, a frequency below 1.

    Example:
        >>> schedule = tfvllm.schedules.PolynomialDecay(0.0, 0.8, begin_step=0, end_step=100, frequency=10)
        >>> [round(float(schedule(tf.constant(step))[1]), 2) for step in (0, 50, 100)]
        [0.0, 0.7, 0.8]
    """

    def __init__(
        self,
        initial_sparsity: float,
        final_sparsity: float,
        begin_step: int,
        end_step: int,
        power: float = 3,
        frequency: int = 100,
    ):
        try:
            super().__init__(initial_sparsity, final_sparsity, begin_step, end_step, power, frequency)
        except ValueError as error:
            raise _explain(error, begin_step, end_step, frequency, initial_sparsity, final_sparsity) from error

    def __call__(self, step: Any) -> Any:
        turn, share = super().__call__(step)
        # No steps to divide by: the final share at once.
        return turn, tf.constant(self.final_sparsity, share.dtype) if self.begin_step == self.end_step else share


def _explain(error: ValueError, begin: int, end: int, frequency: int, *shares: float) -> InputError:
    given = f"sparsity {', '.join(map(str, shares))}, begin_step={begin}, end_step={end}, frequency={frequency}"
    return InputError(
        f"pruning schedule: {error}. Got {given}; expected shares in [0, 1), begin_step <= end_step, frequency >= 1."
    )

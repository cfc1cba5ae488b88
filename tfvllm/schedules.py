"""`tfvllm.schedules`: when to prune and how much. The work is in `tfvllm.pruning.schedules`."""

from tfvllm.pruning.schedules import ConstantSparsity, PolynomialDecay, PruningSchedule

__all__ = ["ConstantSparsity", "PolynomialDecay", "PruningSchedule"]

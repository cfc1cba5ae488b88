"""`tfvllm.callbacks`: Keras callbacks, from `tfvllm.pruning.callbacks` and `tfvllm.distillation.callbacks`."""

from tfvllm.distillation.callbacks import DistillationSummaries
from tfvllm.pruning.callbacks import MagnitudePruning, MovementPruning, PruningSummaries, UpdatePruningStep

__all__ = ["DistillationSummaries", "MagnitudePruning", "MovementPruning", "PruningSummaries", "UpdatePruningStep"]

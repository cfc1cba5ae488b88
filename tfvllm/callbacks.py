"""`tfvllm.callbacks`: Keras callbacks. The work is in `tfvllm.pruning.callbacks`."""

from tfvllm.pruning.callbacks import MagnitudePruning, MovementPruning, PruningSummaries, UpdatePruningStep

__all__ = ["MagnitudePruning", "MovementPruning", "PruningSummaries", "UpdatePruningStep"]

"""`tfvllm.callbacks`: Keras callbacks. The work is in `tfvllm.pruning.callbacks`."""

from tfvllm.pruning.callbacks import MagnitudePruning, PruningSummaries, UpdatePruningStep

__all__ = ["MagnitudePruning", "PruningSummaries", "UpdatePruningStep"]

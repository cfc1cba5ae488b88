"""Pruning: masks while training (TFMOT's schedules and mask update on Keras 3), and structure physically removed."""

import importlib
from typing import Any

# Imported on first use: masks bring in TFMOT, shrink does not.
_PUBLIC: dict[str, tuple[str, str]] = {
    "shrink": ("tfvllm.pruning.shrinking", "shrink"),
    "plan_shrink": ("tfvllm.pruning.shrinking", "plan_shrink"),
    "Plan": ("tfvllm.pruning.structure", "Plan"),
    "apply_plan": ("tfvllm.pruning.structure", "apply_plan"),
    "mask_model": ("tfvllm.pruning.structure", "mask_model"),
    "sparsify": ("tfvllm.pruning.oneshot", "sparsify"),
    "sensitivity": ("tfvllm.pruning.sensitivity", "sensitivity"),
    "Sensitivity": ("tfvllm.pruning.sensitivity", "Sensitivity"),
    "PruningReport": ("tfvllm.pruning.report", "PruningReport"),
    "block_flops": ("tfvllm.pruning.report", "block_flops"),
    "merge_lora": ("tfvllm.families.stored", "merge_lora"),
    "save_sparse": ("tfvllm.pruning.files", "save_sparse"),
    "load_sparse": ("tfvllm.pruning.files", "load_sparse"),
    "unit_scores": ("tfvllm.pruning.importance", "unit_scores"),
    "prune_low_magnitude": ("tfvllm.pruning.wrapper", "prune_low_magnitude"),
    "strip_pruning": ("tfvllm.pruning.wrapper", "strip_pruning"),
    "PruneLowMagnitude": ("tfvllm.pruning.wrapper", "PruneLowMagnitude"),
    "PruningPolicy": ("tfvllm.pruning.prunable", "PruningPolicy"),
    "PruneKernels": ("tfvllm.pruning.prunable", "PruneKernels"),
    "PruneForLatencyOnXNNPack": ("tfvllm.pruning.xnnpack", "PruneForLatencyOnXNNPack"),
    "MagnitudePruning": ("tfvllm.pruning.callbacks", "MagnitudePruning"),
    "MovementPruning": ("tfvllm.pruning.callbacks", "MovementPruning"),
    "UpdatePruningStep": ("tfvllm.pruning.callbacks", "UpdatePruningStep"),
    "PruningSummaries": ("tfvllm.pruning.callbacks", "PruningSummaries"),
    "ConstantSparsity": ("tfvllm.pruning.schedules", "ConstantSparsity"),
    "PolynomialDecay": ("tfvllm.pruning.schedules", "PolynomialDecay"),
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _PUBLIC[name]
    except KeyError:
        raise AttributeError(f"module 'tfvllm.pruning' has no attribute {name!r}") from None
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])

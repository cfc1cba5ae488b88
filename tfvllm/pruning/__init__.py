"""Pruning: masks while training (TFMOT's schedules and mask update on Keras 3), and structure physically removed."""

import importlib
from typing import TYPE_CHECKING, Any

# Imported on first use: masks bring in TFMOT, shrink does not.
_PUBLIC: dict[str, tuple[str, str]] = {
    "shrink": ("tfvllm.pruning.shrinking", "shrink"),
    "plan_shrink": ("tfvllm.pruning.shrinking", "plan_shrink"),
    "Plan": ("tfvllm.pruning.structure", "Plan"),
    "apply_plan": ("tfvllm.pruning.structure", "apply_plan"),
    "mask_model": ("tfvllm.pruning.structure", "mask_model"),
    "unit_scores": ("tfvllm.pruning.importance", "unit_scores"),
    "ConstantSparsity": ("tfvllm.pruning.schedules", "ConstantSparsity"),
    "PolynomialDecay": ("tfvllm.pruning.schedules", "PolynomialDecay"),
}

__all__ = [*_PUBLIC]

if TYPE_CHECKING:
    from tfvllm.pruning.importance import unit_scores
    from tfvllm.pruning.schedules import ConstantSparsity, PolynomialDecay
    from tfvllm.pruning.shrinking import plan_shrink, shrink
    from tfvllm.pruning.structure import Plan, apply_plan, mask_model


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _PUBLIC[name]
    except KeyError:
        raise AttributeError(f"module 'tfvllm.pruning' has no attribute {name!r}") from None
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value

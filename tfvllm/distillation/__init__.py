"""Knowledge distillation: the Distiller, its losses, students made from their teachers."""

import importlib
from typing import Any

_PUBLIC = {
    "Distiller": "tfvllm.distillation.distiller",
    "OnPolicy": "tfvllm.distillation.on_policy",
    "TeacherCache": "tfvllm.distillation.cache",
    "write_teacher_cache": "tfvllm.distillation.cache",
    "write_targets": "tfvllm.distillation.targets",
    "read_targets": "tfvllm.distillation.targets",
    "compare": "tfvllm.distillation.comparison",
    "iterate": "tfvllm.distillation.rounds",
    "student_from": "tfvllm.distillation.student",
    "spread": "tfvllm.distillation.layer_map",
    "layer_pairs": "tfvllm.distillation.layer_map",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value

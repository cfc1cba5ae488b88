"""What a student may learn from its teacher, as losses for `tfvllm.Distiller`."""

from tfvllm.distillation.losses import (
    AttentionMaps,
    DistillationLoss,
    ForwardKL,
    HiddenStates,
    JensenShannon,
    Logits,
    Relations,
    ReverseKL,
)

__all__ = [
    "AttentionMaps",
    "DistillationLoss",
    "ForwardKL",
    "HiddenStates",
    "JensenShannon",
    "Logits",
    "Relations",
    "ReverseKL",
]

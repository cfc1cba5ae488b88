"""What a student may learn from its teacher, as losses for `tfvllm.Distiller`."""

from tfvllm.distillation.losses import (
    DistillationLoss,
    ForwardKL,
    JensenShannon,
    Logits,
    ReverseKL,
)

__all__ = ["DistillationLoss", "ForwardKL", "JensenShannon", "Logits", "ReverseKL"]

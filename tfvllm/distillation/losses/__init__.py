"""Distillation losses: pure and unreduced. One file each."""

from tfvllm.distillation.losses.attention_maps import AttentionMaps
from tfvllm.distillation.losses.base import DistillationLoss
from tfvllm.distillation.losses.forward_kl import ForwardKL
from tfvllm.distillation.losses.hidden_states import HiddenStates
from tfvllm.distillation.losses.jensen_shannon import JensenShannon
from tfvllm.distillation.losses.logits import Logits
from tfvllm.distillation.losses.relations import Relations
from tfvllm.distillation.losses.reverse_kl import ReverseKL

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

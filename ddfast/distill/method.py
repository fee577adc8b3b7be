"""What a distillation method is to the training loop: networks with roles, and a loss per phase."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddfast.models.protocol import Condition, Teacher
from ddfast.models.student import Student


@dataclass(kw_only=True)
class Roles:
    """The networks of a distillation: only DD2 has a guidance network."""

    student: Student
    teacher: Teacher
    guidance: nn.Module | None = None


@dataclass(kw_only=True)
class Batch:
    """Trajectories: noise [B, N, D], the codes int64 [B, N] it flows to, and the condition."""

    noise: Tensor
    codes: Tensor
    condition: Condition


class Method(ABC):
    """A distillation method; it knows losses, not optimizers."""

    def __init__(self, roles: Roles) -> None:
        self.roles = roles

    @abstractmethod
    def phase(self, step: int) -> str:
        """Whose turn it is: the name of the role that step `step` updates."""

    @abstractmethod
    def step(self, phase: str, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of one update of `phase`, and what to log; all randomness comes from `generator`."""


class ExponentialMovingAverage:
    """Running average of a network's parameters, moved once per update of that network.

    Early on the rate is (step + 1) / (step + 10), so that the average forgets the initialisation (METHOD.md section 3).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move the average towards the network after its update number `step` (0-based)."""
        rate = min(self.decay, (step + 1) / (step + 10))
        averages = list(self.average.values())
        torch._foreach_lerp_(averages, list(network.parameters()), 1 - rate)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Overwrite the network's parameters by the average."""
        for name, parameter in network.named_parameters():
            parameter.copy_(self.average[name])

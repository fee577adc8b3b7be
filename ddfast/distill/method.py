"""What a distillation method is to the training loop: networks with roles, and a loss per phase."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ddfast import private_api, processes
from ddfast.config import OptimisationConfig
from ddfast.distill.batch import Batch, Part
from ddfast.models.flow_network import FlowNetwork
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.schedule import warmup_cosine

T = TypeVar("T")


@dataclass(kw_only=True)
class Roles:
    """The networks of a distillation: only DD2 has a guidance network."""

    student: Student
    teacher: Teacher
    guidance: FlowNetwork | None = None


class Call(Protocol):
    """Calls function(*arguments)."""

    def __call__(self, function: Callable[..., T], *arguments: Any) -> T:
        """Its result."""


def directly(function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments): a `Call` of networks that are whole."""
    return function(*arguments)


class Method(ABC):
    """One stage of a distillation; it knows losses, not optimizers.

    Attributes:
        networks: the network that each phase updates.
        total: steps, all phases together.
        call: how what reads the networks' weights is called outside of `step`: `call(function, *arguments)`; their
            processes may hold a part of the weights each.
    """

    networks: dict[str, nn.Module]
    total: int
    call: Call = staticmethod(directly)

    def __init__(self, roles: Roles) -> None:
        self.roles = roles

    @abstractmethod
    def phase(self, step: int) -> str:
        """Whose turn it is in step `step`: a key of `networks`."""

    @abstractmethod
    def step(self, phase: str, batch: Batch, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """What a part of the batch contributes to the loss of one update of `phase`, and to what is logged.

        The sums over all parts are the batch's. All randomness comes from `part`, after what `batch` took of it.
        """

    @abstractmethod
    def learning_rate(self, phase: str, update: int) -> float:
        """Of a network's update number `update` (0-based)."""

    def reads_codes(self, phase: str) -> bool:
        """Whether a phase needs its batch's codes, which may take a decoding."""
        return True

    def starts_from_average(self, step: int) -> bool:
        """Whether the student takes on its moving average before step `step`."""
        return False

    def watch(self, step: int, average: ExponentialMovingAverage) -> tuple[dict[str, float], str | None]:
        """Figures of the samples after step `step`, and what is alarming about them, if anything."""
        return {}, None


class ExponentialMovingAverage:
    """Running average of a network's parameters, moved once per update of that network, each process its part.

    Early on the rate is (step + 1) / (step + 10), so that the average forgets the initialisation.

    Source: docs/method.md section 14 (DD2: schedule and published settings).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in network.named_parameters()}
        self._own = [processes.own(value) for value in self.average.values()]

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move the average towards the network after its update number `step` (0-based)."""
        rate = min(self.decay, (step + 1) / (step + 10))
        private_api.foreach_lerp_(self._own, [processes.own(value) for value in network.parameters()], 1 - rate)

    @contextlib.contextmanager
    def applied_to(self, network: nn.Module) -> Iterator[None]:
        """Within, the network has the averaged parameters."""
        live = [parameter.detach().clone() for parameter in network.parameters()]
        self.copy_to(network)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(network.parameters(), live, strict=True):
                    parameter.copy_(value)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Overwrite the network's parameters by the average."""
        for name, parameter in network.named_parameters():
            parameter.copy_(self.average[name])


def scheduled_rate(config: OptimisationConfig, update: int, total: int) -> float:
    """Learning rate of update number `update` of `total`: linear warm-up, then a cosine to 0 or no change."""
    if config.decay or update < config.warmup:
        return config.learning_rate * warmup_cosine(update, total=total, warmup=config.warmup)
    return config.learning_rate

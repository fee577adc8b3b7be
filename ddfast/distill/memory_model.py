"""What a training keeps in memory, in bytes, and what follows from it: rules that training and `ddfast plan` share.

Parameters, gradients, the optimizers' moments and the moving average are float32, each of a parameter's size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from ddfast.models.blocks import blocks_of
from ddfast.models.layers import num_parameters

FLOAT32 = 4

USABLE = 0.9
"""Of a GPU's memory, what tensors may take: the rest is for CUDA, its libraries and fragmentation."""

_MOST_STATE = 0.5
"""Of the usable memory, what networks may take on every process before they are sharded: activations have the rest."""

_BLOCKS_IN_FLIGHT = 2
"""Blocks that are gathered at a time: the one that computes, and the next."""

_GRADIENTS_IN_FLIGHT = 3
"""Blocks whose whole gradients lie there at a time: one that is computed, and copies of two on their way."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Numbers of parameters of a network.

    Attributes:
        parameters: all of them.
        matrices: weights of linear layers, which Muon updates.
        block: of the largest block (`ddfast.models.blocks`).
        outside: of all blocks.
    """

    parameters: int
    matrices: int
    block: int
    outside: int

    @classmethod
    def of(cls, network: nn.Module) -> Size:
        """Of any network; its tensors need no memory."""
        blocks = [num_parameters(block) for block in blocks_of(network)]
        linear = {layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)}
        parameters = num_parameters(network)
        return cls(
            parameters=parameters,
            matrices=sum(weight.numel() for weight in linear),
            block=max(blocks, default=0),
            outside=parameters - sum(blocks),
        )


@dataclass(frozen=True, kw_only=True)
class State:
    """Bytes of a network that is trained: what lasts from step to step."""

    parameters: int
    gradients: int
    moments: int
    average: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.moments + self.average

    @property
    def saved(self) -> int:
        """What a checkpoint holds: all but the gradients."""
        return self.total - self.gradients


def state_bytes(size: Size, optimizer: str, *, averaged: bool) -> State:
    """State of a network whose parameters are all trained.

    Args:
        size: of the network.
        optimizer: adamw (two moments of every parameter), or muon (one of the linear layers' weights).
        averaged: there is a moving average of it.
    """
    whole = FLOAT32 * size.parameters
    moments = 2 * whole - (FLOAT32 * size.matrices if optimizer == "muon" else 0)
    return State(parameters=whole, gradients=whole, moments=moments, average=whole if averaged else 0)


def choose_strategy(held_bytes: int, memory_bytes: int, processes: int) -> str:
    """The rule of `--parallel.strategy auto`: replicate where what every process then holds leaves room enough.

    Args:
        held_bytes: of all networks of a stage, the teacher's parameters included, unsharded.
        memory_bytes: that tensors may take on one device.
        processes: of one node, which would hold a part each.
    """
    return "shard" if processes > 1 and held_bytes > _MOST_STATE * memory_bytes else "replicate"


def shards_teacher(held_bytes: int, teacher_bytes: int, memory_bytes: int) -> bool:
    """Whether a teacher is sharded too, beside `held_bytes` of sharded networks on every process."""
    return held_bytes + teacher_bytes > _MOST_STATE * memory_bytes


def part_of(number: int, processes: int) -> int:
    """The largest part of bytes, parameters or samples that are split over processes."""
    return math.ceil(number / processes)


def gathered_bytes(trained: Size, *read: Size) -> int:
    """What a process holds, at most, of what is sharded while it computes: blocks as they are needed, and their rest.

    Args:
        trained: the network that a step updates.
        read: other networks that the step passes through, sharded too.
    """
    rest = 2 * trained.outside + sum(size.outside for size in read)
    largest = max(size.block for size in (trained, *read))
    return FLOAT32 * (rest + _BLOCKS_IN_FLIGHT * largest + _GRADIENTS_IN_FLIGHT * trained.block)


def optimizer_bytes(parameters: int) -> int:
    """What an optimizer's step on a GPU holds for a moment: it updates all parameters of a process at once."""
    return FLOAT32 * parameters

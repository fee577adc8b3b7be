"""The transformer blocks of a network: the units in which it is sharded, and computed again in a backward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a student, flow network or teacher: members of the largest list of alike modules."""
    lists = [list(module) for module in network.modules() if isinstance(module, nn.ModuleList)]
    alike = [blocks for blocks in lists if len({type(block) for block in blocks}) == 1]
    return max(alike, key=lambda blocks: sum(p.numel() for block in blocks for p in block.parameters()), default=[])


@contextlib.contextmanager
def recomputing(network: nn.Module, on: bool = True) -> Iterator[None]:
    """Within, a forward pass keeps only what goes into a block; its inside is computed again in the backward pass."""
    blocks = blocks_of(network) if on else []
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = functools.partial(_recomputed, block.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own


def _recomputed(forward: Any, *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)

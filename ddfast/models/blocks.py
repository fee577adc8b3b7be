"""The transformer blocks of a network: the units in which it is sharded, and computed again in a backward pass.

A network of a class that has `transformer_blocks` says itself which they are, in the order of the forward pass. All of
a block's weights are read by its `forward` alone while it is trained.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddfast.models.layers import num_parameters


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a student, flow network or teacher, in the order of the forward pass.

    Those that its `transformer_blocks` names. Without it, the members of the `nn.ModuleList` that has the most
    parameters, of those lists whose members are of one class that can be called; none where there is no such list.
    """
    own = getattr(network, "transformer_blocks", None)
    if own is not None:
        return list(own)
    lists = [list(module) for module in network.modules() if isinstance(module, nn.ModuleList)]
    alike = [blocks for blocks in lists if len({type(block) for block in blocks}) == 1 and _is_callable(blocks[0])]
    return max(alike, key=lambda blocks: sum(map(num_parameters, blocks)), default=[])


def _is_callable(block: nn.Module) -> bool:
    return not isinstance(block, (nn.ModuleList, nn.ModuleDict))


@contextlib.contextmanager
def recomputing(network: nn.Module, on: bool = True) -> Iterator[None]:
    """Within, a forward pass keeps only what goes into a block; its inside is computed again in the backward pass.

    Loss and gradients are the same numbers, bit for bit where operations are deterministic; a step takes one more
    forward pass of the blocks. Passes without gradient are as they were. Only the forward pass has to lie within, the
    backward pass may come later. Parameters and their names, hooks (those of `fully_shard` among them, set before or
    within) and copies are not affected.

    Args:
        network: whose blocks (`blocks_of`).
        on: False: nothing changes.
    """
    blocks = blocks_of(network) if on else []
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:  # of the instance: inside of hooks, and no part of any state
        block.forward = functools.partial(_recomputed, block, block.forward)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own


def _recomputed(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    frozen = [parameter for parameter in block.parameters() if not parameter.requires_grad]
    return checkpoint(
        forward,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _without_gradient(frozen)),
        **options,
    )


@contextlib.contextmanager
def _without_gradient(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within, these take no gradient: a network frozen for its forward pass alone is frozen when that is repeated."""
    changed = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)

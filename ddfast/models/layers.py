"""What networks are made of: float32 whatever PyTorch's default dtype is, and the same in any memory layout.

`torch.nn`'s own layers take the default dtype of the moment at which they are made, and compute in the layout in which
their inputs and weights happen to lie.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.ops.add_norm import add_norm_unchecked
from ddfast.ops.norm_linear import activated, norm_linear, worth_a_kernel
from ddfast.private_api import is_fake, is_hooked

Linear = functools.partial(nn.Linear, dtype=torch.float32)
Embedding = functools.partial(nn.Embedding, dtype=torch.float32)
LayerNorm = functools.partial(nn.LayerNorm, dtype=torch.float32)
GroupNorm = functools.partial(nn.GroupNorm, dtype=torch.float32)


def num_parameters(network: nn.Module) -> int:
    """How many numbers a network's parameters are."""
    return sum(parameter.numel() for parameter in network.parameters())


class Conv2d(nn.Conv2d):
    """A convolution in contiguous memory, whatever its input and its weights lie in.

    Everything behind it is then contiguous too. It matters most to norms: the CPU's GroupNorm of channels-last memory
    sums squares before it subtracts the mean, and a decoder of VAR is six times further from the exact image.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, **settings: Any) -> None:
        super().__init__(inputs, outputs, kernel, dtype=torch.float32, **settings)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = contiguous(x), contiguous(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def norm_layer(
    x: Tensor,
    branch: Tensor | None,
    layer: nn.Linear,
    *,
    layer_bias: Tensor | None = None,
    activation: str = "none",
    **norm: Any,
) -> tuple[Tensor, Tensor]:
    """x + gate * branch [R, S, W], and what a layer and an activation make of its norm; `norm` is as in `add_norm`.

    By one kernel where rows are so few that the weights are all there is to read, and there is one; else step by step.
    `layer_bias` is for a layer that has none.
    """
    if worth_a_kernel(x) and is_plain(layer):
        bias = layer.bias if layer_bias is None else layer_bias
        return norm_linear(x, branch, layer.weight, bias, activation=activation, **norm)
    total, normed = add_norm_unchecked(x, branch, **norm)
    if layer_bias is None:
        y = layer(normed)
    elif is_plain(layer):
        y = F.linear(normed, layer.weight, layer_bias)
    else:
        y = layer(normed) + layer_bias
    return total, activated(y, activation)


def plain_layer(x: Tensor, layer: nn.Linear) -> Tensor:
    """A layer of x [R, S, W] as it is; see `norm_layer`."""
    if worth_a_kernel(x) and is_plain(layer):
        return norm_linear(x, None, layer.weight, layer.bias, eps=None)[1]
    return layer(x)


def is_plain(layer: nn.Module) -> bool:
    """Whether its weight says all that a layer does: no hook, adapter or offloading, and no weight in another form."""
    if type(layer) is not nn.Linear or is_hooked(layer):
        return False
    return type(layer.weight) in (Tensor, nn.Parameter) or is_fake(layer.weight)


def contiguous(x: Tensor) -> Tensor:
    """x with the strides of a new tensor: `Tensor.contiguous` keeps any that dimensions of size 1 have."""
    return x.contiguous().view(-1).view(x.shape)


def weights_dtype(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Within, everything is computed in the dtype of the weights, whatever autocast is around it.

    Autocast is for training: where a gradient is wanted through `x`, it is followed.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def twice_embedded(table: Tensor, codes: Tensor) -> Tensor:
    """table[codes] twice, one below the other, in one pass: [2 B, m, W] of codes int64 [B, m]."""
    return table[codes.expand(2, -1, -1)].flatten(0, 1)


def stack_rows(module: nn.Module, whole: str, parts: tuple[str, ...]) -> None:
    """Let one matrix of a module stand for several of as many rows, which every state has: one product, old names."""
    module.stacked = {whole: parts}  # type: ignore[assignment]
    module.register_state_dict_post_hook(_apart)
    module.register_load_state_dict_pre_hook(_together)


def stacked_rows(network: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Of every matrix that stands for several: its name, and those that states have."""
    for place, module in network.named_modules():
        prefix = place and f"{place}."
        for whole, parts in getattr(module, "stacked", {}).items():
            yield prefix + whole, [prefix + part for part in parts]


def _apart(module: Any, state: dict[str, Any], prefix: str, _: object) -> None:
    own = {name: state.pop(name) for name in list(state) if name.startswith(prefix)}
    for name, value in own.items():  # in their order
        parts = module.stacked.get(name.removeprefix(prefix))
        state |= {name: value} if parts is None else _named(prefix, parts, value)


def _named(prefix: str, parts: tuple[str, ...], value: Tensor) -> dict[str, Tensor]:
    return {prefix + part: rows for part, rows in zip(parts, value.chunk(len(parts)), strict=True)}


def _together(module: Any, state: dict[str, Any], prefix: str, *_: object) -> None:
    for whole, parts in module.stacked.items():
        names = [prefix + part for part in parts]
        if all(name in state for name in names):
            state[prefix + whole] = torch.cat([state.pop(name) for name in names])

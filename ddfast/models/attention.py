"""How positions look at each other: masks over groups, attention without masks, and the KV cache.

Dimensions: R rows, H heads, S sequence, K head dimension.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


def group_starts(groups: tuple[int, ...]) -> list[int]:
    """First position of every group, and the number of positions at the end: group k is `starts[k]:starts[k + 1]`."""
    return [0, *accumulate(groups)]


def group_levels(groups: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Group of every position, int64 [S]."""
    sizes = torch.tensor(groups, device=device)
    return torch.arange(len(groups), device=device).repeat_interleave(sizes, output_size=sum(groups))


def block_mask(groups: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor | None:
    """Boolean [S, S] mask of a sequence of groups, True = may look: at all earlier groups and at one's own.

    None where every group has one token: plain causal attention, for which there is a faster path.
    """
    if all(size == 1 for size in groups):
        return None
    level = group_levels(groups, device)
    return level[:, None] >= level[None, :]


def level_mask(groups: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor | None:
    """Boolean [S, S] mask of a student: strictly earlier groups and oneself; None where that is plain causal."""
    mask = block_mask(groups, device)
    if mask is None:
        return None
    return (mask & ~mask.T) | torch.eye(len(mask), dtype=torch.bool, device=device)


class Attend(Protocol):
    """Mixes values for one layer: (layer, query, key, value, scale) -> [R, H, S, K], all [R, H, S, K].

    `key` and `value` may have fewer heads than `query` (grouped-query attention). `scale` None is 1/sqrt(K).
    """

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        """Attention output of layer `layer`."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`scaled_dot_product_attention` that takes fewer key heads than query heads."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


class MaskedAttention:
    """Attention of a whole sequence under a mask broadcastable to [R, H, S, S]; None is plain causal."""

    def __init__(self, mask: Tensor | None) -> None:
        self.mask = mask

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        return attention(query, key, value, mask=self.mask, causal=self.mask is None, scale=scale)


class BlockCausalAttention:
    """Attention of a whole sequence of groups: every group sees all earlier ones and itself.

    One unmasked call per group needs no mask and computes only what is kept: for VAR's ten scales 62 % of S^2.
    """

    def __init__(self, groups: tuple[int, ...]) -> None:
        self.groups = groups

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        parts, end = [], 0
        for size in self.groups:
            start, end = end, end + size
            parts.append(attention(query[:, :, start:end], key[:, :, :end], value[:, :, :end], scale=scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class KVCache:
    """Keys and values of every layer, allocated once for the whole sequence."""

    def __init__(self, depth: int, rows: int, heads: int, length: int, head_dim: int, like: Tensor) -> None:
        shape = (depth, rows, heads, length, head_dim)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new [R, H, S, K] and return all of its keys and values so far."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class CachedAttention:
    """Attention of new positions over a cache that they join.

    Args:
        cache: takes the new keys and values.
        mask: broadcastable to [R, H, S, all]; None: everything is seen.
        causal: the new positions are the whole sequence, and each sees those before it.
    """

    def __init__(self, cache: KVCache, mask: Tensor | None = None, *, causal: bool = False) -> None:
        self.cache, self.mask, self.causal = cache, mask, causal

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        keys, values = self.cache.append(layer, key, value)
        return attention(query, keys, values, mask=self.mask, causal=self.causal, scale=scale)

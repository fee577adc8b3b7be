"""How positions look at each other: masks over groups, attention without masks, and the KV cache.

Dimensions: R rows, H query heads, G key heads, S sequence, L positions of a cache, K head dimension.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast.ops import dispatch
from ddfast.ops.decode_attention import decode_attention_unchecked, rotated


def group_starts(groups: tuple[int, ...]) -> list[int]:
    """First position of every group, and the number of positions at the end: group k is `starts[k]:starts[k + 1]`."""
    return [0, *accumulate(groups)]


def group_levels(groups: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Group of every position, int64 [S]."""
    if len(groups) == sum(groups):
        return torch.arange(len(groups), dtype=torch.int64, device=device)
    # Filled where it is: a copy from the host would wait, and cannot be captured in a graph.
    levels = torch.empty(sum(groups), dtype=torch.int64, device=device)
    for level, part in enumerate(levels.split(groups)):
        part.fill_(level)
    return levels


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


def window_positions(first: Tensor, size: int, *, twice: bool = False) -> Tensor:
    """Positions int64 [B, S] of windows that begin at `first` [B]; `twice`: [2 B, S], for both streams of guidance."""
    position = first[:, None] + torch.arange(size, dtype=torch.int64, device=first.device)
    return torch.cat((position, position)) if twice else position


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
    """Keys and values [R, G, L, K] of every layer, allocated once for the whole sequence.

    `length` is the number of positions held, as the host counts them; `position` int64 [1] is the same number where
    the cache is, so that a step which reads only that can be replayed without the host.
    """

    def __init__(self, depth: int, rows: int, heads: int, length: int, head_dim: int, like: Tensor) -> None:
        shape = (depth, rows, heads, length, head_dim)
        self.keys, self.values = like.new_empty(shape).unbind(), like.new_empty(shape).unbind()
        self.length, self.cleared = 0, False
        self.position = torch.zeros(1, dtype=torch.int64, device=like.device)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store one layer's new [R, G, S, K]."""
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values

    def extend(self, count: int) -> None:
        """Count positions that every layer has stored."""
        self.length += count
        self.position += count

    def place(self, layer: int, keys: Tensor, values: Tensor, position: Tensor) -> None:
        """Store one layer's new [R, G, S, K] at positions int64 [R, S], which are each row's own."""
        where = position[:, None, :, None].expand_as(keys)
        self.keys[layer].scatter_(2, where, keys)
        self.values[layer].scatter_(2, where, values)

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with some of the rows, int64 [m], layer by layer."""
        self.keys = tuple(keys[rows] for keys in self.keys)
        self.values = tuple(values[rows] for values in self.values)

    def clear(self) -> None:
        """Put zeros where nothing was written yet, once: it may be NaN, which a mask lets through."""
        if not self.cleared:
            for tensor in (*self.keys, *self.values):
                tensor[:, :, self.length :] = 0
        self.cleared = True


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
        self.cache.append(layer, key, value)
        return self.over(layer, query, scale)

    def over(self, layer: int, query: Tensor, scale: float | None = None) -> Tensor:
        """Attention of queries [R, H, S, K] whose keys and values the cache has been given already."""
        end = self.cache.length + query.shape[2]
        keys, values = self.cache.keys[layer][:, :, :end], self.cache.values[layer][:, :, :end]
        return attention(query, keys, values, mask=self.mask, causal=self.causal, scale=scale)


class WindowAttention:
    """Attention of new positions over a cache that they join, every row's at a place of its own.

    A position sees what its row holds up to itself. What was stored behind, for a window of before, is written over
    before anything sees it.

    Args:
        cache: takes the new keys and values.
        position: int64 [R, S], where they are.
        first: int64 [R], the first position that a row may look at; None: 0.
    """

    def __init__(self, cache: KVCache, position: Tensor, first: Tensor | None = None) -> None:
        cache.clear()
        self.cache, self.position = cache, position
        column = torch.arange(cache.keys[0].shape[2], dtype=torch.int64, device=position.device)
        mask = column <= position[..., None]
        if first is not None:
            mask = mask & (column >= first[:, None, None])
        self.mask = mask[:, None]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        self.cache.place(layer, key, value, self.position)
        return attention(query, self.cache.keys[layer], self.cache.values[layer], mask=self.mask, scale=scale)


class Mix(Protocol):
    """What stands between a layer's two projections: (layer, qkv [R, S, (H + 2 G) K]) -> [R, S, H K].

    qkv holds query heads, key heads, value heads, in this order.
    """

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """Attention output of layer `layer`."""


class SequenceMix:
    """Heads apart, rotated where there are angles, and through `attend`.

    Args:
        attend: of the whole sequence, or of new positions over a cache.
        head_dim: K.
        kv_heads: G; None: as many as query heads.
        rope: float32 [S, K / 2, 2], the angles of these positions, or [R, S, K / 2, 2], each row's own.
    """

    def __init__(
        self, attend: Attend, head_dim: int, *, kv_heads: int | None = None, rope: Tensor | None = None
    ) -> None:
        self.attend, self.head_dim, self.kv_heads = attend, head_dim, kv_heads
        self.rope = None if rope is None else rope.unsqueeze(-3)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        kv_heads = self.kv_heads or heads.shape[2] // 3
        turning, value = heads.split((heads.shape[2] - kv_heads, kv_heads), dim=2)
        if self.rope is not None:
            turning = rotated(turning.float(), self.rope).type_as(turning)
        query, key = turning.split((turning.shape[2] - kv_heads, kv_heads), dim=2)
        mixed = self.attend(layer, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return mixed.transpose(1, 2).flatten(2)


class StepMix:
    """One new position per row over a cache that it joins, in one call: `ddfast.ops.decode_attention`.

    Where that has no kernel, PyTorch's attention does it, over what the host knows the cache to hold: less work than
    the op's reference, which reads all of the cache.

    Args:
        cache: takes the new key and value, at `cache.position`.
        rope: float32 [>= L, K / 2, 2], the angles of every position.
        first: int64 [R], the first position that a row may look at.
    """

    def __init__(self, cache: KVCache, *, rope: Tensor | None = None, first: Tensor | None = None) -> None:
        self.cache, self.first = cache, first
        keys = cache.keys[0]
        rows, kv_heads, length, head_dim = keys.shape
        self.rope = None if rope is None else rope[:length].contiguous()
        self.scale = head_dim**-0.5
        self.plain: SequenceMix | None = None
        sizes: dict[str, Any] = {"rows": rows, "dim": head_dim, "size": length}
        if dispatch.choose("decode_attention", keys.device, keys.dtype, **sizes).backend == "reference":
            if keys.is_cuda and torch.cuda.is_current_stream_capturing():
                # What a graph repeats would go on at the position that the host knows now.
                raise RuntimeError("decode_attention: got its reference inside a CUDA graph, expected a kernel")
            here = slice(cache.length, cache.length + 1)
            mask = None
            if first is not None:
                column = torch.arange(cache.length + 1, dtype=torch.int64, device=keys.device)
                mask = (column >= first.clamp_max(cache.length)[:, None])[:, None, None]
            angles = None if rope is None else rope[here]
            self.plain = SequenceMix(CachedAttention(cache, mask), head_dim, kv_heads=kv_heads, rope=angles)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        if self.plain is not None:
            return self.plain(layer, qkv)
        cache = self.cache
        keys, values = cache.keys[layer], cache.values[layer]
        step = (cache.position, self.rope, self.first, self.scale, "auto")
        return decode_attention_unchecked(qkv[:, 0], keys, values, *step)[:, None]

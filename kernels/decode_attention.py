"""decode_attention in Triton: rotate, append to the cache and attend, for one new position per row.

    query, key <- rotated by rope[position];  cache[position] <- key, value
    out = softmax(scale q k^T) v  over the positions first .. position

A program has one key head of one row with all query heads that share it, so that the cache is read once. Positions come
in tiles, copied ahead into shared memory. Each place of a tile keeps a softmax of its own (maximum, sum and weighted
values, in registers), and only after the last tile do the places meet: no warp waits for another's sums before. The new
position never comes back from memory: one program stores its key and value, and adds them from where it computed them.

Where rows and heads leave multiprocessors idle the cache is split: tile i is of split i modulo their number, since only
the device knows the position, and a second launch merges what the splits found, float32 [R, H, splits, K + 2]. How many
positions a tile has, and how many splits there are, follows from rows, heads and the number of multiprocessors: other
numbers of them round other sums, as they do in the matrix products of a network around it.
Bytes: 2 K elements per key head and position seen, which bind; FLOP: 4 K per query head and position, on CUDA cores.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from ddfast_kernels.launch import FUSED, current_device, dependent_launch, multiprocessors, wait_for_previous
from torch import Tensor

_WORTH_A_LAUNCH = 192 * 1024
"""Bytes that one multiprocessor reads in about twice the time of a second launch: on average half a cache is seen.

An estimate: 70 GB/s and 1.4 us.
"""


class Cut(NamedTuple):
    """Positions of a tile, splits of the cache, warps of a program."""

    tile: int
    splits: int
    num_warps: int


def cut(pieces: int, group: int, length: int, dim: int, element_size: int, processors: int) -> Cut:
    """For `pieces` key heads of all rows, from sizes alone: a captured graph keeps it for every position.

    A program with a multiprocessor for itself is large; of small ones several fit, and hide each other's beginnings.
    """
    num_warps = 16 if pieces <= processors else 8 if pieces <= 2 * processors else 4
    # Per thread 32 bytes of keys and of values, or 16 where several query heads multiply the sums to be kept.
    tile = max(1, num_warps * (1024 if group == 1 else 512) // (triton.next_power_of_2(dim) * element_size))
    splits = max(1, min(processors // pieces, triton.cdiv(length, tile)))
    whole = 2 * length * dim * element_size
    return Cut(tile, splits if whole - whole // splits >= _WORTH_A_LAUNCH else 1, num_warps)


@triton.jit
def _rotated(x_ptr, angle_ptr, k, mask, ROPE: tl.constexpr):
    """Elements k of a head, where x_ptr points, in float32: pairs (2k, 2k + 1) turned by the angles of one position."""
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    if ROPE:
        partner = tl.load(x_ptr + 1 - 2 * (k & 1), mask=mask, other=0.0).to(tl.float32)
        cosine = tl.load(angle_ptr + (k & -2), mask=mask, other=0.0)
        sine = tl.load(angle_ptr + (k | 1), mask=mask, other=0.0)
        x = x * cosine + tl.where((k & 1) == 0, -partner, partner) * sine
    return x


@triton.jit(do_not_specialize=["length"])
def decode_attention_kernel(
    qkv_ptr, keys_ptr, values_ptr, position_ptr, rope_ptr, first_ptr, out_ptr, partial_ptr, qkv_stride, length, scale,
    ROPE: tl.constexpr, FIRST: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    dim: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    kv_head, kv_heads = tl.program_id(1), tl.num_programs(1)
    split = tl.program_id(2)
    h = tl.arange(0, HEADS)[:, None]
    k = tl.arange(0, DIM)[None, :]
    ours = (h < GROUP) & (k < dim)

    position = tl.load(position_ptr)
    begin = tl.zeros_like(position)
    if FIRST:
        begin = tl.load(first_ptr + row)
    there = (position >= 0) & (position < length)
    position = tl.where(there, position, 0)
    scale = tl.where(there, scale, float("nan"))
    begin = tl.maximum(tl.minimum(begin, position), 0)

    # The cache is asked for as soon as the position is known: what else is loaded before is used after.
    angle_ptr = rope_ptr + position * dim
    qkv_ptr += row * qkv_stride + k
    key_at = (kv_heads * GROUP + kv_head) * dim
    query = _rotated(qkv_ptr + (kv_head * GROUP + h) * dim, angle_ptr, k, ours, ROPE) * scale
    new_key = _rotated(qkv_ptr + key_at, angle_ptr, k, k < dim, ROPE).to(keys_ptr.dtype.element_ty)
    new_value = tl.load(qkv_ptr + key_at + kv_heads * dim, mask=k < dim, other=0.0)

    # Tensors of a tile are [TILE, HEADS, DIM], or 1 in place of some.
    t = tl.arange(0, TILE)[:, None, None]
    cache = (row * kv_heads + kv_head) * length
    most = tl.full([TILE, HEADS, 1], -3.0e38, tl.float32)  # below every score, and its difference from -inf is no NaN
    total = tl.zeros([TILE, HEADS, 1], tl.float32)
    mixed = tl.zeros([TILE, HEADS, DIM], tl.float32)
    for start in tl.range(begin + split * TILE, position, SPLITS * TILE, num_stages=4):
        seen = start + t < position
        mask = seen & (k < dim)[None, :, :]
        place = (cache + start) * dim + t * dim + k[None, :, :]
        key = tl.load(keys_ptr + place, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + place, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(query[None, :, :] * key, axis=2, keep_dims=True), float("-inf"))
        higher = tl.maximum(most, score)
        fade, weight = tl.exp2(most - higher), tl.exp2(score - higher)
        total = total * fade + weight
        mixed = mixed * fade + weight * value
        most = higher

    new_score = tl.sum(query * new_key.to(tl.float32), axis=1, keep_dims=True)
    new_score = tl.where(split == 0, new_score, float("-inf"))
    peak = tl.maximum(tl.max(most, axis=0), new_score)
    new_weight = tl.exp2(new_score - peak)
    fade = tl.exp2(most - peak[None, :, :])
    total = tl.sum(total * fade, axis=0) + new_weight
    mixed = tl.sum(mixed * fade, axis=0) + new_weight * new_value.to(tl.float32)
    stored = k < tl.where(there & (split == 0), dim, 0)
    tl.store(keys_ptr + (cache + position) * dim + k, new_key, mask=stored)
    tl.store(values_ptr + (cache + position) * dim + k, new_value, mask=stored)
    head = (row * kv_heads + kv_head) * GROUP + h
    if SPLITS == 1:
        tl.store(out_ptr + head * dim + k, mixed / total, mask=ours)
    else:
        partial_ptr += (head * SPLITS + split) * (dim + 2)
        tl.store(partial_ptr + k, mixed, mask=ours)
        tl.store(partial_ptr + dim, peak, mask=h < GROUP)
        tl.store(partial_ptr + dim + 1, total, mask=h < GROUP)


@triton.jit
def merge_kernel(
    partial_ptr, out_ptr,
    dim: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    head = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, DIM)
    split = tl.arange(0, PARTS)
    present = split < SPLITS
    partial_ptr += (head * SPLITS + split) * (dim + 2)
    most = tl.load(partial_ptr + dim, mask=present, other=float("-inf"))
    total = tl.load(partial_ptr + dim + 1, mask=present, other=0.0)
    both = present[:, None] & (k < dim)[None, :]
    mixed = tl.load(partial_ptr[:, None] + k[None, :], mask=both, other=0.0)
    weight = tl.exp2(most - tl.max(most, axis=0))
    mixed = tl.sum(mixed * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    tl.store(out_ptr + head * dim + k, mixed, mask=k < dim)


def decode_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, rope: Tensor | None, first: Tensor | None,
    scale: float, out: Tensor,
) -> None:  # fmt: skip
    """What the op says, into out [R, H K]; keys and values [R, G, L, K] are written at `position`.

    qkv [R, (H + 2 G) K] with unit stride along its last dimension, rope float32 [L, K / 2, 2] and first int64 [R] both
    contiguous. A position outside the cache comes out as NaN, and nothing is written.
    """
    rows, kv_heads, length, dim = keys.shape
    heads = out.shape[1] // dim
    group = heads // kv_heads
    tile, splits, num_warps = cut(rows * kv_heads, group, length, dim, keys.element_size(), multiprocessors(keys))
    partial = out if splits == 1 else out.new_empty(rows * heads, splits, dim + 2, dtype=torch.float32)
    padded, launch = triton.next_power_of_2(dim), {**dependent_launch(qkv), **FUSED}
    with current_device(qkv):
        decode_attention_kernel[(rows, kv_heads, splits)](
            qkv, keys, values, position, position if rope is None else rope, position if first is None else first,
            out, partial, qkv.stride(0), length, scale / math.log(2),
            ROPE=rope is not None, FIRST=first is not None, GROUP=group, HEADS=triton.next_power_of_2(group),
            dim=dim, DIM=padded, TILE=tile, SPLITS=splits, num_warps=num_warps, **launch,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(rows * heads,)](
                partial, out, dim=dim, DIM=padded, SPLITS=splits, PARTS=triton.next_power_of_2(splits), **launch
            )

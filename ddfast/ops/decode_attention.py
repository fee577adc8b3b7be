"""decode_attention: what one new position per row asks of a KV cache, in one call.

Dimensions: R rows, H query heads, G key heads, L positions of the cache, K head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddfast.ops import common, native


def decode_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    *,
    rope: Tensor | None = None,
    first: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Rotate the query and the key, put key and value into the cache, and attend to all that it holds.

    `softmax(scale q k^T) v` over the positions first .. position, the new one included. The position is read on the
    device: the same call is right at every step, so a CUDA graph of one step can be replayed for the next.

    Args:
        qkv: [R, (H + 2 G) K], the projections of the new position: query heads, key heads, value heads. H is a
            multiple of G (grouped-query attention).
        keys, values: [R, G, L, K], contiguous, of the dtype of qkv: the cache of one layer. **Written**, at `position`.
        position: int64 [1] in 0 .. L - 1, how many positions the cache holds; another is an error, or on a
            GPU, which is not waited for, gives NaN and writes nothing.
        rope: float32 [L, K / 2, 2], cosine and sine by which pair k, (2k, 2k + 1), of every position turns.
            None: nothing turns.
        first: int64 [R], the first position that a row may look at (padding on the left); the new one is always seen.
        scale: of the scores; None is 1/sqrt(K).
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        [R, H K], of the dtype of qkv.

    Numerics: float32 throughout (float64 for float64), also of the rotated query; keys and values are stored rounded.
    Memory: O(threads L); on a GPU, where the cache is split, a float32 partial result of [R, H, splits, K + 2].
    Autograd: none.
    Raises: `TypeError`/`ValueError`, a dtype, device or shape is not as above.
    """
    _check(qkv, keys, values, position, rope, first)
    if scale is None:
        scale = keys.shape[3] ** -0.5
    common.check_factor("scale", scale)
    return decode_attention_unchecked(qkv.detach(), keys, values, position, rope, first, scale, backend)


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    """Turn pairs (2k, 2k + 1) of x [..., K] by the angles of rope [..., K / 2, 2], both of one dtype."""
    turns = torch.view_as_complex(rope)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


def decode_attention_reference(
    qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, rope: Tensor | None, first: Tensor | None, scale: float
) -> Tensor:
    """The definition, in plain PyTorch, over the whole cache under a mask."""
    rows, kv_heads, length, dim = keys.shape
    heads = qkv.unflatten(-1, (-1, dim)).to(common.compute_dtype(qkv))
    query, key, value = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    if rope is not None:
        angles = rope.index_select(0, position).to(heads.dtype)
        # Complex numbers begin at an even place in memory, which a part of a longer row need not.
        query, key = (part.clone(memory_format=torch.contiguous_format) for part in (query, key))
        query, key = rotated(query, angles), rotated(key, angles)
    keys.index_copy_(2, position, key[:, :, None].to(keys.dtype))
    values.index_copy_(2, position, value[:, :, None].to(values.dtype))
    column = torch.arange(length, dtype=torch.int64, device=qkv.device)
    seen = (column <= position).expand(rows, length)
    if first is not None:
        seen = seen & (column >= torch.minimum(first, position)[:, None])
    scores = torch.einsum("rghk,rglk->rghl", query.unflatten(1, (kv_heads, -1)), keys.to(heads.dtype)) * scale
    weights = scores.masked_fill(~seen[:, None, None], -math.inf).softmax(-1)
    written = values.to(heads.dtype).masked_fill(~seen[:, None, :, None], 0)  # a new cache may hold NaN beyond
    return torch.einsum("rghl,rglk->rghk", weights, written).flatten(1).to(qkv.dtype)


def _check(
    qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, rope: Tensor | None, first: Tensor | None
) -> None:
    common.check_float("qkv", qkv)
    for name, tensor in (("keys", keys), ("values", values), ("position", position), ("rope", rope), ("first", first)):
        if tensor is not None or name in ("keys", "values", "position"):
            common.check_tensor(name, tensor)
    if keys.dim() != 4 or not keys.is_contiguous():
        raise ValueError(f"keys: got shape {tuple(keys.shape)}, expected a contiguous [rows, heads, length, dim]")
    rows, kv_heads, length, dim = keys.shape
    if values.shape != keys.shape or not values.is_contiguous():
        raise ValueError(f"values: got shape {tuple(values.shape)}, expected a contiguous {list(keys.shape)}")
    for name, other in (("keys", keys), ("values", values)):
        if other.dtype != qkv.dtype or other.device != qkv.device:
            raise ValueError(f"{name}: got {other.dtype} on {other.device}, expected {qkv.dtype} on {qkv.device}")
    for name, extra in (("rope", rope), ("first", first)):
        if extra is not None and extra.device != qkv.device:
            raise ValueError(f"{name}: got a tensor on {extra.device}, expected {qkv.device}")
    if kv_heads < 1 or dim < 1:
        raise ValueError(f"keys: got shape {tuple(keys.shape)}, expected at least one head and one dimension")
    heads = qkv.shape[1] // dim - 2 * kv_heads if qkv.dim() == 2 else 0
    if qkv.dim() != 2 or len(qkv) != rows or qkv.shape[1] % dim or heads < 1 or heads % kv_heads:
        multiple = f"a multiple of {kv_heads} query heads"
        expected = f"[{rows}, (H + {2 * kv_heads}) {dim}] with {multiple}"
        raise ValueError(f"qkv: got shape {tuple(qkv.shape)}, expected {expected}")
    common.check_written({"keys": keys, "values": values}, qkv)
    if position.dtype != torch.int64 or position.shape != (1,) or position.device != qkv.device:
        got = f"{position.dtype} {list(position.shape)} on {position.device}"
        raise ValueError(f"position: got {got}, expected int64 [1] on {qkv.device}")
    if rope is not None and (rope.shape != (length, dim // 2, 2) or rope.dtype != torch.float32 or dim % 2):
        expected = f"float32 [{length}, {dim} / 2, 2]"
        raise ValueError(f"rope: got {rope.dtype} {list(rope.shape)}, expected {expected}")
    if first is not None and (first.dtype != torch.int64 or first.shape != (rows,)):
        raise ValueError(f"first: got {first.dtype} {list(first.shape)}, expected int64 [{rows}]")


def _decode_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    rope: Tensor | None,
    first: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    out = _fake(qkv, keys)
    chosen = common.backend_of("decode_attention", backend, qkv, dim=keys.shape[3], size=keys.shape[2])
    if out.numel() == 0:
        return out
    if chosen == "reference":
        return decode_attention_reference(qkv, keys, values, position, rope, first, scale)
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    rope = None if rope is None else rope.contiguous()
    first = None if first is None else first.contiguous()
    if chosen == "triton":
        native.triton("decode_attention").decode_attention(qkv, keys, values, position, rope, first, scale, out)
        return out
    assert native.cpu is not None
    rows, kv_heads, length, dim = keys.shape
    if not 0 <= int(position) < length:
        raise ValueError(f"position: got {int(position)}, expected 0 .. {length - 1}, a place in the cache")
    native.cpu.decode_attention(
        qkv.data_ptr(), native.DTYPE_CODES[qkv.dtype], qkv.stride(0), keys.data_ptr(), values.data_ptr(),
        position.data_ptr(), 0 if rope is None else rope.data_ptr(), 0 if first is None else first.data_ptr(),
        out.data_ptr(), rows, out.shape[1] // dim, kv_heads, length, dim, scale, common.threads(),
    )  # fmt: skip
    return out


def _fake(qkv: Tensor, keys: Tensor, *_: object) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3])


decode_attention_unchecked = common.define(
    "decode_attention(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor position, Tensor? rope, Tensor? first,"
    " float scale, str backend) -> Tensor",
    _decode_attention,
    _fake,
)
"""`decode_attention` where arguments are right by construction: a decoding calls it for every layer and step."""

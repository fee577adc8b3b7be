"""append_normed: between a layer's projections and its attention over a KV cache, where both are normalised.

Dimensions: R rows, S new positions, H heads, L positions of the cache, K head dimension.
"""

from __future__ import annotations

from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast.ops import common, native


def append_normed(
    qkv: Tensor, keys: Tensor, values: Tensor, start: int, *, scale: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Normalise queries and keys, put keys and values into the cache, and return the queries.

    `query / max(|query|, 1e-12) * scale`, and the same of keys without `scale`: VAR's attention.

    Args:
        qkv: [R, S, 3, H, K], the projections of the new positions: query, key, value.
        keys, values: [R, H, L, K], contiguous, of the dtype of qkv: the cache of one layer. **Written**, at
            start .. start + S - 1.
        start: how many positions the cache holds.
        scale: floating point [H], by which a head's queries are multiplied; None: 1.
        backend: "auto", "reference" or "triton".

    Returns:
        [R, H, S, K], contiguous, of the dtype of qkv.

    Numerics: float32 throughout (float64 for float64), rounded once.
    Autograd: none by a backend that is asked for; "auto" leaves whatever may need a gradient to PyTorch's functions.
    Raises: `TypeError`/`ValueError`, an argument is not as above.
    """
    _check(qkv, keys, values, start, scale)
    # As in add_norm: no kernel for the CPU, and under autocast dtypes differ.
    mixed = keys.dtype != qkv.dtype
    if backend == "auto" and (mixed or not qkv.is_cuda or torch.is_grad_enabled()):
        return append_normed_reference(qkv, keys, values, start, scale)
    if mixed:
        raise ValueError(f"keys: got {keys.dtype}, expected {qkv.dtype} as qkv")
    scale = None if scale is None else scale.detach()
    return _op(qkv.detach(), keys, values, start, scale, backend)


def append_normed_reference(qkv: Tensor, keys: Tensor, values: Tensor, start: int, scale: Tensor | None) -> Tensor:
    """The definition, in plain PyTorch."""
    wide = common.compute_dtype(qkv)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    query, key = F.normalize(query.to(wide), dim=-1), F.normalize(key.to(wide), dim=-1)
    new = slice(start, start + qkv.shape[1])
    keys[:, :, new], values[:, :, new] = key.to(keys.dtype), value.to(values.dtype)
    if scale is not None:
        query = query * scale.to(wide)[:, None, None]
    return query.to(qkv.dtype).contiguous()


def _check(qkv: Tensor, keys: Tensor, values: Tensor, start: int, scale: Tensor | None) -> None:
    common.check_float("qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv: got shape {tuple(qkv.shape)}, expected [rows, positions, 3, heads, dim]")
    rows, length, _, heads, dim = qkv.shape
    common.check_number("start", start, Integral)
    for name, cache in (("keys", keys), ("values", values)):
        common.check_float(name, cache, qkv)
        if cache.dim() != 4 or not cache.is_contiguous() or cache.shape != (rows, heads, keys.shape[2], dim):
            expected = f"a contiguous [{rows}, {heads}, length, {dim}], of keys and values alike"
            raise ValueError(f"{name}: got shape {tuple(cache.shape)}, expected {expected}")
        if cache.dtype != keys.dtype:
            raise ValueError(f"{name}: got {cache.dtype}, expected {keys.dtype} as keys")
    common.check_written({"keys": keys, "values": values}, qkv)
    if not 0 <= start <= keys.shape[2] - length:
        room = f"{length} positions have a place in a cache of {keys.shape[2]}"
        raise ValueError(f"start: got {start}, expected a position from 0 at which {room}")
    if scale is not None:
        common.check_float("scale", scale, qkv)
        common.check_shape("scale", scale, (heads,))


def _append_normed(
    qkv: Tensor, keys: Tensor, values: Tensor, start: int, scale: Tensor | None, backend: str
) -> Tensor:  # fmt: skip
    chosen = common.backend_of("append_normed", backend, qkv, dim=qkv.shape[-1])
    if chosen == "reference" or qkv.numel() == 0:
        return append_normed_reference(qkv, keys, values, start, scale)
    out = _fake(qkv)
    scale = None if scale is None else scale.contiguous()
    native.triton("append_normed").append_normed(qkv.contiguous(), keys, values, start, scale, out)
    return out


def _fake(qkv: Tensor, *_: object) -> Tensor:
    rows, length, _three, heads, dim = qkv.shape
    return qkv.new_empty(rows, heads, length, dim)


_op = common.define(
    "append_normed(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, SymInt start, Tensor? scale, str backend) -> Tensor",
    _append_normed,
    _fake,
)

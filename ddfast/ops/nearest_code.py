"""nearest_code: vector quantisation's lookup."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ddfast.ops import common, native


def nearest_code(x: Tensor, codebook: Tensor, *, cosine: bool = False, backend: str = "auto") -> Tensor:
    """Index of the code nearest to each vector: argmin_j |x - c_j|^2, or argmax_j of the cosine.

    Args:
        x: vectors [..., d], any floating dtype.
        codebook: codes [V, d].
        cosine: compare directions only (a zero vector has cosine 0 with everything).
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        int64 [...]; ties go to the lowest index.

    Numerics: |c_j|^2 / 2 - x.c_j in float32 (float64 inputs: in float64, on the reference), so two codes whose
        distances differ by less than float32 rounding may be exchanged.
    Memory: O(V d) beside the output; the reference holds [tokens, V].
    Autograd: none, the output is an index.
    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes or devices do not match, `backend` cannot run, or a value is NaN or infinite (a kernel on a
            GPU, which is not waited for, gives such a vector any code, and no vector such a code).

    >>> nearest_code(torch.tensor([[0.9, 0.1]]), torch.eye(2))
    tensor([0])
    """
    common.check_float("x", x)
    if x.dim() < 1:
        raise ValueError("x: got a scalar, expected shape [..., d]")
    common.check_codebook(codebook, x.shape[-1], x)
    common.check_switch("cosine", cosine)
    return _op(x.detach(), codebook.detach(), cosine, backend)


def nearest_code_reference(x: Tensor, codebook: Tensor, cosine: bool = False) -> Tensor:
    """The definition, in plain PyTorch: x [..., d], codebook [V, d] -> int64 [...]."""
    dtype = common.compute_dtype(x, codebook)
    x, codebook = x.to(dtype), codebook.to(dtype)
    if cosine:
        return (F.normalize(x, dim=-1) @ F.normalize(codebook, dim=-1).T).argmax(-1)
    return (codebook.square().sum(-1) / 2 - x @ codebook.T).argmin(-1)


def _nearest_code(x: Tensor, codebook: Tensor, cosine: bool, backend: str) -> Tensor:
    chosen = common.backend_of("nearest_code", backend, x, codebook, **common.sizes_of(codebook))
    out = _fake(x)
    if out.numel() == 0:
        return out
    if common.rows_are_checked(chosen, x):
        common.check_finite("x", x)
        common.check_finite("codebook", codebook)
    if chosen == "reference":
        return nearest_code_reference(x, codebook, cosine)
    if chosen == "cpu":
        assert native.cpu is not None
        rows, codes = common.float_rows(x), common.float_rows(codebook)
        native.cpu.nearest_code(
            rows.data_ptr(), codes.data_ptr(), out.data_ptr(), len(rows), *codes.shape, cosine, common.threads()
        )
        return out
    codes = F.normalize(codebook.float(), dim=-1) if cosine else codebook  # x's length changes no order
    if chosen == "triton":
        native.triton("nearest_code").nearest_code(common.rows_of(x), codes.contiguous(), out)
        return out
    rows, codes = common.float_rows(x), codes.float().contiguous()
    addresses = (rows.data_ptr(), codes.data_ptr(), out.data_ptr())
    assert native.cuda is not None
    native.cuda.nearest_code(*addresses, len(rows), *codes.shape, cosine, 0, *common.launch_place(rows))
    return out


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


_op = common.define("nearest_code(Tensor x, Tensor codebook, bool cosine, str backend) -> Tensor", _nearest_code, _fake)

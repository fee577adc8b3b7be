"""activate: the elementwise part of a feed-forward layer, in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast.ops import common, native

KINDS = ("gelu", "silu")

_WORTH_A_CALL = 4096
"""Elements from which on the CPU's kernel saves more than an op's call costs: 10 us, in which PyTorch does as many."""


def activate(x: Tensor, times: Tensor | None = None, *, kind: str, backend: str = "auto") -> Tensor:
    """gelu(x) (tanh form) or silu(x), times `times` where it is given (SwiGLU).

    Args:
        x: floating point, any shape. Halves of one tensor's last dimension are read where they are.
        times: of the shape and dtype of x, or None.
        kind: "gelu" or "silu".
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        As x.

    Numerics: float32 throughout, rounded once (the reference of a reduced precision rounds before `times`).
    Autograd: none by a backend that is asked for; "auto" leaves what needs a gradient to PyTorch's functions.
    Raises: `TypeError`/`ValueError`, an argument is not as above.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected 'gelu' or 'silu'")
    common.check_float("x", x)
    if times is not None:
        common.check_float("times", times, x)
        common.check_shape("times", times, tuple(x.shape))
        if times.dtype != x.dtype:
            raise TypeError(f"times: got {times.dtype}, expected {x.dtype} as x")
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or (times is not None and times.requires_grad))
    few = x.device.type == "cpu" and x.numel() < _WORTH_A_CALL
    if backend == "auto" and (wants_gradient or few):
        return activate_reference(x, times, kind)
    return _op(x.detach(), None if times is None else times.detach(), kind, backend)


def activate_reference(x: Tensor, times: Tensor | None, kind: str) -> Tensor:
    """The definition, in plain PyTorch."""
    y = F.gelu(x, approximate="tanh") if kind == "gelu" else F.silu(x)
    return y if times is None else y * times


def _activate(x: Tensor, times: Tensor | None, kind: str, backend: str) -> Tensor:
    chosen = common.backend_of("activate", backend, x, size=x.shape[-1] if x.dim() else 1)
    if chosen == "reference" or x.numel() == 0:
        return activate_reference(x, times, kind).contiguous()  # as `_fake` says
    out = _fake(x)
    x, times = _rows(x.resolve_neg(), None if times is None else times.resolve_neg())
    if chosen == "triton":
        native.triton("activate").activate(x, times, out, kind)
        return out
    assert native.cpu is not None
    address, stride = (0, 0) if times is None else (times.data_ptr(), times.stride(0))
    native.cpu.activate(
        x.data_ptr(), x.stride(0), address, stride, out.data_ptr(), native.DTYPE_CODES[x.dtype], *x.shape,
        kind == "gelu", common.threads(),
    )  # fmt: skip
    return out


def _rows(x: Tensor, times: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both as [rows, width]: halves of one product stay where they are; what is contiguous is a single row."""
    given = [x] if times is None else [x, times]
    if all(tensor.is_contiguous() for tensor in given):
        given = [tensor.view(1, -1) for tensor in given]
    else:
        given = [common.rows_of(tensor) for tensor in given]
    return given[0], None if times is None else given[1]


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_op = common.define("activate(Tensor x, Tensor? times, str kind, str backend) -> Tensor", _activate, _fake)

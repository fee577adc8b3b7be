"""add_norm: what stands between two layers of a transformer, in one pass: residual, norm, scale and shift.

Dimensions: R rows, S sequence, W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast.ops import common, native


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    *,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float,
    rms: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x + gate * branch, and its norm * weight + bias.

    The norm is LayerNorm's, or with `rms` RMSNorm's; LlamaGen: `weight`; VAR: `gate`, `weight` (1 + scale) and `bias`
    (shift) from the class, one row each.

    Args:
        x: [R, S, W].
        branch: [R, S, W], what a layer adds; None: nothing.
        gate, weight, bias: [W], or [R, 1, W]; None: 1, 1 and 0. All of the dtype of x, but for "auto" under autocast.
        eps: of the norm.
        rms: no mean is taken off.
        backend: "auto", "reference" or "triton".

    Returns:
        The sum and its norm, [R, S, W] each (the sum is x itself where nothing is added).

    Numerics: the statistics and what is between them in float32; the sum is rounded to the dtype of x and normalised
        as rounded.
    Autograd: through PyTorch's own functions: whatever needs a gradient goes to the reference.
    Raises: `TypeError`/`ValueError`, an argument is not as above.
    """
    mixed = check_add_norm(x, branch, gate, weight, bias, eps, rms)
    # There is no kernel for the CPU, where a call of an op costs as much as what it would save. A compiler calls it all
    # the same: PyTorch's norms make eps a part of the graph.
    given = (x, branch, gate, weight, bias)
    wants_gradient = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given)
    if backend == "auto" and (mixed or wants_gradient or not (x.is_cuda or torch.compiler.is_compiling())):
        return add_norm_reference(x, branch, gate, weight, bias, eps, rms)
    if mixed:
        raise ValueError(f"{mixed[0]}: got {mixed[1]}, expected {x.dtype} as x")
    total, normed = _op(x, branch, gate, weight, bias, eps, rms, backend)
    return (x if branch is None else total), normed


def add_norm_unchecked(
    x: Tensor,
    branch: Tensor | None,
    *,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """`add_norm` by "auto" of what a network knows to fit: on a CPU a step of decoding has dozens, of 10 us each."""
    if x.is_cuda or torch.compiler.is_compiling():
        return add_norm(x, branch, gate=gate, weight=weight, bias=bias, eps=eps, rms=rms)
    return add_norm_reference(x, branch, gate, weight, bias, eps, rms)


def check_add_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[str, torch.dtype] | None:
    """Raise the user's error; returns an argument of another dtype than x: under autocast, which is for training."""
    common.check_float("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [rows, sequence, width]")
    common.check_number("eps", eps)
    common.check_switch("rms", rms)
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, expected a number from 0")
    rows, _, width = x.shape
    mixed = None
    for name, vector in (("branch", branch), ("gate", gate), ("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        common.check_float(name, vector, x)
        if vector.dtype != x.dtype:
            mixed = name, vector.dtype
        if name == "branch":
            common.check_shape(name, vector, tuple(x.shape))
        elif vector.shape != (width,) and vector.shape != (rows, 1, width):
            raise ValueError(f"{name}: got shape {tuple(vector.shape)}, expected [{width}] or [{rows}, 1, {width}]")
    return mixed


def add_norm_reference(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch."""
    if branch is not None:
        x = x + branch if gate is None else torch.addcmul(x, branch, gate)
    shape = x.shape[-1:]
    if rms:
        normed = F.rms_norm(x.float(), shape, eps=eps).type_as(x)
    elif weight is not None and _has_layer_norm(x, weight, bias):
        return x, F.layer_norm(x, shape, weight, bias, eps)
    else:
        normed = F.layer_norm(x, shape, eps=eps)
    if weight is None:
        return x, normed if bias is None else normed + bias
    return x, normed * weight if bias is None else torch.addcmul(bias, normed, weight)


def _has_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether PyTorch's own function takes these: vectors for all rows, and few mixtures of dtypes."""
    if weight.dim() != 1 or (bias is not None and bias.dim() != 1):
        return False
    if weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype):
        return True
    widened = x.element_size() == 2 and weight.dtype == torch.float32 and (bias is None or bias.dtype == weight.dtype)
    return widened or torch.is_autocast_enabled(x.device.type)


def _add_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = common.backend_of("add_norm", backend, x, size=x.shape[-1])
    if chosen == "reference" or x.numel() == 0:
        total, normed = add_norm_reference(x, branch, gate, weight, bias, eps, rms)
        return (x.new_empty(0) if branch is None else total.contiguous()), normed.contiguous()  # as `_fake` says
    total, normed = _fake(x, branch)
    native.triton("add_norm").add_norm(x.contiguous(), branch, gate, weight, bias, eps, rms, total, normed)
    return total, normed


def _fake(x: Tensor, branch: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    return (x.new_empty(0) if branch is None else torch.empty_like(normed)), normed


_op = common.define(
    "add_norm(Tensor x, Tensor? branch, Tensor? gate, Tensor? weight, Tensor? bias, float eps, bool rms, str backend)"
    " -> (Tensor, Tensor)",
    _add_norm,
    _fake,
)

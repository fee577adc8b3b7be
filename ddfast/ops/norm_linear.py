"""norm_linear: a linear layer of few rows with what stands in front of it and behind it, in one pass.

Dimensions: R rows, S sequence, W width, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast.ops import common, native
from ddfast.ops.activate import activate, activate_reference
from ddfast.ops.add_norm import add_norm_reference, add_norm_unchecked, check_add_norm

ACTIVATIONS = ("none", "gelu", "swiglu")

MOST_ROWS = 8
"""Positions of all rows that kernels take: more of them fill a matrix product, which PyTorch has."""


def norm_linear(
    x: Tensor,
    branch: Tensor | None,
    linear: Tensor,
    linear_bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None,
    rms: bool = False,
    activation: str = "none",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x + gate * branch, and activation(norm * linear^T + linear_bias) of its norm: `add_norm`, a layer, `activate`.

    A step of decoding has few rows, and is as fast as weights are read: what is between two layers costs as much as
    launching it, unless the layer does it.

    Args:
        x, branch, gate, weight, bias, eps, rms: as in `add_norm`. eps None: x is multiplied as it is, without a norm or
            anything added.
        linear: [O, W], or [2 O, W] with "swiglu".
        linear_bias: [O] or [2 O]; None: 0. Both of the dtype of x, but for "auto" under autocast.
        activation: "none"; "gelu" (tanh form); "swiglu", silu of the first O times the last O.
        backend: "auto", "reference" or "triton", which takes up to `MOST_ROWS` positions. "auto" leaves more of them,
            and what needs a gradient, to `add_norm`, PyTorch's product and `activate`.

    Returns:
        The sum [R, S, W] (x itself where nothing is added) and what the layer makes of it [R, S, O].

    Numerics: float32 throughout; rounded to the dtype of x where the three functions do. A position's result does not
        depend on how many there are.
    Autograd: none by a backend that is asked for.
    Raises: `TypeError`/`ValueError`, an argument is not as above.
    """
    mixed = _check(x, branch, linear, linear_bias, gate, weight, bias, eps, rms, activation)
    norm = "none" if eps is None else "rms" if rms else "layer"
    given = (x, branch, linear, linear_bias, gate, weight, bias)
    arguments = (*given, 0.0 if eps is None else eps, norm, activation)
    if backend == "auto":
        wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        if mixed or wants_gradient or not worth_a_kernel(x):
            return _apart(*arguments)
    if mixed:
        raise ValueError(f"{mixed[0]}: got {mixed[1]}, expected {x.dtype} as x")
    total, y = _op(*arguments, backend)
    return (x if branch is None else total), y


def worth_a_kernel(x: Tensor) -> bool:
    """Whether "auto" has a kernel for [R, S, W]: on a GPU, for few positions. A compiler is left to fuse by itself."""
    few = x.is_cuda and not torch.compiler.is_compiling() and 0 < x.shape[0] * x.shape[1] <= MOST_ROWS
    return few and common.backend_of("norm_linear", "auto", x, size=x.shape[-1]) != "reference"


def _check(
    x: Tensor,
    branch: Tensor | None,
    linear: Tensor,
    linear_bias: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
    activation: str,
) -> tuple[str, torch.dtype] | None:
    """Raise the user's error; returns an argument of another dtype than x."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    front = {"branch": branch, "gate": gate, "weight": weight, "bias": bias}
    if eps is None:
        for name, tensor in front.items():
            if tensor is not None:
                raise ValueError(f"{name}: got a tensor, expected None where eps is None: there is no norm")
    mixed = check_add_norm(x, branch, gate, weight, bias, 0.0 if eps is None else eps, rms)
    halves = 2 if activation == "swiglu" else 1
    common.check_float("linear", linear, x)
    if linear.dim() != 2 or linear.shape[1] != x.shape[2] or linear.shape[0] % halves:
        outputs = "O" if halves == 1 else "2 O"
        raise ValueError(f"linear: got shape {tuple(linear.shape)}, expected [{outputs}, {x.shape[2]}]")
    if linear_bias is not None:
        common.check_float("linear_bias", linear_bias, x)
        common.check_shape("linear_bias", linear_bias, (linear.shape[0],))
    for name, tensor in (("linear", linear), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            mixed = name, tensor.dtype
    return mixed


def activated(y: Tensor, activation: str, *, by: Callable[..., Tensor] = activate) -> Tensor:
    """y, gelu(y), or with "swiglu" silu of the first half of y times the last; `by` is `activate` or its reference."""
    if activation == "none":
        return y
    first, times = (y, None) if activation == "gelu" else y.chunk(2, dim=-1)
    return by(first, times, kind="gelu" if activation == "gelu" else "silu")


def norm_linear_reference(
    x: Tensor,
    branch: Tensor | None,
    linear: Tensor,
    linear_bias: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch; norm is "none", "layer" or "rms"."""
    total, normed = x, x
    if norm != "none":
        total, normed = add_norm_reference(x, branch, gate, weight, bias, eps, norm == "rms")
    return total, activated(F.linear(normed, linear, linear_bias), activation, by=activate_reference)


def _apart(
    x: Tensor,
    branch: Tensor | None,
    linear: Tensor,
    linear_bias: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """By three functions, each as "auto" has it."""
    total, normed = x, x
    if norm != "none":
        vectors = {"gate": gate, "weight": weight, "bias": bias}
        total, normed = add_norm_unchecked(x, branch, **vectors, eps=eps, rms=norm == "rms")
    for name, tensor in (("linear", linear), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != normed.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{name}: got {tensor.dtype}, expected {normed.dtype} as its input, or autocast")
    return total, activated(F.linear(normed, linear, linear_bias), activation)


def _norm_linear(
    x: Tensor,
    branch: Tensor | None,
    linear: Tensor,
    linear_bias: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = common.backend_of("norm_linear", backend, x, size=x.shape[-1])
    front = (x, branch, linear, linear_bias, gate, weight, bias, eps, norm, activation)
    total, y = _fake(*front, backend)
    if chosen == "reference" or y.numel() == 0 or x.shape[2] == 0:
        total, made = norm_linear_reference(*front)
        return (x.new_empty(0) if branch is None else total.contiguous()), y.copy_(made)  # as `_fake` says
    positions = x.shape[0] * x.shape[1]
    if positions > MOST_ROWS:
        raise ValueError(f"x: got {positions} positions, expected at most {MOST_ROWS} for backend {chosen!r}")
    native.triton("norm_linear").norm_linear(x.contiguous(), *front[1:], total, y)
    return total, y


def _fake(
    x: Tensor,
    branch: Tensor | None,
    linear: Tensor,
    linear_bias: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    total = x.new_empty(0) if branch is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, x.new_empty(*x.shape[:2], linear.shape[0] // (2 if activation == "swiglu" else 1))


_op = common.define(
    "norm_linear(Tensor x, Tensor? branch, Tensor linear, Tensor? linear_bias, Tensor? gate, Tensor? weight,"
    " Tensor? bias, float eps, str norm, str activation, str backend) -> (Tensor, Tensor)",
    _norm_linear,
    _fake,
)

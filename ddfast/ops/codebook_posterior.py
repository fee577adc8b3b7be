"""codebook_posterior: the closed-form flow of a distribution over codes, and the velocity and score built on it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ddfast.ops import common, native
from ddfast.ops.forms import score_from_x0, velocity_from_x0

LEAST_TIME = 1e-12
"""Distances are divided by the square of a time: of smaller ones the quotients leave float32's range."""


def codebook_posterior(
    x: Tensor, t: Tensor | float, log_probs: Tensor, codebook: Tensor, *, backend: str = "auto"
) -> Tensor:
    """E[x_0 | x_t = x]: what the noisy token `x` will be on average, when the clean one is code j with probability p_j.

    w_j ∝ p_j exp(-|x - (1-t) c_j|^2 / (2 t^2)),  x0_hat = sum_j w_j c_j.

    Args:
        x: noisy tokens [..., d], any floating dtype.
        t: flow time from 1e-12 to 1 (1 = noise), a number or a tensor broadcastable to [...].
        log_probs: [..., V]; -inf marks filtered codes; need not be normalised. Leading dimensions that only `x` has
            are broadcast without a copy (several noise draws per token: x [m, B, n, d], log_probs [B, n, V]).
        codebook: codes [V, d].
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        x0_hat [..., d] in the dtype of `x`.

    Numerics: float32 accumulation with the running maximum subtracted; float64 inputs run on the reference.
    Memory: O(tokens d); the reference holds [tokens, V].
    Autograd: in x, fused: dx = ((1-t)/t^2) sum_j w_j c_j ((c_j - x0_hat) . g). Nothing else takes a gradient:
        in training p comes from stop-gradient prefixes.
    Raises:
        TypeError: an argument is no floating-point tensor, or t no number.
        ValueError: shapes, devices or t are out of range; t, log_probs or codebook require a gradient; x or codebook
            has NaN or infinite values, a row of log_probs NaN, +inf or an empty support (a kernel on a GPU, which is
            not waited for, makes its x0_hat NaN; t is looked at where that costs no wait).
    Source: docs/method.md section 2 (The closed-form flow): DD1's equation for the flow between noise
        and a discrete distribution.
    """
    common.check_float("x", x)
    if x.dim() < 1:
        raise ValueError("x: got a scalar, expected shape [..., d]")
    common.check_codebook(codebook, x.shape[-1], x)
    check_log_probs(log_probs, codebook, x)
    time = _times(t, x, log_probs, codebook)
    if torch.is_grad_enabled():
        for name, tensor in (("t", time), ("log_probs", log_probs), ("codebook", codebook)):
            if tensor.requires_grad:
                raise ValueError(f"{name}: requires a gradient, expected a detached tensor (only x is differentiable)")
    return _op(x, time, log_probs, codebook, backend)[0]


def velocity(x: Tensor, t: Tensor | float, log_probs: Tensor, codebook: Tensor, *, backend: str = "auto") -> Tensor:
    """Velocity of the flow, v = dx/dt = (x - x0_hat) / t, in the dtype of x; arguments as `codebook_posterior`."""
    x0_hat = codebook_posterior(x, t, log_probs, codebook, backend=backend)
    return velocity_from_x0(x, _times(t, x, log_probs, codebook), x0_hat).to(x.dtype)


def score(x: Tensor, t: Tensor | float, log_probs: Tensor, codebook: Tensor, *, backend: str = "auto") -> Tensor:
    """Score of the marginal, s = -(x - (1-t) x0_hat) / t^2, in the dtype of x; arguments as `codebook_posterior`."""
    x0_hat = codebook_posterior(x, t, log_probs, codebook, backend=backend)
    return score_from_x0(x, _times(t, x, log_probs, codebook), x0_hat).to(x.dtype)


def _times(t: Tensor | float, x: Tensor, *others: Tensor) -> Tensor:
    """t as a tensor of x's leading shape, in the dtype of the computation."""
    dtype = common.compute_dtype(x, *others)
    if isinstance(t, Tensor):
        common.check_float("t", t)
        time = common.moved("t", t, x.device, dtype)
    else:
        common.check_number("t", t)
        _check_range(t, t)
        time = common.scalar(t, dtype, x.device)
    try:
        return time.expand(x.shape[:-1])
    except RuntimeError:
        expected = f"a shape broadcastable to {list(x.shape[:-1])}"
        raise ValueError(f"t: got shape {tuple(time.shape)}, expected {expected}") from None


def check_log_probs(log_probs: Tensor, codebook: Tensor, x: Tensor) -> None:
    """`log_probs` is [..., V] and its leading dimensions are the last ones of x's."""
    common.check_float("log_probs", log_probs, x)
    lead = tuple(x.shape[:-1])
    own = tuple(log_probs.shape[:-1])
    if log_probs.dim() < 1 or log_probs.shape[-1] != codebook.shape[0] or lead[len(lead) - len(own) :] != own:
        expected = f"{[*lead, codebook.shape[0]]}, leading dimensions of x may be left out"
        raise ValueError(f"log_probs: got shape {tuple(log_probs.shape)}, expected {expected}")


def codebook_posterior_reference(x: Tensor, t: Tensor, log_probs: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in plain differentiable PyTorch; t [...] -> x0_hat [..., d], log of the weights' sum [...]."""
    dtype = common.compute_dtype(x, log_probs, codebook)
    codes = codebook.to(dtype)
    scores = _log_weights(x.to(dtype), t.to(dtype)[..., None], log_probs.to(dtype), codes)
    return (scores.softmax(-1) @ codes).to(x.dtype), scores.logsumexp(-1)


def _log_weights(x: Tensor, t: Tensor, log_probs: Tensor, codebook: Tensor) -> Tensor:
    """log p_j - |x - (1-t) c_j|^2 / (2 t^2), less what all codes share; t [..., 1] -> [..., V]."""
    ratio = (1 - t) / t
    return log_probs + (x / t * ratio) @ codebook.T - ratio.square() * codebook.square().sum(-1) / 2


def _check_times(t: Tensor) -> None:
    """t in [LEAST_TIME, 1]; only where looking costs no device synchronisation."""
    if t.device.type == "cpu" and t.numel():
        _check_range(*(float(bound) for bound in torch.aminmax(t)))


def _check_range(low: float, high: float) -> None:
    if not (low >= LEAST_TIME and high <= 1.0):
        raise ValueError(f"t: got values from {low:g} to {high:g}, expected {LEAST_TIME:g} <= t <= 1")


def _codebook_posterior(
    x: Tensor, t: Tensor, log_probs: Tensor, codebook: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    x0_hat, log_norm = _fake(x, t, log_probs, codebook)
    chosen = common.backend_of("codebook_posterior", backend, log_probs, x, codebook, **common.sizes_of(codebook))
    if x.numel() == 0:
        return x0_hat, log_norm
    _check_times(t)
    if common.rows_are_checked(chosen, x):
        common.check_finite("x", x)
        common.check_finite("codebook", codebook)
        if chosen != "cpu":
            common.check_rows("log_probs", common.bad_row(log_probs.reshape(-1, log_probs.shape[-1])))
    if chosen == "reference":
        return codebook_posterior_reference(x, t, log_probs, codebook)
    rows = _Rows(x, t, log_probs, codebook)
    out = torch.empty_like(rows.x)
    norm = rows.t.new_empty(len(rows.x))
    if chosen == "triton":
        native.triton("codebook_posterior").codebook_posterior(rows.x, rows.t, rows.log_probs, rows.codes, out, norm)
    elif chosen == "cuda":
        assert native.cuda is not None
        native.cuda.codebook_posterior_forward(
            *rows.arguments(0), rows.period, rows.codes.data_ptr(), out.data_ptr(), norm.data_ptr(),
            len(rows.x), *rows.codes.shape, *common.launch_place(rows.x),
        )  # fmt: skip
    for start in rows.starts if chosen == "cpu" else ():
        status = rows.kernels.codebook_posterior_forward(
            *rows.arguments(start),
            rows.codes.data_ptr(),
            out[start:].data_ptr(),
            norm[start:].data_ptr(),
            *rows.sizes,
        )
        if status >= 0 and common.bad_row(rows.log_probs[status : status + 1]) < 0:
            raise ValueError(f"x: row {start + status} is too far from all codes at its t, for float32")
        common.check_rows("log_probs", status)
    x0_hat.copy_(out.view(x.shape))
    log_norm.copy_(norm.view(x.shape[:-1]))
    return x0_hat, log_norm


def _codebook_posterior_backward(
    grad: Tensor,
    x: Tensor,
    t: Tensor,
    log_probs: Tensor,
    codebook: Tensor,
    x0_hat: Tensor,
    log_norm: Tensor,
    backend: str,
) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    chosen = common.backend_of("codebook_posterior", backend, log_probs, x, codebook, **common.sizes_of(codebook))
    if chosen == "reference":
        dtype = common.compute_dtype(x, log_probs, codebook)
        t, codes, g, mean = t.to(dtype)[..., None], codebook.to(dtype), grad.to(dtype), x0_hat.to(dtype)
        weights = _log_weights(x.to(dtype), t, log_probs.to(dtype), codes).softmax(-1)
        along_g = g @ codes.T - (mean * g).sum(-1, keepdim=True)
        return ((1 - t) / t.square() * ((weights * along_g) @ codes)).to(x.dtype).contiguous()
    rows = _Rows(x, t, log_probs, codebook)
    g, mean, norm = common.float_rows(grad), common.float_rows(x0_hat), log_norm.reshape(-1).contiguous()
    out = torch.empty_like(rows.x)
    if chosen == "triton":
        kernels = native.triton("codebook_posterior")
        kernels.codebook_posterior_backward(g, rows.x, rows.t, rows.log_probs, rows.codes, mean, norm, out)
    elif chosen == "cuda":
        assert native.cuda is not None
        native.cuda.codebook_posterior_backward(
            g.data_ptr(), *rows.arguments(0), rows.period, rows.codes.data_ptr(), mean.data_ptr(), norm.data_ptr(),
            out.data_ptr(), len(rows.x), *rows.codes.shape, *common.launch_place(rows.x),
        )  # fmt: skip
    for start in rows.starts if chosen == "cpu" else ():
        rows.kernels.codebook_posterior_backward(
            g[start:].data_ptr(),
            *rows.arguments(start),
            rows.codes.data_ptr(),
            mean[start:].data_ptr(),
            norm[start:].data_ptr(),
            out[start:].data_ptr(),
            *rows.sizes,
        )
    return out.view(x.shape).to(x.dtype)


class _Rows:
    """What kernels read in one call: rows of x and t, and the log_probs that repeat under x's extra dimensions."""

    def __init__(self, x: Tensor, t: Tensor, log_probs: Tensor, codebook: Tensor) -> None:
        self.kernels: Any = native.cpu
        self.x = common.float_rows(x)
        self.t = common.float_vector(t)
        self.log_probs = common.rows_of(log_probs)
        self.codes = common.float_rows(codebook)
        self.period = math.prod(log_probs.shape[:-1])
        self.starts = range(0, len(self.x), self.period)
        self.sizes = (self.period, *codebook.shape, common.threads())

    def arguments(self, start: int) -> tuple[int, ...]:
        """Pointers of x and t at row `start`, and log_probs with its dtype and row stride."""
        dtype = native.DTYPE_CODES[self.log_probs.dtype]
        pointers = (self.x[start:].data_ptr(), self.t[start:].data_ptr(), self.log_probs.data_ptr())
        return (*pointers, dtype, self.log_probs.stride(0))


def _fake(x: Tensor, t: Tensor, log_probs: Tensor, codebook: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    norm_dtype = common.compute_dtype(x, log_probs, codebook)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(x.shape[:-1], dtype=norm_dtype)


def _fake_backward(grad: Tensor, x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, t, log_probs, codebook, ctx.backend = inputs
    ctx.save_for_backward(x, t, log_probs, codebook, *output)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, grad_norm: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    dx = torch.ops.ddfast.codebook_posterior_backward(grad, *ctx.saved_tensors, ctx.backend)
    return dx, None, None, None, None


_ARGUMENTS = "Tensor x, Tensor t, Tensor log_probs, Tensor codebook"
_op = common.define(f"codebook_posterior({_ARGUMENTS}, str backend) -> (Tensor, Tensor)", _codebook_posterior, _fake)
common.define(
    f"codebook_posterior_backward(Tensor grad, {_ARGUMENTS}, Tensor x0_hat, Tensor log_norm, str backend) -> Tensor",
    _codebook_posterior_backward,
    _fake_backward,
)
torch.library.register_autograd(
    "ddfast::codebook_posterior", _autograd, setup_context=_setup_context, lib=common.library
)

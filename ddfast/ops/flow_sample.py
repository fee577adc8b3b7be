"""flow_sample: the whole per-token flow ODE, from noise to a code."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ddfast.ops import common, native
from ddfast.ops.codebook_posterior import check_log_probs
from ddfast.ops.geometry import codebook_geometry, mark_stale

SOLVERS = {"euler": 1, "dpm2m": 2, "dpm3m": 3, "heun": 4}
"""Solver name -> number by which the native modules know it (the multistep ones: their order)."""

DEFAULT_STEPS = 20
DEFAULT_SOLVER = "dpm3m"

MOST_NOISE = 1e15
"""Of larger values, which no normal distribution draws, products with the codes leave float32's range."""

MOST_STEPS = 2**20
"""Far more than change any code: what asks for as many more is a mistake, of which nothing but time would tell."""


def _start_spreads(dim: int) -> float:
    """The multiple of a token's own spread at which its grid starts; docs/numerics.md has the measurements.

    At k spreads the exponents of the weights have the variance d / k^2, of which the start leaves out higher powers. To
    64 dimensions, where that is 1 at most, the grid is what it always was, and stores of pairs go on as they began.
    """
    return 8.0 if dim <= 64 else dim / 4


def flow_sample(
    log_probs: Tensor,
    noise: Tensor,
    codebook: Tensor,
    *,
    steps: int = DEFAULT_STEPS,
    solver: str = DEFAULT_SOLVER,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The code that each token's noise flows to under dx/dt = (x - x0_hat(x, t)) / t, from t=1 to t=0.

    Because the posterior is exact, noise ~ N(0, I) makes the codes distributed as `log_probs`.

    Args:
        log_probs: [..., V], -inf where filtered; need not be normalised.
        noise: [..., d].
        codebook: codes [V, d].
        steps: intervals of the geometric grid in sigma = t/(1-t); each costs one pass over the codes (heun: two).
        solver: "dpm3m" (third-order multistep in x0 form), "dpm2m", "heun" or "euler".
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        codes int64 [...], and the embeddings reached, codebook[codes], [..., d] in the codebook's dtype.

    Numerics: float32 in VE coordinates (float64 inputs: in float64, on the reference). The kernels stop a token as
        soon as its code is provably final; the reference never does. docs/numerics.md: agreement with the exact map.
    Memory: O(tokens d) beside the output; the reference holds [tokens, V].
    Autograd: none.
    Raises:
        TypeError: an argument is no floating-point tensor, or `solver` no known name.
        ValueError: shapes, devices or settings are out of range; noise or codebook has NaN or infinite values; a row
            has NaN, +inf or an empty support (a kernel on a GPU, which is not waited for, gives it the code -1, as it
            does where the noise is not finite, and to all rows if the codebook was written to through `.data`).
    Source: docs/method.md section 2 (The closed-form flow), its VE form; docs/method.md section 3 (Solving the flow).
    """
    check_flow(noise, codebook, steps, solver)
    check_log_probs(log_probs, codebook, noise)
    common.check_shape("log_probs", log_probs, (*noise.shape[:-1], codebook.shape[0]))
    log_probs, noise, codebook = log_probs.detach(), noise.detach(), codebook.detach()
    codes = _op(log_probs, noise, codebook, steps, solver, backend)
    return codes, codebook[codes]


def check_flow(noise: Tensor, codebook: Tensor, steps: int, solver: str, like: Tensor | None = None) -> None:
    """Raise the user's error where a flow argument is out of its range, or not on the device of `like`."""
    common.check_float("noise", noise, like)
    if noise.dim() < 1:
        raise ValueError("noise: got a scalar, expected shape [..., d]")
    common.check_codebook(codebook, noise.shape[-1], noise)
    common.check_number("steps", steps, Integral)
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps: got {steps}, expected from 1 to {MOST_STEPS}")
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise ValueError(f"solver: got {solver!r}, expected one of {', '.join(SOLVERS)}")


def check_noise_row(noise: Tensor, row: int) -> None:
    """Raise if a row that a kernel could not use, by its status, or any (row -1) has noise of another kind."""
    rows = common.rows_of(noise)
    largest = float((rows if row < 0 else rows[row]).abs().amax())
    if largest > MOST_NOISE:
        raise ValueError(f"noise: got values of up to {largest:g}, expected at most {MOST_NOISE:g}")


def flow_sample_reference(log_probs: Tensor, noise: Tensor, codebook: Tensor, steps: int, solver: str) -> Tensor:
    """The algorithm, in plain PyTorch without early exit: codes int64 [...].

    With u = x/(1-t), sigma = t/(1-t) and lambda = -log(sigma) the flow is du/dlambda = D(u, sigma) - u, linear but
    for D = x0_hat: the solvers integrate exp(-(h - s)) D(s) exactly for a D interpolated through past evaluations.
    """
    dtype = common.compute_dtype(log_probs, noise, codebook)
    codes, lead = codebook.to(dtype), noise.shape[:-1]
    log_p = log_probs.to(dtype).reshape(-1, len(codes))
    eps = noise.to(dtype).reshape(-1, codes.shape[1])
    half_norms = codes.square().sum(-1) / 2
    log_p = log_p.log_softmax(-1)

    def scores(u: Tensor, sigma: Tensor) -> Tensor:
        return log_p + (u @ codes.T - half_norms) / sigma.square()

    def denoise(u: Tensor, sigma: Tensor) -> Tensor:
        return scores(u, sigma).softmax(-1) @ codes

    probs = log_p.exp()
    mean = probs @ codes
    # Distances by differences: a token certain of its code has a spread of exactly 0.
    distance = torch.cdist(mean, codes, compute_mode="donot_use_mm_for_euclid_dist")
    spread = ((probs * distance.square()).sum(-1, keepdim=True) / codes.shape[1]).sqrt()
    sigma_min = codebook_geometry(codebook).sigma_min
    sigma = (_start_spreads(codes.shape[1]) * spread).clamp_min(2 * sigma_min)
    h = torch.log(sigma / sigma_min) / steps
    decay = torch.exp(-h)
    i0, i1, i2 = _exponential_integrals(h)

    # In z = 1/sigma and v = u/sigma the flow is dv/dz = D, regular at z = 0 where D is the mean: Heun's step from
    # there, whose first stage is free. The same expansion supplies the history that a multistep solver lacks.
    u = sigma * eps + mean
    current = denoise(u, sigma)
    u = u + (current - mean) / 2
    previous = mean + (current - mean) * decay
    before = mean + (current - mean) * decay.square()

    for step in range(steps):
        if step:
            before, previous, current = previous, current, denoise(u, sigma)
        following = decay * sigma
        moved = decay * u + i0 * current
        if solver == "dpm2m":
            moved = moved + i1 * (current - previous) / h
        elif solver == "dpm3m":
            slope = (3 * current - 4 * previous + before) / (2 * h)
            curvature = (current - 2 * previous + before) / h.square()
            moved = moved + i1 * slope + i2 * curvature / 2
        elif solver == "heun":
            moved = moved + i1 * (denoise(moved, following) - current) / h
        u, sigma = moved, following
    reached = scores(u, sigma)
    # Without spread there is no flow: one code, or several at one point.
    return torch.where(spread[:, 0] > 0, reached.argmax(-1), log_p.argmax(-1)).reshape(lead)


def _exponential_integrals(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integrals of exp(-(h - s)) s^k over s in [0, h], k = 0, 1, 2, in the dtype of h."""
    exact = h.double()
    i0 = -torch.expm1(-exact)
    i1 = exact - i0
    i2 = exact.square() - 2 * i1
    return i0.to(h.dtype), i1.to(h.dtype), i2.to(h.dtype)


def triton_flow(
    rows: Tensor, noise: Tensor, codebook: Tensor, out: Tensor, steps: int, solver: str, **filtering: Any
) -> None:
    """Launch the Triton kernel on rows of logits or log-probabilities; `filtering` as in its module."""
    geometry = codebook_geometry(codebook, wait=False)
    arguments = (geometry.centred, geometry.packed, geometry.sigma_min, steps, SOLVERS[solver])
    native.triton("flow_sample").flow_sample(rows, common.float_rows(noise), *arguments, out, **filtering)
    mark_stale(out, codebook, geometry)


def cuda_flow(
    launch: str, logits_arguments: tuple[int | float, ...], noise: Tensor, codebook: Tensor, out: Tensor, steps: int,
    solver: str, *, top_k: int = 0, top_p: float = 1.0,
) -> None:  # fmt: skip
    """Call `launch` of the CUDA module on rows described by its leading arguments."""
    kernels, geometry = native.cuda, codebook_geometry(codebook, wait=False)
    assert kernels is not None
    eps, codes, place = common.float_rows(noise), common.float_rows(codebook), common.launch_place(out)
    size = kernels.flow_scratch_bytes(len(eps), *codes.shape, top_k, top_p, 0, place[0])
    scratch = out.new_empty(size, dtype=torch.uint8)
    getattr(kernels, launch)(
        *logits_arguments, eps.data_ptr(), codes.data_ptr(), geometry.packed.data_ptr(), out.data_ptr(), 0,
        scratch.data_ptr() if size else 0, len(eps), *codes.shape, steps, SOLVERS[solver], geometry.sigma_min, True, 0,
        *place,
    )  # fmt: skip
    mark_stale(out, codebook, geometry)


def native_flow_arguments(
    noise: Tensor, codebook: Tensor, codes_out: Tensor, steps: int, solver: str
) -> tuple[tuple[int | float | bool, ...], list[Tensor]]:
    """The native modules' trailing arguments (early exit on), and the tensors that must outlive the call."""
    eps, codes = common.float_rows(noise), common.float_rows(codebook)
    geometry = codebook_geometry(codebook)
    arguments = (
        eps.data_ptr(),
        codes.data_ptr(),
        geometry.packed.data_ptr(),
        codes_out.data_ptr(),
        0,  # evaluations per row are not asked for
        len(eps),
        *codes.shape,
        steps,
        SOLVERS[solver],
        geometry.sigma_min,
        True,
        common.threads(),
    )
    return arguments, [eps, codes, geometry.packed]


def _flow_sample(log_probs: Tensor, noise: Tensor, codebook: Tensor, steps: int, solver: str, backend: str) -> Tensor:
    out = _fake(log_probs, noise)
    chosen = common.backend_of("flow_sample", backend, log_probs, noise, codebook, **common.sizes_of(codebook))
    if out.numel() == 0:
        return out
    if common.rows_are_checked(chosen, noise):
        common.check_finite("noise", noise)
    rows = common.rows_of(log_probs)
    if chosen == "reference":
        check_noise_row(noise, -1)
        common.check_rows("log_probs", common.bad_row(rows))
        return flow_sample_reference(log_probs, noise, codebook, steps, solver)
    if chosen == "triton":
        triton_flow(rows, noise, codebook, out, steps, solver)
        common.check_rows("log_probs", common.marked_row(out))
        return out
    if chosen == "cuda":
        logits_arguments = (rows.data_ptr(), native.DTYPE_CODES[rows.dtype], rows.stride(0))
        cuda_flow("flow_sample", logits_arguments, noise, codebook, out, steps, solver)
        common.check_rows("log_probs", common.marked_row(out))
        return out
    assert native.cpu is not None
    arguments, _alive = native_flow_arguments(noise, codebook, out, steps, solver)
    status = native.cpu.flow_sample(rows.data_ptr(), native.DTYPE_CODES[rows.dtype], rows.stride(0), *arguments)
    if status >= 0:
        check_noise_row(noise, status)
    common.check_rows("log_probs", status)
    return out


def _fake(log_probs: Tensor, noise: Tensor, *_: object) -> Tensor:
    return noise.new_empty(noise.shape[:-1], dtype=torch.int64)


_op = common.define(
    "flow_sample(Tensor log_probs, Tensor noise, Tensor codebook, SymInt steps, str solver, str backend) -> Tensor",
    _flow_sample,
    _fake,
)

"""sample_codes: filter and flow in one call, the teacher loop's hot path."""

from __future__ import annotations

import torch
from torch import Tensor

from ddfast.ops import common, native
from ddfast.ops.filter_logits import (
    cfg_rows,
    check_filter,
    check_filtered,
    filter_logits_reference,
    native_filter_arguments,
    row_views,
)
from ddfast.ops.flow_sample import (
    DEFAULT_SOLVER,
    DEFAULT_STEPS,
    check_flow,
    check_noise_row,
    cuda_flow,
    flow_sample_reference,
    native_flow_arguments,
    triton_flow,
)


def sample_codes(
    logits: Tensor,
    noise: Tensor,
    codebook: Tensor,
    *,
    uncond: Tensor | None = None,
    cfg_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    steps: int = DEFAULT_STEPS,
    solver: str = DEFAULT_SOLVER,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`flow_sample(filter_logits(logits, ...), noise, codebook, ...)` without the distribution ever being written.

    Args:
        logits, uncond, cfg_scale, temperature, top_k, top_p: as in `filter_logits`, [..., V].
        noise, codebook, steps, solver, backend: as in `flow_sample`, [..., d] and [V, d].

    Returns:
        codes int64 [...], and codebook[codes] [..., d].

    Memory: O(threads (V + K d)), K the codes kept; the reference holds [tokens, V].
    Autograd: none.
    Raises: as `filter_logits` and `flow_sample`.
    """
    codes = only_codes(
        logits,
        noise,
        codebook,
        uncond=uncond,
        cfg_scale=cfg_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        steps=steps,
        solver=solver,
        backend=backend,
    )
    return codes, codebook.detach()[codes]


def only_codes(
    logits: Tensor,
    noise: Tensor,
    codebook: Tensor,
    *,
    uncond: Tensor | None = None,
    cfg_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    steps: int = DEFAULT_STEPS,
    solver: str = DEFAULT_SOLVER,
    backend: str = "auto",
) -> Tensor:
    """The codes of `sample_codes` without their embeddings: a launch less, for who looks none up."""
    check_filter(logits, uncond, temperature, top_k, top_p)
    check_flow(noise, codebook, steps, solver, logits)
    common.check_shape("logits", logits, (*noise.shape[:-1], codebook.shape[0]))
    scale = cfg_rows(logits, uncond, cfg_scale)
    return _op(
        logits.detach(),
        None if uncond is None else uncond.detach(),
        scale,
        temperature,
        top_k,
        top_p,
        noise.detach(),
        codebook.detach(),
        steps,
        solver,
        backend,
    )


def _sample_codes(
    logits: Tensor,
    uncond: Tensor | None,
    cfg_scale: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    noise: Tensor,
    codebook: Tensor,
    steps: int,
    solver: str,
    backend: str,
) -> Tensor:
    out = noise.new_empty(noise.shape[:-1], dtype=torch.int64)
    tensors = (logits, uncond, noise, codebook)
    chosen = common.backend_of("sample_codes", backend, *tensors, **common.sizes_of(codebook))
    if out.numel() == 0:
        return out
    if common.rows_are_checked(chosen, noise):
        common.check_finite("noise", noise)
    if chosen == "reference":
        check_noise_row(noise, -1)
        log_probs = filter_logits_reference(logits, uncond, cfg_scale, temperature, top_k, top_p)
        return flow_sample_reference(log_probs, noise, codebook, steps, solver)
    if chosen == "triton":
        rows, uncond_rows, scale = row_views(logits, uncond, cfg_scale)
        kept = native.triton("filter_logits").filter_logits(rows, uncond_rows, scale, temperature, top_k, top_p)
        filtering = {"kept": kept, "uncond": uncond_rows, "scale": scale, "temperature": temperature}
        triton_flow(rows, noise, codebook, out, steps, solver, **filtering)
        check_filtered(common.marked_row(out), logits, uncond, cfg_scale, temperature)
        return out
    filter_arguments, _filter_alive = native_filter_arguments(logits, uncond, cfg_scale, temperature, top_k, top_p)
    if chosen == "cuda":
        cuda_flow("sample_codes", filter_arguments, noise, codebook, out, steps, solver, top_k=top_k, top_p=top_p)
        check_filtered(common.marked_row(out), logits, uncond, cfg_scale, temperature)
        return out
    assert native.cpu is not None
    flow_arguments, _flow_alive = native_flow_arguments(noise, codebook, out, steps, solver)
    status = native.cpu.sample_codes(*filter_arguments, *flow_arguments)
    if status >= 0:
        check_noise_row(noise, status)
    check_filtered(status, logits, uncond, cfg_scale, temperature)
    return out


def _fake(
    logits: Tensor,
    uncond: Tensor | None,
    cfg_scale: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    noise: Tensor,
    *_: object,
) -> Tensor:
    return noise.new_empty(noise.shape[:-1], dtype=torch.int64)


_op = common.define(
    "sample_codes(Tensor logits, Tensor? uncond, Tensor? cfg_scale, float temperature, SymInt top_k, float top_p,"
    " Tensor noise, Tensor codebook, SymInt steps, str solver, str backend) -> Tensor",
    _sample_codes,
    _fake,
)

"""draw_codes: ordinary sampling from a teacher's raw outputs in one call, filters included."""

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


def draw_codes(
    logits: Tensor,
    uniform: Tensor,
    *,
    uncond: Tensor | None = None,
    cfg_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """The code at which the running sum of `filter_logits(logits, ...)`'s probabilities passes `uniform`.

    With `uniform` from U[0, 1) that is a draw from the filtered distribution; 0 and `top_k=1` is the likeliest code
    (ties: the lowest). The randomness is an argument, so that a step of decoding depends on nothing on the host.

    Args:
        logits, uncond, cfg_scale, temperature, top_k, top_p: as in `filter_logits`, [..., V].
        uniform: float32 [...], in [0, 1).
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        int64 [...]. A kernel on a GPU, which is not waited for, gives a row that cannot be used the code -1.

    Numerics: sums of probabilities differ between backends by about 1e-6; a number that close to a boundary between
        two codes may draw either.
    Memory: O(threads V); the reference holds [tokens, V].
    Autograd: none.
    Raises: as `filter_logits`; `ValueError` where `uniform` has another shape or a number outside [0, 1) (a kernel on a
        GPU takes the nearest one inside, and NaN as nearly 1).
    """
    check_filter(logits, uncond, temperature, top_k, top_p)
    common.check_float("uniform", uniform, logits)
    common.check_shape("uniform", uniform, tuple(logits.shape[:-1]))
    scale = cfg_rows(logits, uncond, cfg_scale)
    uncond = None if uncond is None else uncond.detach()
    return _op(logits.detach(), uncond, scale, temperature, top_k, top_p, uniform.detach(), backend)


def check_uniform(uniform: Tensor) -> None:
    """Raise where a number is not in [0, 1)."""
    low, high = (float(bound) for bound in torch.aminmax(uniform))
    if not (low >= 0.0 and high < 1.0):
        raise ValueError(f"uniform: got values from {low:g} to {high:g}, expected 0 <= uniform < 1")


def draw_codes_reference(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """The definition, in plain PyTorch and float64: log_probs [..., V], uniform [...]."""
    mass = log_probs.double().exp().cumsum(-1)
    total = mass[..., -1:]
    passed = (mass <= uniform.double()[..., None] * total).sum(-1)
    last = (mass < total).sum(-1)  # where rounding leaves the goal at the total
    return torch.minimum(passed, last)


def _draw_codes(
    logits: Tensor,
    uncond: Tensor | None,
    cfg_scale: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    uniform: Tensor,
    backend: str,
) -> Tensor:
    out = _fake(logits)
    chosen = common.backend_of("draw_codes", backend, logits, uncond, size=logits.shape[-1])
    if out.numel() == 0:
        return out
    if common.rows_are_checked(chosen, uniform):
        check_uniform(uniform)
    if chosen == "reference":
        log_probs = filter_logits_reference(logits, uncond, cfg_scale, temperature, top_k, top_p)
        return draw_codes_reference(log_probs, uniform)
    numbers = common.float_vector(uniform)
    if chosen == "triton":
        rows, uncond_rows, scale = row_views(logits, uncond, cfg_scale)
        settings = (temperature, top_k, top_p)
        native.triton("draw_codes").draw_codes(rows, uncond_rows, scale, *settings, numbers, out.view(-1))
        check_filtered(common.marked_row(out), logits, uncond, cfg_scale, temperature)
        return out
    arguments, _alive = native_filter_arguments(logits, uncond, cfg_scale, temperature, top_k, top_p)
    addresses, sizes = (numbers.data_ptr(), out.data_ptr()), (out.numel(), logits.shape[-1])
    if chosen == "cuda":
        assert native.cuda is not None
        place = common.launch_place(out)
        size = native.cuda.draw_scratch_bytes(*sizes, 0, place[0])
        scratch = out.new_empty(size, dtype=torch.uint8)
        native.cuda.draw_codes(*arguments, *addresses, scratch.data_ptr() if size else 0, *sizes, 0, *place)
        check_filtered(common.marked_row(out), logits, uncond, cfg_scale, temperature)
        return out
    assert native.cpu is not None
    status = native.cpu.draw_codes(*arguments, *addresses, *sizes, common.threads())
    check_filtered(status, logits, uncond, cfg_scale, temperature)
    return out


def _fake(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64)


_op = common.define(
    "draw_codes(Tensor logits, Tensor? uncond, Tensor? cfg_scale, float temperature, SymInt top_k, float top_p,"
    " Tensor uniform, str backend) -> Tensor",
    _draw_codes,
    _fake,
)

"""filter_logits: a teacher's raw outputs -> the distribution it samples from."""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor

from ddfast.ops import common, native


def filter_logits(
    logits: Tensor,
    *,
    uncond: Tensor | None = None,
    cfg_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Log-probabilities after classifier-free guidance, temperature, top-k and top-p, in this order.

    guided = uncond + cfg_scale (logits - uncond); divided by `temperature`; top-k drops what is below the k-th largest
    (all ties with it survive); top-p keeps an entry when the mass of the strictly earlier entries in descending order
    (ties: lowest index first) is below `top_p`, and always the first; what is left is normalised.

    Args:
        logits: [..., V], any floating dtype.
        uncond: unconditional logits of the same shape, or None for no guidance.
        cfg_scale: guidance scale, a number or a tensor broadcastable to [...]; unused without `uncond`.
        temperature: positive.
        top_k: 0 or at least V means off.
        top_p: in (0, 1]; 1 means off.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        float32 [..., V] (float64 for float64 inputs), normalised, -inf where filtered.

    Autograd: none.
    Raises:
        TypeError: an argument is no floating-point tensor, or a setting no number.
        ValueError: a shape, a device or a setting is out of range; a row of logits or uncond has NaN, +inf or nothing
            finite, or its cfg_scale is not finite (a kernel on a GPU, which is not waited for, makes the row NaN).
    """
    check_filter(logits, uncond, temperature, top_k, top_p)
    scale = cfg_rows(logits, uncond, cfg_scale)
    if uncond is not None:
        uncond = uncond.detach()
    return _op(logits.detach(), uncond, scale, temperature, top_k, top_p, backend)


def check_filter(logits: Tensor, uncond: Tensor | None, temperature: float, top_k: int, top_p: float) -> None:
    """Raise the user's error where a filter argument is out of its range."""
    common.check_float("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [..., V >= 1]")
    if uncond is not None:
        common.check_float("uncond", uncond, logits)
        common.check_shape("uncond", uncond, tuple(logits.shape))
    common.check_number("temperature", temperature)
    common.check_number("top_k", top_k, Integral)
    common.check_number("top_p", top_p)
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, expected a positive number (top_k=1 is greedy)")
    if top_k < 0:
        raise ValueError(f"top_k: got {top_k}, expected 0 (off) or a positive number")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: got {top_p}, expected 0 < top_p <= 1 (1 is off)")


def cfg_rows(logits: Tensor, uncond: Tensor | None, cfg_scale: float | Tensor) -> Tensor | None:
    """The guidance scale of every row, [...] in the dtype of the computation; None where there is nothing to guide."""
    if not isinstance(cfg_scale, Tensor):
        common.check_factor("cfg_scale", cfg_scale)
    else:
        common.check_tensor("cfg_scale", cfg_scale)
        if cfg_scale.dtype == torch.bool or cfg_scale.is_complex() or cfg_scale.is_quantized:
            raise TypeError(f"cfg_scale: got dtype {cfg_scale.dtype}, expected numbers")
    if uncond is None:
        return None
    dtype = common.compute_dtype(logits, uncond)
    if isinstance(cfg_scale, Tensor):
        scale = common.moved("cfg_scale", cfg_scale.detach(), logits.device, dtype)
    else:
        scale = common.scalar(cfg_scale, dtype, logits.device)
    try:
        return scale.expand(logits.shape[:-1])
    except RuntimeError:
        expected = f"a shape broadcastable to {list(logits.shape[:-1])}"
        raise ValueError(f"cfg_scale: got shape {tuple(scale.shape)}, expected {expected}") from None


def filter_logits_reference(
    logits: Tensor,
    uncond: Tensor | None = None,
    cfg_scale: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """The definition, in plain PyTorch; cfg_scale [...]."""
    dtype = common.compute_dtype(logits, uncond)
    guided = logits.to(dtype)
    if uncond is not None and cfg_scale is not None:
        base = uncond.to(dtype)
        never = (guided == -math.inf) & (base == -math.inf)
        guided = (base + cfg_scale[..., None].to(dtype) * (guided - base)).masked_fill(never, -math.inf)
    guided = guided / temperature
    check_filtered(common.bad_row(guided.reshape(-1, guided.shape[-1])), logits, uncond, cfg_scale, temperature)
    if 0 < top_k < guided.shape[-1]:
        kth_largest = guided.topk(top_k, dim=-1).values[..., -1:]
        guided = guided.masked_fill(guided < kth_largest, -math.inf)
    if top_p < 1.0:
        # By the logits: probabilities may be equal where those are not.
        descending, order = guided.sort(dim=-1, descending=True, stable=True)
        mass_before = descending.softmax(-1).double().cumsum(-1).roll(1, dims=-1)
        mass_before[..., 0] = -1.0  # the first entry always stays
        dropped = torch.zeros_like(guided, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
        guided = guided.masked_fill(dropped, -math.inf)
    return guided.log_softmax(-1)


def check_filtered(
    status: int, logits: Tensor, uncond: Tensor | None, cfg_scale: Tensor | None, temperature: float
) -> None:
    """Turn a status (the first row that could not be used, or -1) into the user's error, by the argument at fault."""
    if status < 0:
        return
    if uncond is not None and cfg_scale is not None:
        scale = float(cfg_scale.reshape(-1)[status])
        if not math.isfinite(scale):
            raise ValueError(f"cfg_scale: got {scale} for row {status}, expected finite numbers")
    for name, tensor in (("logits", logits), ("uncond", uncond)):
        if tensor is not None and common.bad_row(common.rows_of(tensor)[status : status + 1]) == 0:
            common.check_rows(name, status)
    if uncond is not None:
        apart = "uncond and logits are not -inf at the same places, or too far from each other"
        raise ValueError(f"uncond: row {status} cannot be guided by its scale: {apart}")
    raise ValueError(f"temperature: got {temperature}, at which row {status} of logits overflows")


def row_views(
    logits: Tensor, uncond: Tensor | None, cfg_scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """logits and uncond as rows [rows, V] of one dtype, the guidance scale as float32 [rows].

    Where their dtypes differ, both are copied as float32, which rounds neither.
    """
    if uncond is not None and uncond.dtype != logits.dtype:
        logits, uncond = logits.float(), uncond.float()
    scale = None if cfg_scale is None else common.float_vector(cfg_scale)
    return common.rows_of(logits), None if uncond is None else common.rows_of(uncond), scale


def native_filter_arguments(
    logits: Tensor, uncond: Tensor | None, cfg_scale: Tensor | None, temperature: float, top_k: int, top_p: float
) -> tuple[tuple[int | float, ...], list[Tensor | None]]:
    """The native modules' leading arguments, and the tensors that must outlive the call."""
    rows, uncond_rows, scale = row_views(logits, uncond, cfg_scale)
    arguments = (
        rows.data_ptr(),
        native.DTYPE_CODES[rows.dtype],
        rows.stride(0),
        0 if uncond_rows is None else uncond_rows.data_ptr(),
        0 if uncond_rows is None else uncond_rows.stride(0),
        0 if scale is None else scale.data_ptr(),
        temperature,
        top_k,
        top_p,
    )
    return arguments, [rows, uncond_rows, scale]


def _filter_logits(
    logits: Tensor,
    uncond: Tensor | None,
    cfg_scale: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    backend: str,
) -> Tensor:
    chosen = common.backend_of("filter_logits", backend, logits, uncond, size=logits.shape[-1])
    if logits.numel() == 0:
        return _fake(logits, uncond)
    if chosen == "reference":
        return filter_logits_reference(logits, uncond, cfg_scale, temperature, top_k, top_p)
    if chosen == "triton":
        out = _fake(logits, uncond)
        rows, uncond_rows, scale = row_views(logits, uncond, cfg_scale)
        kernels = native.triton("filter_logits")
        kernels.filter_logits(rows, uncond_rows, scale, temperature, top_k, top_p, out.view(rows.shape))
        if common.rows_are_checked(chosen, out):
            check_filtered(common.bad_row(out.view(rows.shape)), logits, uncond, cfg_scale, temperature)
        return out
    arguments, _alive = native_filter_arguments(logits, uncond, cfg_scale, temperature, top_k, top_p)
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    sizes = (logits.numel() // logits.shape[-1], logits.shape[-1])
    if chosen == "cuda":
        assert native.cuda is not None
        place = common.launch_place(out)
        size = native.cuda.filter_scratch_bytes(*sizes, 0, place[0])
        scratch = out.new_empty(size, dtype=torch.uint8)
        native.cuda.filter_logits(*arguments, out.data_ptr(), scratch.data_ptr() if size else 0, *sizes, 0, *place)
        if common.rows_are_checked(chosen, out):
            check_filtered(common.bad_row(out.view(sizes)), logits, uncond, cfg_scale, temperature)
        return out
    assert native.cpu is not None
    status = native.cpu.filter_logits(*arguments, out.data_ptr(), *sizes, common.threads())
    check_filtered(status, logits, uncond, cfg_scale, temperature)
    return out


def _fake(logits: Tensor, uncond: Tensor | None, *_: object) -> Tensor:
    return torch.empty(logits.shape, dtype=common.compute_dtype(logits, uncond), device=logits.device)


_op = common.define(
    "filter_logits(Tensor logits, Tensor? uncond, Tensor? cfg_scale, float temperature, SymInt top_k, float top_p,"
    " str backend) -> Tensor",
    _filter_logits,
    _fake,
)

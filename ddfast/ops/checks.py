"""Small problems that a kernel must solve as the reference does before it runs by itself on a GPU.

`main` runs them in a process of its own for `verification`, and tells line by line which check begins and how it ended.
A problem has what tells kernels apart that are right from those that nearly are: rows that keep few codes and rows that
keep all (one launch, clusters, codes staged in shared memory, a second launch), equal logits, filtered codes, rows that
cannot be used, sizes that divide by nothing.

Dimensions: R rows, V codes, d code dimension.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddfast import ops, seeds
from ddfast.ops import native
from ddfast.ops.findings import Check
from ddfast.ops.tolerance import TOLERANCE


class Wrong(Exception):
    """A kernel's result is not the reference's; says how."""


Problem = Callable[[str, torch.device, torch.dtype, int, int], None]
"""(backend, device, dtype, dimension, divisor of the sizes): raises `Wrong`."""


def _normal(device: torch.device, seed: int, *shape: int) -> Tensor:
    """Standard normal float32 numbers, the same on every device."""
    return torch.randn(*shape, generator=seeds.generator(seed), dtype=torch.float32).to(device)


def _close(what: str, ours: Tensor, exact: Tensor, tolerance: Tensor | float) -> None:
    """Both are NaN at the same places, infinite alike, and near each other elsewhere."""
    ours, exact = ours.double(), exact.double()
    for kind, one, other in (("NaN", ours.isnan(), exact.isnan()), ("infinite", ours.isinf(), exact.isinf())):
        if not torch.equal(one, other):
            raise Wrong(f"{what}: {int((one != other).sum())} of {one.numel()} are {kind} in one result only")
    off = (ours - exact).nan_to_num(0.0, 0.0, 0.0).abs() - tolerance
    if off.numel() and float(off.max()) > 0:
        raise Wrong(f"{what}: beyond the tolerance by {float(off.max()):.3g}")


def _codes(what: str, ours: Tensor, exact: Tensor, allowed: int) -> None:
    """Codes are the same but for so many, which rounding may put on the other side of a boundary."""
    different = int((ours != exact).sum())
    if different > allowed:
        raise Wrong(f"{what}: {different} of {ours.numel()} codes differ, {allowed} may")


def _logits(device: torch.device, dtype: torch.dtype, rows: int, num_codes: int) -> Tensor:
    """[R, V]: flat rows and peaked ones in turn; one of equal logits; many ties; a quarter of the codes impossible."""
    logits = _normal(device, 1, rows, num_codes)
    logits[::2] *= 6.0
    logits = (logits * 8).round() / 8
    logits[rows // 3] = 0.5
    logits[:, num_codes // 2 :: 4] = -math.inf
    return logits.to(dtype)


FILTERS: tuple[dict[str, Any], ...] = ({"top_k": 900, "top_p": 0.95}, {"top_k": 8000}, {"top_p": 0.8}, {})
"""VAR's, LlamaGen's, and what leaves open how many codes a row keeps."""


SAMPLED = ((16384, FILTERS[1]), (9001, FILTERS[2]), (16385, FILTERS[3]), (4096, FILTERS[0]))
"""Of sample_codes: codes staged in shared memory; a second launch; clusters that stream all codes; one launch."""


def _divided(filters: dict[str, Any], divisor: int) -> dict[str, Any]:
    return filters | ({"top_k": max(1, int(filters["top_k"]) // divisor)} if "top_k" in filters else {})


def nearest_code(backend: str, device: torch.device, dtype: torch.dtype, dim: int, divisor: int) -> None:
    """Distances to the chosen codes are the least; of equal codes the first; also far from the origin."""
    for num_codes in (16384 // divisor, 999 // divisor + 1):
        codebook = _normal(device, 2, num_codes, dim).to(dtype)
        twins = num_codes // 2
        codebook[num_codes - twins :] = codebook[:twins]
        x = _normal(device, 3, 320, dim)
        x[::5] += 8.0
        x = x.to(dtype)
        for cosine in (False, True):
            codes = ops.nearest_code(x, codebook, cosine=cosine, backend=backend)
            if int(codes.min()) < 0 or int(codes.max()) >= num_codes:
                raise Wrong("a code is outside the codebook")
            if int((codes >= num_codes - twins).sum()):
                raise Wrong("of two equal codes the second was chosen")
            rows, code_rows = x.double(), codebook.double()
            if cosine:
                rows, code_rows = (torch.nn.functional.normalize(tensor, dim=-1) for tensor in (rows, code_rows))
            distance = code_rows.square().sum(-1) - 2 * rows @ code_rows.T
            excess = distance.gather(1, codes[:, None])[:, 0] - distance.amin(-1)
            size = rows.square().sum(-1) + code_rows.square().sum(-1).amax()
            _close("distance", excess, torch.zeros_like(excess), 4e-6 * size)


def filter_logits(backend: str, device: torch.device, dtype: torch.dtype, dim: int, divisor: int) -> None:
    """The same codes are kept, but for one whose mass lies within rounding of top_p, at the same log-probabilities."""
    for num_codes in (16385 // divisor, 4096 // divisor):
        logits, uncond = (_logits(device, dtype, 9, num_codes) for _ in range(2))
        for filters in (_divided(filters, divisor) for filters in (*FILTERS, {"top_k": 1})):
            guidances: tuple[dict[str, Any], ...] = ({}, {"uncond": uncond.flip(0), "cfg_scale": 2.0})
            for guidance in guidances:
                ours = ops.filter_logits(logits, **guidance, **filters, temperature=0.9, backend=backend).double()
                if guidance:
                    guidance = guidance | {"uncond": uncond.flip(0).double()}
                exact = ops.filter_logits(logits.double(), **guidance, **filters, temperature=0.9, backend="reference")
                both = (ours > -math.inf) & (exact > -math.inf)
                apart = int(((ours > -math.inf) != (exact > -math.inf)).sum(-1).max())
                if apart > (1 if "top_p" in filters else 0):
                    raise Wrong(f"{filters}: {apart} codes of a row are kept by one and not by the other")
                # One code more or less moves all of a row's log-probabilities by the share that it has.
                tolerance = TOLERANCE["filter_logits", torch.float32] * (1 + apart * num_codes)
                _close(f"log-probabilities, {filters}", ours[both], exact[both], tolerance)
    bad = torch.zeros(3, num_codes, device=device, dtype=dtype)
    bad[1, num_codes // 2] = math.nan
    if device.type != "cpu" and not torch.equal(
        ops.filter_logits(bad, backend=backend).isnan().all(-1).cpu(),
        torch.tensor([False, True, False], dtype=torch.bool),
    ):
        raise Wrong("a row with NaN is not marked")


def codebook_posterior(backend: str, device: torch.device, dtype: torch.dtype, dim: int, divisor: int) -> None:
    """Forward and backward over all times, of several draws of a token, some of its codes impossible.

    x is float32 with every dtype of the rest, so that no rounding of results hides what is wrong with them.
    """
    for num_codes in (4095 // divisor, 64):
        codebook = _normal(device, 4, num_codes, dim).to(dtype)
        log_probs = _normal(device, 5, 37, num_codes)
        log_probs[:, ::3] = -math.inf
        log_probs = log_probs.log_softmax(-1).to(dtype)
        t = torch.linspace(0.05, 1.0, 3 * 37, dtype=torch.float32, device=device).view(3, 37)
        x = (1 - t[..., None]) * codebook[1].float() + t[..., None] * _normal(device, 6, 3, 37, dim)
        upstream = _normal(device, 7, *x.shape)
        results = []
        for wide, by in ((False, backend), (True, "reference")):
            given = [tensor.double() if wide else tensor for tensor in (x, t, log_probs, codebook, upstream)]
            leaf = given[0].clone().requires_grad_()
            mean = ops.codebook_posterior(leaf, *given[1:4], backend=by)
            results += [mean.detach(), *torch.autograd.grad(mean, leaf, given[4])]
        size, times = float(codebook.abs().max()) + 1, t.double()[..., None]
        tolerance = TOLERANCE["codebook_posterior", x.dtype] * size * (1 + 2e-3 / times.square()) * math.sqrt(dim)
        _close("mean", results[0], results[2], tolerance)
        _close("gradient", results[1], results[3], 10 * tolerance * (1 + results[3].abs().amax(-1, keepdim=True)))


def flow_sample(backend: str, device: torch.device, dtype: torch.dtype, dim: int, divisor: int) -> None:
    """The codes of the exact flow, of rows that keep few codes, and all."""
    for num_codes in (16384 // divisor, 4095 // divisor, 3):
        codebook = _normal(device, 8, num_codes, dim)
        log_probs = _logits(device, torch.float32, 64, num_codes)
        log_probs[1::2, num_codes // 8 + 1 :] = -math.inf
        log_probs = log_probs.log_softmax(-1).to(dtype)
        noise = _normal(device, 9, 64, dim)
        codes, _ = ops.flow_sample(log_probs, noise, codebook, backend=backend)
        exact, _ = ops.flow_sample(log_probs.double(), noise.double(), codebook.double(), backend="reference")
        _codes(f"{num_codes} codes", codes, exact, 2)


def sample_codes(backend: str, device: torch.device, dtype: torch.dtype, dim: int, divisor: int) -> None:
    """As flow_sample, of filtered and guided logits; the last row cannot be used."""
    for num_codes, filters in SAMPLED:
        num_codes, filters = num_codes // divisor, _divided(filters, divisor)
        codebook, noise = _normal(device, 10, num_codes, dim), _normal(device, 11, 64, dim)
        logits = _logits(device, dtype, 64, num_codes)
        uncond = torch.zeros_like(logits)
        settings = {"cfg_scale": 1.5, "temperature": 1.1, **filters}
        codes, _ = ops.sample_codes(logits, noise, codebook, uncond=uncond, **settings, backend=backend)
        wide = [tensor.double() for tensor in (logits, noise, codebook)]
        exact, _ = ops.sample_codes(*wide, uncond=uncond.double(), **settings, backend="reference")
        _codes(f"{num_codes} codes, {filters}", codes, exact, 2 + 2 * ("top_p" in filters))
    logits[-1] = math.nan
    if device.type != "cpu" and int(ops.sample_codes(logits, noise, codebook, backend=backend)[0][-1]) != -1:
        raise Wrong("a row of NaN is not marked")


def draw_codes(backend: str, device: torch.device, dtype: torch.dtype, dim: int, divisor: int) -> None:
    """The reference's draws, but for numbers on the boundary between two codes; the likeliest code without chance."""
    for num_codes in (16384 // divisor, 999 // divisor + 1):
        logits = _logits(device, dtype, 66, num_codes)
        uniform = torch.rand(66, generator=seeds.generator(12), dtype=torch.float32).to(device)
        uniform[0] = 0.0
        for filters in (_divided(filters, divisor) for filters in FILTERS):
            codes = ops.draw_codes(logits, uniform, **filters, backend=backend)
            exact = ops.draw_codes(logits.double(), uniform, **filters, backend="reference")
            _codes(f"{num_codes} codes, {filters}", codes, exact, 2)
        codes = ops.draw_codes(logits, torch.zeros_like(uniform), top_k=1, backend=backend)
        _codes("the likeliest", codes, logits.float().argmax(-1), 0)
    logits[-1] = math.nan
    if device.type != "cpu" and int(ops.draw_codes(logits, uniform, backend=backend)[-1]) != -1:
        raise Wrong("a row of NaN is not marked")


def decode_attention(backend: str, device: torch.device, dtype: torch.dtype, dim: int, divisor: int) -> None:
    """A short cache and a long one that is split; what is written, and that nothing behind it is read."""
    for rows, heads, kv_heads, length in ((5, 4, 2, 33), (2, 16, 16, 2049 // divisor + 1)):
        keys, values = _normal(device, 13, 2, rows, kv_heads, length, dim).to(dtype).contiguous().unbind()
        angle = 6 * torch.rand(length, dim // 2, generator=seeds.generator(14), dtype=torch.float32).to(device)
        rope = torch.stack((angle.cos(), angle.sin()), dim=-1) if dim % 2 == 0 else None
        first = torch.arange(rows, dtype=torch.int64, device=device)
        for index in (rows, length - 1):
            qkv = _normal(device, 15 + index, rows, (heads + 2 * kv_heads) * dim).to(dtype)
            ours, exact = ([tensor.clone() for tensor in (keys, values)] for _ in range(2))
            exact = [tensor.double() for tensor in exact]
            for tensor in ours:
                tensor[:, :, index:] = math.nan
            position = torch.full((1,), index, dtype=torch.int64, device=device)
            mixed = ops.decode_attention(qkv, ours[0], ours[1], position, rope=rope, first=first, backend=backend)
            given = (qkv.double(), exact[0], exact[1], position)
            wide = ops.decode_attention(*given, rope=rope, first=first, backend="reference")
            tolerance = TOLERANCE["decode_attention", dtype]
            _close("result", mixed, wide, tolerance * (1 + wide.abs()))
            for one, other in zip(ours, exact, strict=True):
                here = other[:, :, index]
                _close("cache", one[:, :, index], here, tolerance * (1 + here.abs()))
                if not bool(one[:, :, index + 1 :].isnan().all()):
                    raise Wrong("the cache is written to behind the position")


def add_norm(backend: str, device: torch.device, dtype: torch.dtype, dim: int, divisor: int) -> None:
    """LlamaGen's and VAR's, of one position and many."""
    for rows, length, width in ((3, 1, 1024 // divisor), (2, 37, 1920 // divisor), (2, 2, 33)):
        x, branch = _normal(device, 16, 2, rows, length, width).to(dtype).unbind()
        gate, weight, bias = _normal(device, 17, rows, 1, 3, width).to(dtype).unbind(2)
        for given, rms in (
            ({"weight": weight[0, 0]}, True),
            ({"gate": gate, "weight": weight, "bias": bias}, False),
            ({"weight": weight[0, 0], "bias": bias[0, 0]}, False),
        ):
            ours = ops.add_norm(x, branch, **given, eps=1e-5, rms=rms, backend=backend)
            wide = {name: tensor.double() for name, tensor in given.items()}
            exact = ops.add_norm(x.double(), branch.double(), **wide, eps=1e-5, rms=rms, backend="reference")
            for one, other in zip(ours, exact, strict=True):
                _close("result", one, other, TOLERANCE["add_norm on a GPU", dtype] * (1 + other.abs()))


def append_normed(backend: str, device: torch.device, dtype: torch.dtype, dim: int, divisor: int) -> None:
    """One position and many, into the middle of a cache of NaN."""
    for rows, length, heads, start in ((2, 1, 16, 0), (3, 37, 3, 5)):
        qkv = _normal(device, 18, rows, length, 3, heads, dim).to(dtype)
        caches = [torch.full((rows, heads, 45, dim), math.nan, dtype=dtype, device=device) for _ in range(2)]
        wide = [cache.double() for cache in caches]
        scale = (1 + torch.arange(heads, dtype=torch.float32, device=device) / heads).to(dtype)
        ours = ops.append_normed(qkv, caches[0], caches[1], start, scale=scale, backend=backend)
        given = (qkv.double(), wide[0], wide[1], start)
        exact = ops.append_normed(*given, scale=scale.double(), backend="reference")
        for one, other in ((ours, exact), *zip(caches, wide, strict=True)):
            _close("result", one, other, TOLERANCE["append_normed", dtype] * (1 + other.nan_to_num().abs()))


def activate(backend: str, device: torch.device, dtype: torch.dtype, dim: int, divisor: int) -> None:
    """Both kinds, with and without a second factor."""
    for count in (2 * 2816, 1023):
        x, times = 4 * _normal(device, 19, 2, count)
        for kind in ("gelu", "silu"):
            for other in (None, times.to(dtype)):
                ours = ops.activate(x.to(dtype), other, kind=kind, backend=backend)
                second = None if other is None else other.double()
                exact = ops.activate(x.to(dtype).double(), second, kind=kind, backend="reference")
                _close(kind, ours, exact, TOLERANCE["activate on a GPU", dtype] * (1 + exact.abs()))


def norm_linear(backend: str, device: torch.device, dtype: torch.dtype, dim: int, divisor: int) -> None:
    """LlamaGen's and VAR's layers, of one row to eight; a row is the same bits in every batch."""
    for width, outputs, activation in (
        (1024, 3072, "none"),
        (1024, 2816, "swiglu"),
        (2816, 1024, "gelu"),
        (33, 7, "none"),
    ):
        width, outputs = max(width // divisor, 8), max(outputs // divisor, 7)
        matrices = 2 if activation == "swiglu" else 1
        x, branch = _normal(device, 19, 2, 8, 1, width).to(dtype).unbind()
        linear = (_normal(device, 20, matrices * outputs, width) / width**0.5).to(dtype)
        linear_bias = _normal(device, 21, matrices * outputs).to(dtype)
        gate, weight, bias = _normal(device, 22, 8, 1, 3, width).to(dtype).unbind(2)
        fronts: tuple[tuple[Tensor | None, dict[str, Any]], ...] = (
            (branch, {"weight": weight[0, 0], "eps": 1e-5, "rms": True}),
            (branch, {"gate": gate, "weight": weight, "bias": bias, "eps": 1e-6}),
            (None, {"eps": None}),
        )
        for added, given in fronts:
            made: tuple[Tensor, Tensor] | None = None
            for rows in (8, 2, 1):
                own: dict[str, Any] = {
                    n: v[:rows] if isinstance(v, Tensor) and v.dim() > 1 else v for n, v in given.items()
                }
                wide: dict[str, Any] = {n: v.double() if isinstance(v, Tensor) else v for n, v in own.items()}
                front = x[:rows], None if added is None else added[:rows]
                ours = ops.norm_linear(*front, linear, linear_bias, **own, activation=activation, backend=backend)
                long, more = (None if t is None else t.double() for t in front)
                assert long is not None
                exact = ops.norm_linear(
                    long, more, linear.double(), linear_bias.double(), **wide, activation=activation,
                    backend="reference",
                )  # fmt: skip
                for one, other in zip(ours, exact, strict=True):
                    _close("result", one, other, TOLERANCE["norm_linear on a GPU", dtype] * (1 + other.abs()))
                made = made or ours
                # A product of NumPy's, by which Triton is interpreted, depends on how many rows there are.
                if device.type == "cuda" and not torch.equal(ours[1], made[1][:rows]):
                    raise Wrong(f"{rows} of 8 rows are not the same bits alone")


def noise(backend: str, device: torch.device, dtype: torch.dtype, dim: int, divisor: int) -> None:
    """Bit for bit the reference's on the CPU, at counters of 64 bits."""
    index = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**63 - 1, -1], dtype=torch.int64)
    for seed, shape in ((3, (257, 8)), (2**64 - 1, (7,)), (0, (1,))):
        ours = ops.noise(seed, index.to(device), shape, backend=backend).cpu()
        exact = ops.noise(seed, index, shape, backend="reference")
        if not torch.equal(ours, exact):
            raise Wrong(f"seed {seed}: {int((ours != exact).sum())} of {ours.numel()} numbers have other bits")


PROBLEMS: dict[str, Problem] = {
    "nearest_code": nearest_code,
    "filter_logits": filter_logits,
    "codebook_posterior": codebook_posterior,
    "flow_sample": flow_sample,
    "sample_codes": sample_codes,
    "draw_codes": draw_codes,
    "decode_attention": decode_attention,
    "add_norm": add_norm,
    "append_normed": append_normed,
    "activate": activate,
    "norm_linear": norm_linear,
    "noise": noise,
}


def solve(check: Check, device: torch.device, divisor: int = 1) -> None:
    """Run a kernel on its op's problem, twice, on memory that holds NaN from before.

    Raises:
        Wrong: a result is not the reference's.
    """
    problem = PROBLEMS.get(check.op)
    if problem is None:
        raise Wrong("ddfast.ops.checks has no problem for it")
    for _ in range(2):
        for size in (1 << 12, 1 << 20):  # which the results' memory is taken from next
            torch.full((size,), math.nan, dtype=torch.float32, device=device)
        problem(check.backend, device, check.dtype, check.dim, divisor)


LEFT = 3
"""Exit code of a process that leaves a device which has an error in it, or no memory: the next one begins anew."""

_PASSING = (
    "out of memory", "memoryallocation", "alloc_failed", "cannot allocate memory",
    "cublas_status_not_initialized",  # which had no memory for its handle
    "busy or unavailable",  # another process has the GPU for itself
    "no space left", "read-only file system",
)  # fmt: skip
"""What says nothing of a kernel but of the moment, in lower case."""


def _passes(error: Exception) -> bool:
    """Whether the same kernel may well be right another time: no memory, disk, file or C compiler was there for it."""
    kinds = (torch.OutOfMemoryError, MemoryError, OSError, subprocess.SubprocessError)
    return isinstance(error, kinds) or any(sign in str(error).lower() for sign in _PASSING)


def _breaks_the_device(error: Exception) -> bool:
    """Whether it comes from CUDA: what runs next in the same process may fail for the same reason."""
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in ("cuda", "triton error"))


def main(text: str) -> int:
    """Run the checks of `verification._child`; `LEFT` tells that the device cannot be used any more."""
    wanted = json.loads(text)
    device = torch.device("cpu")
    if wanted["index"] is not None:
        device = torch.device("cuda", wanted["index"])
        torch.zeros((), dtype=torch.float32, device=device)

    def tell(**event: object) -> None:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()

    tell(ready=True)
    for number, (op, backend, dtype, dim) in enumerate(wanted["checks"]):
        tell(begins=number)
        before = native.tile_remarks()
        try:
            solve(Check(op, backend, getattr(torch, dtype.removeprefix("torch.")), dim), device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            remarks = [line for line in native.tile_remarks() if line not in before]
            tell(ends=number, **({"remarks": remarks} if remarks else {}))
        except Wrong as wrong:
            tell(ends=number, wrong=str(wrong))
        except Exception as error:  # whatever a kernel's build or launch raises
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            tell(ends=number, **{"unknown" if _passes(error) else "wrong": said})
            if _breaks_the_device(error):
                return LEFT
    return 0

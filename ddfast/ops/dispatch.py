"""Which backend runs an op, and why: what was asked for, what can run, what is proven right here, what was timed here.

On a GPU a kernel runs by itself only after it has given the reference's results on this very GPU (`verification`). The
order in which kernels are tried is that of `KERNELS`, or the one that `ddfast tune` has timed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ddfast import env, messages
from ddfast.ops import findings, native, verification
from ddfast.ops.findings import Check

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

KERNELS: dict[str, tuple[str, ...]] = {
    "nearest_code": ("cpu", "cuda", "triton"),
    "filter_logits": ("cpu", "cuda", "triton"),
    "codebook_posterior": ("cpu", "cuda", "triton"),
    "flow_sample": ("cpu", "cuda", "triton"),
    "sample_codes": ("cpu", "cuda", "triton"),
    "draw_codes": ("cpu", "cuda", "triton"),
    "decode_attention": ("cpu", "triton"),
    "add_norm": ("triton",),
    "norm_linear": ("triton",),
    "append_normed": ("triton",),
    "activate": ("cpu", "triton"),
    "noise": ("cpu", "cuda", "triton"),
}
"""Backends that have a kernel for each op, beside the reference that every op has; those of a GPU in their order."""

GPU_ORDER = {
    "nearest_code": "cuda first: one bf16 product a score and float32 for the few that can win, against three of TF32",
    "filter_logits": "cuda first: 11 bits of a threshold per pass over a row in shared memory, against one",
    "codebook_posterior": "cuda first: 300 instructions per 16 x 32 scores to Triton's 553 (d = 8), 524 to 603 (32)",
    "flow_sample": "cuda first: the codes that are kept stay in registers, against all of them streamed every step",
    "sample_codes": "cuda first: one launch, and the codes that are kept stay in registers",
    "draw_codes": "cuda first: 11 bits of a threshold per pass over a row in shared memory, against one",
    "decode_attention": "one launch, and only what the cache holds is read",
    "add_norm": "one pass, against two to four",
    "norm_linear": "one launch, against up to four; the matrix is read once either way",
    "append_normed": "one pass, against six",
    "activate": "one pass, against two",
    "noise": "cuda first: the compiler of the CPU's code; both are bound by float64",
}
"""Why the GPU's kernels are tried in the order of `KERNELS`: counted in machine code and passes, not timed."""

DEVICE_OF = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}

_CODE_DIM = ("nearest_code", "codebook_posterior", "flow_sample", "sample_codes")
_HEAD_DIM = ("decode_attention", "append_normed")
"""Ops that are compiled for a dimension, of codes or of heads; the others are verified once for all sizes."""


def usual_dim(op: str) -> int:
    """A dimension to ask about an op where no teacher tells: LlamaGen's codes have 8, its heads 64."""
    return 8 if op in _CODE_DIM else 64 if op in _HEAD_DIM else 0


DECIDE_CODES = frozenset({"nearest_code", "filter_logits", "flow_sample", "sample_codes", "draw_codes"})
"""Ops whose backend must not change with the number of rows: a sample's codes would depend on its batch."""


class Choice(NamedTuple):
    """A backend, the reason it was chosen, and what is known of its results on this GPU."""

    backend: str
    reason: str
    verdict: str = ""


class Asked(NamedTuple):
    """Sizes by which a backend is chosen, as in `choose`."""

    rows: int
    dim: int = 0
    size: int = 0


_choices: dict[tuple, Choice] = {}
"""What was decided for GPUs; on a CPU nothing takes long to decide."""


_asked_now: list[tuple[str, torch.dtype, int, int, int]] | None = None
"""Where `observed` wants to know of decisions."""


@contextmanager
def observed() -> Iterator[list[tuple[str, torch.dtype, int, int, int]]]:
    """(op, dtype, rows, dim, size) of what is decided within; what was decided before is forgotten."""
    global _asked_now
    before, _asked_now = _asked_now, []
    forget()
    try:
        yield _asked_now
    finally:
        _asked_now = before


def forget() -> None:
    """Decide everything anew: what was found on this machine, or the environment, has changed."""
    _choices.clear()


def available() -> dict[str, str]:
    """Backends that can run here, with a line that says what they are; a missing one is in `missing()`."""
    states = _states(None).items()
    return {"reference": f"PyTorch {torch.__version__}"} | {name: line for name, (usable, line) in states if usable}


def missing(index: int | None = None) -> dict[str, str]:
    """Backends that cannot run here, on the GPU of this number or the current one, with the reason."""
    return {name: line for name, (usable, line) in _states(index).items() if not usable}


def _states(index: int | None) -> dict[str, tuple[bool, str]]:
    """Of every backend with kernels: whether it can run here, and what it is or why it cannot."""
    cpu = (native.cpu is not None, native.cpu_reason)
    return {"cpu": cpu, "cuda": native.cuda_state(index), "triton": native.triton_state(index)}


def choose(
    op: str,
    device: torch.device | str,
    dtype: torch.dtype,
    backend: str = "auto",
    rows: int = 1,
    *,
    dim: int = 0,
    size: int = 0,
) -> Choice:
    """The backend that runs `op` on tensors of this device and dtype.

    On a GPU the first call for an op, dtype and dimension may take seconds: the kernels are verified then.

    Args:
        op: name of the op, a key of `KERNELS`.
        device: such as "cpu"; "cuda" is the current GPU.
        dtype: of the op's first tensor, or one among its inputs that no kernel reads.
        backend: "auto", or the one that must run.
        rows, size: how many tokens, vectors or samples, and of how many codes, positions or features each: what was
            timed at the nearest sizes decides between kernels.
        dim: of codes or of a head, 0 for ops that have neither, or where it is not known: kernels are compiled for it.

    Raises:
        ValueError: `backend`, or DDFAST_BACKEND, is unknown; or asked for by name, for this op, and cannot run these
            inputs. There is no silent fallback.
    """
    key = (op, device, dtype, backend, rows.bit_length(), dim, size, env.backend_setting())
    choice = _choices.get(key)
    if choice is None:
        where = torch.device(device)
        choice, final = _decide(op, where, dtype, backend, rows, dim or usual_dim(op), size)
        # What decides codes stays the same as long as a process runs, also where it is only for want of memory.
        if where.type == "cuda" and (final or (op in DECIDE_CODES and not _makes_a_graph())):
            _choices[key] = choice
    return choice


def _decide(
    op: str, device: torch.device, dtype: torch.dtype, backend: str, rows: int, dim: int, size: int
) -> tuple[Choice, bool]:
    """The choice, and whether it will be the same next time."""
    if _asked_now is not None:
        _asked_now.append((op, dtype, rows, dim, size))
    preferred, strict = _asked(op, backend)
    if strict:
        return _strict(op, preferred, device, dtype, dim), True
    obstacle_of = {name: _obstacle(op, name, device, dtype, dim) for name in KERNELS[op]}
    interpreted = "triton" if env.triton_interpreted() else ""  # a thousand times slower, and right: by name only
    kernels = [name for name in KERNELS[op] if DEVICE_OF[name] == device.type and name != interpreted]
    reason = f"fastest kernel for {device.type} tensors"
    if device.type == "cuda":
        reason = GPU_ORDER.get(op, "the kernels as they are listed")
        if not all(obstacle_of[name] for name in kernels):
            # The same for all rows that a choice is remembered for, whichever came first.
            timed = findings.order(device, op, dtype, dim, 1 << max(rows.bit_length() - 1, 0), size)
            if timed is not None:
                reason = timed.reason
                kernels = [name for name in timed.order if name == "reference" or name in kernels]
    obstacles, final = [], True
    for candidate in dict.fromkeys((*preferred, *kernels)):
        why = "preferred by DDFAST_BACKEND" if candidate in preferred else reason
        if candidate == "reference":
            return Choice(candidate, why), final
        obstacle = obstacle_of.get(candidate, "this version of ddfast has none for it")
        if obstacle:
            obstacles.append(f"{candidate}: {obstacle}")
            continue
        if device.type != "cuda" or candidate == interpreted:
            return Choice(candidate, why), final
        verdict = _verdict(Check(op, candidate, dtype, dim), device)
        if verdict.passed:
            return Choice(candidate, "; ".join([why, *obstacles]), verdict.text), final
        final &= verdict.final
        obstacles.append(f"{candidate}: {verdict.text}")
    return Choice("reference", "; ".join(obstacles) or f"this version has no kernel for {device.type} tensors"), final


def _asked(op: str, backend: str) -> tuple[tuple[str, ...], bool]:
    """The backends that are asked for, and whether no other may run: a name for all ops is a preference."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return (backend,), True
    overrides = env.backend_overrides()
    for name, wanted in overrides.items():
        if name != "*" and name not in KERNELS:
            raise ValueError(f"DDFAST_BACKEND: got the op {name!r}, expected one of {', '.join(KERNELS)}")
        for item in wanted:
            if item not in BACKENDS:
                raise ValueError(f"DDFAST_BACKEND: got {item!r}, expected one of {', '.join(BACKENDS)}")
    strict = overrides.get(op, ())
    names = tuple(name for name in strict or overrides.get("*", ()) if name != "auto")
    return names, bool(strict) and "auto" not in strict


def _strict(op: str, names: tuple[str, ...], device: torch.device, dtype: torch.dtype, dim: int) -> Choice:
    """The first of the names that can run."""
    obstacles = []
    for name in names:
        obstacle = "" if name == "reference" else _obstacle(op, name, device, dtype, dim)
        if not obstacle:
            return Choice(name, "asked for by name")
        obstacles.append(f"{name!r} cannot run {op}: {obstacle}")
    raise ValueError(f"backend: {'; '.join(obstacles)}; use backend='auto' or 'reference'")


def _obstacle(op: str, backend: str, device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """Why `backend` cannot run, or an empty string."""
    if backend not in KERNELS[op]:
        return f"this version of ddfast has no {backend} kernel for it"
    if device.type != DEVICE_OF[backend] and not (backend == "triton" and env.triton_interpreted()):
        return f"the tensors are on {device.type}, it needs {DEVICE_OF[backend]}"
    if dtype not in native.DTYPE_CODES:
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    if backend == "cuda" and op in _CODE_DIM and native.cuda is not None and dim > native.cuda.max_dim:
        return f"codes have {dim} dimensions, it takes {native.cuda.max_dim} at most"
    obstacle = missing(device.index).get(backend, "")
    here = device.type == "cuda" and not (obstacle or env.triton_interpreted())
    if op == "norm_linear" and here and not native.multiplies_matrices(device.index):
        return "it is made for tensor cores of 8.0 and later, and spills registers without"
    return obstacle


def _verdict(check: Check, device: torch.device) -> findings.Verdict:
    """Of one kernel; those that are likely to be asked for next are verified along with it, in the same process."""
    if not env.verifies():
        return findings.Verdict(True, "not verified (DDFAST_VERIFY=0)")
    if check.op not in GPU_ORDER:
        return findings.Verdict(False, "has no problem in ddfast.ops.checks to be verified by; a name asks for it")
    known = verification.known(check, device)
    if known is not None:
        return known
    if _makes_a_graph():
        text = "not verified on this GPU yet, which cannot be done while a graph is captured or compiled"
        messages.warn_once(f"{check.op}: {check.backend} is {text}; the reference runs. Call the op once before")
        return findings.Verdict(False, text, final=False)
    verification.verify(_along(check, device), device)
    found = verification.known(check, device)
    assert found is not None
    return found


def _makes_a_graph() -> bool:
    """Whether what runs now is captured or compiled."""
    return torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


def _along(check: Check, device: torch.device) -> list[Check]:
    """The check and, of the ops of the same kind of dimension or none, the first kernels that can run."""
    groups = [group for group in (_CODE_DIM, _HEAD_DIM) if check.op in group]
    of_a_dim = {*_CODE_DIM, *_HEAD_DIM}
    checks = [check]
    for op in KERNELS:
        dim = check.dim if any(op in group for group in groups) else 0
        if op == check.op or (op in of_a_dim and not dim):
            continue
        checks += _first(op, check.dtype, dim, device)
    return checks


def _first(op: str, dtype: torch.dtype, dim: int, device: torch.device) -> list[Check]:
    """The check of the kernel that "auto" would try first, if there is one and it has to be verified."""
    preferred, strict = _asked(op, "auto")
    if strict or op not in GPU_ORDER:
        return []
    interpreted = "triton" if env.triton_interpreted() else ""
    for name in dict.fromkeys((*preferred, *KERNELS[op])):
        if name == "reference":
            return []
        if name != interpreted and DEVICE_OF[name] == device.type and not _obstacle(op, name, device, dtype, dim):
            return [Check(op, name, dtype, dim)]
    return []


def is_right(op: str, backend: str, device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether a kernel can run on this device, and gives the reference's results there."""
    if _obstacle(op, backend, device, dtype, dim):
        return False
    return device.type != "cuda" or _verdict(Check(op, backend, dtype, dim), device).passed


def prepare(wanted: Iterable[tuple[str, torch.dtype, int]], device: torch.device) -> None:
    """Verify ahead, in one process, the kernels of (op, dtype, dimension) that "auto" would try first."""
    if device.type != "cuda" or not env.verifies():
        return
    checks = [check for op, dtype, dim in wanted for check in _first(op, dtype, dim or usual_dim(op), device)]
    missing_checks = [check for check in checks if verification.known(check, device) is None]
    if missing_checks:
        verification.verify(missing_checks, device)

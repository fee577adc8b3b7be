"""Which of an op's kernels is the fastest on this GPU: timed on the calls that a piece of work makes.

Every candidate that is right here is replayed as a CUDA graph with a cold L2 cache, the candidates in turn. The order
that `dispatch` has without a measurement stays unless another kernel is faster by `MARGIN`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ddfast import messages, private_api
from ddfast.ops import dispatch, findings

MARGIN = 0.10
"""By which another backend must be faster than the first of `dispatch.KERNELS` to run in its place."""

_ROUNDS = 40
_WAITS = dispatch.DECIDE_CODES | {"codebook_posterior"}
"""Ops whose reference looks at its results on the host: that cannot be captured, and its wait is part of its time."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What two calls must have in common for one of them to say which backend is faster for both."""

    op: str
    dtype: torch.dtype
    dim: int
    rows: int
    size: int

    @property
    def name(self) -> str:
        """As in the file of findings."""
        return f"{self.op} {str(self.dtype).removeprefix('torch.')} {self.dim} {self.rows} {self.size}"


@dataclass(kw_only=True)
class Call:
    """One call of an op as it was recorded: its arguments but for the backend, which is the last."""

    function: Any
    arguments: tuple[Any, ...]
    sizes: Sizes

    def run(self, backend: str) -> Any:
        """Call it again, by a backend; the recorded tensors may be of inference mode, and caches are written to."""
        with torch.inference_mode():
            return self.function(*self.arguments, backend)


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """The calls that ops get from within, by "auto"; the list is filled at the end.

    Of calls with the same sizes the last is kept: at the end of a cache that fills up.
    """
    kept: dict[tuple[str, Sizes], Call] = {}

    def watch(function: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        if function.namespace != "ddfast" or settings or arguments[-1] != "auto":
            return function(*arguments, **settings)
        # Positions and the like are counted on where they are; everything else is only read, or written as before.
        given = [v.clone() if isinstance(v, torch.Tensor) and not v.is_floating_point() else v for v in arguments]
        with dispatch.observed() as asked:
            result = function(*arguments)
        if asked:
            op, dtype, rows, dim, size = asked[0]
            rows = 0 if op in dispatch.DECIDE_CODES else 1 << (max(rows, 1).bit_length() - 1)
            sizes = Sizes(op=op, dtype=dtype, dim=dim, rows=rows, size=size)
            shapes = tuple(tuple(value.shape) for value in arguments if isinstance(value, torch.Tensor))
            kept[f"{function} {shapes}", sizes] = Call(function=function, arguments=tuple(given[:-1]), sizes=sizes)
        return result

    calls: list[Call] = []
    with private_api.every_call(watch):
        yield calls
    calls += kept.values()


def tune(
    calls: Sequence[Call],
    device: torch.device,
    *,
    seconds: float = 20.0,
    timed: Callable[[Call, Sequence[str], torch.device, float], Mapping[str, float]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Time the candidates of all calls and remember the fastest; returns what was found, by sizes.

    Args:
        calls: from `recorded`.
        device: a GPU.
        seconds: of timing, in all; compiling and verifying come before.
        timed: (call, backends, device, seconds) -> milliseconds by backend; None: `milliseconds`.
    """
    timed = timed or milliseconds
    by_sizes: dict[Sizes, list[Call]] = {}
    for call in calls:
        by_sizes.setdefault(call.sizes, []).append(call)
    backends = {sizes: _candidates(sizes, device) for sizes in by_sizes}
    share = seconds / max(1, sum(len(found) for sizes, found in by_sizes.items() if len(backends[sizes]) > 1))
    orders: dict[str, dict[str, Any]] = {}
    for sizes, alike in by_sizes.items():
        names = backends[sizes]
        if len(names) < 2:
            continue
        total = dict.fromkeys(names, 0.0)
        for call in alike:
            found = timed(call, names, device, share)
            total = {name: total[name] + found[name] for name in total if name in found}
        if not total:
            continue
        orders[sizes.name] = _entry(sizes, total)
        with findings.locked():  # what was timed stays, whatever becomes of the rest
            findings.add(device, "orders", {sizes.name: orders[sizes.name]})
    dispatch.forget()
    return orders


def _candidates(sizes: Sizes, device: torch.device) -> list[str]:
    """The kernels that run and are right here, in their order, and the reference."""
    names = []
    for name in dispatch.KERNELS[sizes.op]:
        if dispatch.is_right(sizes.op, name, device, sizes.dtype, sizes.dim):
            names.append(name)
    return [*names, "reference"]


def _entry(sizes: Sizes, total: Mapping[str, float]) -> dict[str, Any]:
    """What the file says of some sizes."""
    first, *_ = total
    order = sorted(total, key=lambda name: total[name])
    reason = f"timed here by `ddfast tune`: {', '.join(f'{name} {1e3 * total[name]:.1f} us' for name in order)}"
    if total[first] <= (1 + MARGIN) * total[order[0]] and order[0] != first:
        order.remove(first)
        order.insert(0, first)
        reason += f"; less than {MARGIN:.0%} apart"
    return {"order": order, "reason": reason, "rows": sizes.rows, "size": sizes.size, "ms": dict(total)}


def milliseconds(call: Call, backends: Sequence[str], device: torch.device, seconds: float) -> dict[str, float]:
    """Medians of device time, the backends in turn, each with an L2 cache that holds none of its inputs."""
    with torch.cuda.device(device):
        replays = {}
        for name in backends:
            try:
                replays[name] = _replay(call, name)
            except RuntimeError as error:  # such as no memory for the reference at these sizes
                messages.warn(f"{call.sizes.op}: {name} is not timed: {' '.join(str(error).split())[:200]}")
        cache = torch.cuda.get_device_properties(device).L2_cache_size or 64 << 20
        flushed = torch.empty(2 * cache, dtype=torch.uint8, device=device)
        times: dict[str, list[float]] = {name: [] for name in replays}
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started = time.perf_counter()
        for turn in range(_ROUNDS):
            for name, replay in replays.items():
                flushed.zero_()
                begin.record()
                replay()
                end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end))
            if turn >= 4 and time.perf_counter() - started > seconds:
                break
    return {name: statistics.median(values) for name, values in times.items()}


def _replay(call: Call, backend: str) -> Callable[[], Any]:
    """The call as a graph, as decoding replays it; as it is where its reference waits for the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles
            call.run(backend)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    if backend == "reference" and call.sizes.op in _WAITS:
        return lambda: call.run(backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run(backend)
    return graph.replay

"""How many samples go through a network at a time, and whether its blocks are computed again: found by trial."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ddfast import private_api, processes
from ddfast.errors import DDFastError, is_out_of_memory
from ddfast.optimizers import Muon
from ddfast.trajectories.memory import free_bytes

ENOUGH = 8
"""Samples at a time from which on blocks are not computed again for the sake of more. That costs a third more work (one
forward pass beside the forward and the backward one of twice its size), whatever the micro-batch. What more samples at
a time save, reading and gathering the weights once for all of them, shrinks with their number: 8 samples are 2,048 to
5,440 tokens, products that keep a GPU busy."""

_SHARES = {"cuda": 0.9, "cpu": 0.5}
"""Of the free memory, what a micro-batch may take. On a GPU the rest is for fragmentation, and for what libraries take
beside PyTorch; on a CPU also for what operations hold inside, which nobody counts, and for what else the machine does.
"""

_MOST_CUT = 8
"""Times by which recomputation cuts what a sample takes, at most: 2 to 5 were measured (docs/scale.md)."""

_WORTH = 8
"""A trial that can gain less than one part in so many is not made."""


class Use(NamedTuple):
    """Of one trial: bytes that it took at its peak beside what was there before, and those that it may take."""

    peak: int
    limit: int


Attempt: TypeAlias = Callable[[int, bool], None]
"""attempt(size, recompute): forward and backward of so many samples, with or without recomputation.

Nothing of it may stay, also where it fails: no gradient, no graph."""

Measure: TypeAlias = Callable[[Callable[[], None]], Use]
"""Makes a trial, and says what it took."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples of a process that go through a network at a time, and whether its blocks are computed again."""

    size: int
    recompute: bool


def choose(
    attempt: Attempt,
    most: int,
    device: torch.device,
    *,
    size: int = 0,
    recompute: str = "auto",
    reserved: int = 0,
    measure: Measure | None = None,
) -> MicroBatch:
    """What the memory free now holds; trials are made only as far as the settings leave something open.

    All processes have to call it together, and get the same: they make the same trials, and the one with the least
    memory decides. Several make only trials that are sure to fit by those before, because one that fails would leave
    the others waiting; one process alone takes back what does not fit.

    Args:
        attempt: as `Attempt`.
        most: samples that a process has in a step.
        device: where memory is measured.
        size: samples at a time that the user asks for; 0: as many as fit.
        recompute: none, blocks, or auto (`needs_recompute`).
        reserved: bytes that a step takes beside a trial (`missing_bytes`).
        measure: of a trial; None: as the device has it.

    Raises:
        DDFastError: memory does not hold one sample; or where several processes run, not what seemed to fit.
    """
    most = min(size or most, most)
    if measure is None:
        measure = _measure_on_gpu(device) if device.type == "cuda" else _measure_on_cpu
    if recompute == "auto" and processes.count() > 1:
        # A trial that fails cannot be taken back: without recomputation only where there is room for it.
        used = _tried(lambda: attempt(1, True), 1, device, measure)
        uses = processes.gather(used)
        if any(use is not None and _MOST_CUT * use.peak > use.limit - reserved for use in uses):
            recompute = "blocks"
    if recompute != "blocks" and not (size and recompute == "none"):
        fits = _largest(lambda samples: attempt(samples, False), most, device, reserved, measure)
        if recompute == "none":
            return MicroBatch(size=_at_least_one(fits, device, "--parallel.recompute blocks"), recompute=False)
        if not needs_recompute(fits, most, size):
            return MicroBatch(size=fits, recompute=False)
    if size:
        return MicroBatch(size=most, recompute=recompute != "none")
    fits = _largest(lambda samples: attempt(samples, True), most, device, reserved, measure)
    return MicroBatch(size=_at_least_one(fits, device, "--parallel.strategy shard"), recompute=True)


def _at_least_one(fits: int, device: torch.device, other: str) -> int:
    if not fits:
        what = f"not enough memory on {device}: a step of one sample at a time does not fit safely"
        raise DDFastError(f"{what}; free some, try {other}, or ask for it all the same by --parallel.micro-batch 1")
    return fits


def needs_recompute(fits: int, most: int, size: int = 0) -> bool:
    """The rule of `--parallel.recompute auto`: blocks where memory holds too few samples at a time without.

    Args:
        fits: samples at a time that memory holds without.
        most: samples that a process has in a step.
        size: samples at a time that the user asks for; 0: as many as fit, and `ENOUGH` are not too few.
    """
    return fits < min(size or ENOUGH, most)


def missing_bytes(networks: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes on this process of the optimizers' moments and the networks' gradients that are not there yet.

    Every parameter that takes a gradient has one, of its own size; AdamW keeps two moments of it, and Muon one.
    """
    unborn = 0
    for optimizer in optimizers:
        moments = 1 if isinstance(optimizer, Muon) else 2
        for group in optimizer.param_groups:
            unborn += sum(moments * _own_bytes(p) for p in group["params"] if p not in optimizer.state)
    parameters = {parameter for network in networks for parameter in network.parameters()}
    return unborn + sum(_own_bytes(p) for p in parameters if p.requires_grad and p.grad is None)


def _own_bytes(parameter: Tensor) -> int:
    return processes.own(parameter).nbytes


def predicted(trials: Sequence[tuple[int, int]], size: int) -> float:
    """Bytes of so many samples, by trials (samples, bytes) of rising size.

    By the line through the last two; no flatter than what samples share, if they share all, lets it be: never below the
    last trial. One trial says that samples share nothing.
    """
    last, taken = trials[-1]
    if len(trials) == 1:
        return size / last * taken
    before, less = trials[-2]
    return taken + (size - last) * max(taken - less, 0) / (last - before)


def next_trial(trials: Sequence[Sequence[tuple[int, int]]], limits: Sequence[int], most: int) -> int:
    """The next number of samples to try, by the trials and the limit of each process: the last one, if that is it.

    At most twice the last; and no trial is made that would gain little.
    """
    last = trials[0][-1][0]
    fits = last
    for size in range(last + 1, min(2 * last, most) + 1):
        if any(predicted(own, size) > limit for own, limit in zip(trials, limits, strict=True)):
            break
        fits = size
    return fits if fits == most or (fits - last) * _WORTH > last else last


def _largest(run: Callable[[int], None], most: int, device: torch.device, reserved: int, measure: Measure) -> int:
    """Samples at a time that memory holds, as tried or as a trial leaves no doubt of; 0: not even one."""
    trials: list[list[tuple[int, int]]] = [[] for _ in range(processes.count())]
    fits, size = 0, 1
    while size > fits:
        used = _tried(lambda samples=size: run(samples), size, device, measure)  # type: ignore[misc]
        uses = [] if used is None else processes.gather(Use(used.peak, used.limit - reserved))
        if not uses or any(use.peak > use.limit for use in uses):  # not as predicted: between the two
            most, size = size - 1, fits + (size - fits) // 2
            if (size - fits) * _WORTH <= fits:
                break
            continue
        fits = size
        for own, use in zip(trials, uses, strict=True):
            own.append((size, use.peak))
        if all(most / size * use.peak <= use.limit for use in uses):  # what samples share makes it less
            return most
        size = next_trial(trials, [use.limit for use in uses], most)
        if size == fits == 1 and processes.count() == 1:  # one trial says nothing of what samples share: try, and see
            size = min(2, most)
    return fits


def _tried(run: Callable[[], None], size: int, device: torch.device, measure: Measure) -> Use | None:
    """What a trial took; None: memory did not suffice, in one process alone."""
    try:
        return measure(run)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if processes.count() > 1:  # the others wait in the middle of theirs
            what = f"{size} samples at a time do not fit in the memory of {device}"
            advice = "a smaller number" if size > 1 else "1, and --parallel.recompute blocks"
            raise DDFastError(f"{what}; give --parallel.micro-batch {advice}") from error
    if device.type == "cuda":  # here the error holds no tensors any more
        torch.cuda.empty_cache()
    return None


def _measure_on_gpu(device: torch.device) -> Measure:
    def measure(run: Callable[[], None]) -> Use:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        peak = torch.cuda.max_memory_allocated(device) - before
        return Use(peak, int(_SHARES["cuda"] * free_bytes(device)))

    return measure


def _measure_on_cpu(run: Callable[[], None]) -> Use:
    return Use(peak_bytes(run), int(_SHARES["cpu"] * free_bytes(torch.device("cpu"))))


def peak_bytes(run: Callable[[], None]) -> int:
    """Bytes of the tensors that a function makes and that live at the same time, at most.

    Counted op by op, forward and backward, on any device; what an op holds inside is not.
    """
    live = LiveBytes()
    with private_api.every_call(live.call):
        run()
    return live.peak


class LiveBytes:
    """Memory of the tensors that ops return, as long as it lives."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def call(self, op: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        """Do an op, and count what it returns and was not there before."""
        for tensor in _tensors((*arguments, *settings.values())):
            self.see(tensor, new=False)
        made = self.do(op, arguments, settings)
        for tensor in _tensors(made):
            self.see(tensor, new=True)
        return made

    def do(self, op: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        """What the op returns."""
        return op(*arguments, **settings)

    def see(self, tensor: Tensor, *, new: bool) -> None:
        """Count a tensor's memory once, if it is new."""
        key = private_api.storage_key(tensor)
        if key in self.known:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes() if new else 0
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_: object) -> None:
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.ref(storage, gone)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors among an op's arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)

"""The processes that torchrun started for one command: what they agree on, and how one that fails ends the others.

One process alone agrees with itself: everything here then does nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ddfast import env
from ddfast.errors import DDFastError

T = TypeVar("T")

_SIGNS_PER_SECOND = 1.0
_LOOKS_PER_SECOND = 10.0


class _Group:
    """This process's place among those that talk to each other."""

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.waits, self.last_sign = 0, 0.0

    def sign(self) -> None:
        """Show the others, and the watchdog, that this process goes on."""
        now = time.monotonic()
        if now - self.last_sign >= 1 / _SIGNS_PER_SECOND:
            self.last_sign = now
            self.store.add(f"signs/{self.rank}", 1)
            self.guard()

    def guard(self) -> None:
        """Let this process show where it stands, and end, when it has not come here again within the limit."""
        faulthandler.dump_traceback_later(self.timeout, exit=True)

    def wait(self) -> None:
        """Until all have come as far, as long as those who have not show signs of life: waiting is none."""
        self.waits += 1
        self.store.add(f"waits/{self.rank}", 1)
        seen = {other: (-1, time.monotonic()) for other in range(self.size) if other != self.rank}
        while behind := [other for other in seen if self.store.add(f"waits/{other}", 0) < self.waits]:
            time.sleep(1 / _LOOKS_PER_SECOND)
            self.guard()
            for other in behind:
                signs, since = seen[other]
                now = self.store.add(f"signs/{other}", 0)
                if now != signs:
                    seen[other] = now, time.monotonic()
                elif time.monotonic() - since > self.timeout:
                    raise DDFastError(
                        f"process {other} of {self.size} has shown no sign of life for {self.timeout:g} s "
                        "(--parallel.timeout): see its own messages above; the last checkpoint is kept"
                    )
        self.sign()


_group: _Group | None = None
_alone: _Group | None = None
"""The group of a process that works alone for a while, the others waiting for it."""

_meetings = 0
"""How often the processes have come together: each time is one of its own in the store that they share."""


@contextlib.contextmanager
def together(device: str, timeout: float) -> Iterator[None]:
    """Within, the processes that torchrun started talk to each other; each takes a GPU of its own.

    A process that makes no step for `timeout` seconds prints where it stands and ends, and so do those that wait for
    it: torchrun then ends them all, and starts them again where it is told to (`--max-restarts`).

    Args:
        device: cpu or cuda.
        timeout: seconds.
    """
    global _group, _meetings
    rank, size = env.rank_and_world_size()
    if size == 1 or _group is not None:
        yield
        return
    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(env.local_rank_and_world_size()[0] % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    limit = datetime.timedelta(seconds=timeout)
    _meetings += 1
    store = dist.PrefixStore(f"meeting/{_meetings}", _store(limit))
    group_store = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=limit)
    _group = _Group(dist.PrefixStore("ddfast", store), rank, size, timeout)
    _group.sign()
    try:
        yield
    finally:
        _group = None
        faulthandler.cancel_dump_traceback_later()
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 speaks and writes."""
    return _group.rank if _group else 0


def count() -> int:
    """How many processes share the work."""
    return _group.size if _group else 1


def sign() -> None:
    """Say that this process goes on: called wherever a stage makes progress."""
    if group := _group or _alone:
        group.sign()


def wait() -> None:
    """Until all processes are here, however long the others take while they make progress."""
    if _group:
        _group.wait()


def first_does(what: Callable[[], T]) -> T:
    """The result of a function that the first process alone calls, which all get; what it raises, all raise.

    Meanwhile the first process is as one alone: what it calls may itself be written for processes that share a work.
    """
    global _group, _alone
    if not _group:
        return what()
    group = _group
    said: list[Any] = [None, None]
    if group.rank == 0:
        _group, _alone = None, group
        try:
            said[0] = what()
        except Exception as error:  # every process shall end by it
            said[1] = error
        finally:
            _group, _alone = group, None
    group.wait()
    dist.broadcast_object_list(said, device=torch.device("cpu"))
    if said[1] is not None:
        raise said[1]
    return said[0]


def gather(value: T) -> list[T]:
    """What every process gives, by rank."""
    if not _group:
        return [value]
    _group.wait()
    values: list[Any] = [None] * _group.size
    dist.all_gather_object(values, value)
    return values


def total(values: Tensor) -> Tensor:
    """The sum over all processes of a tensor on the CPU, in place."""
    if _group:
        dist.all_reduce(values)
    return values


def is_spread(tensor: object) -> bool:
    """Whether the processes hold a part of a tensor each (PyTorch's DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one process would have it; of one that is spread, every process asks at the same point."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: memory of its own, or all of it where it is not spread."""
    return tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor spread as another one is: of what every process has, each keeps its part."""
    if not is_spread(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)  # type: ignore[attr-defined]


def first_said(value: T) -> T:
    """What the first process gives."""
    return first_does(lambda: value)


def first_then_all(what: Callable[[], T]) -> T:
    """The result of a function that the first process calls before the others do: what it keeps on disk, they find.

    What it raises in the first process, all raise.
    """
    made: list[T] = []
    first_does(lambda: made.append(what()))
    if not made:
        made.append(what())
    return made[0]


def share(whole: Sequence[T]) -> Sequence[T]:
    """What this process does of a work that all share: every `count()`th part, from the one of its rank on."""
    return whole[rank() :: count()]


def collected(parts: list[T], *, everywhere: bool = False) -> list[T]:
    """What the processes made of their `share`s, in the order of the whole: at the first one, elsewhere nothing.

    Args:
        parts: this process's, without tensors on a GPU.
        everywhere: at all processes.
    """
    if not _group:
        return parts
    if everywhere:
        shares: list[Any] = gather(parts)
    else:
        shares = [None] * _group.size if _group.rank == 0 else []
        _group.wait()
        dist.gather_object(parts, shares or None)
    return [share[turn] for turn in range(len(shares[0]) if shares else 0) for share in shares if turn < len(share)]


_PATIENCE = 5.0
"""Seconds that a process that ends waits for the first one to say why."""


def last_words(text: str, say: Callable[[str], object]) -> None:
    """Say what ends this process, once where it ends all of them alike.

    The first process speaks. Another one waits for it (if that one ended first, torchrun would end the first before it
    has spoken), and then says only what the first has not said, with its number.

    Args:
        text: the reason.
        say: prints it.
    """
    rank, size = env.rank_and_world_size()
    if rank == 0:
        say(text)
    if size == 1:
        return
    heard = b""
    with contextlib.suppress(RuntimeError, ValueError):  # nobody can be reached
        store, place = _store(datetime.timedelta(seconds=_PATIENCE)), "last words"
        if rank == 0:
            store.set(place, text)
        until = time.monotonic() + _PATIENCE
        while not (there := store.check([place])) and time.monotonic() < until:
            time.sleep(1 / _LOOKS_PER_SECOND)
        heard = store.get(place) if there else b""
    if rank and heard != text.encode():
        say(f"process {rank} of {size}: {text}")


_messages: Any = None


def _store(limit: datetime.timedelta) -> Any:
    """Where torchrun's processes leave each other messages; kept, for the first one's may be its only place.

    Raises:
        RuntimeError, ValueError: it is not reached within the limit, or the environment does not say where it is.
    """
    global _messages
    if _messages is None:
        _messages, _, _ = next(dist.rendezvous("env://", timeout=limit))
    return _messages

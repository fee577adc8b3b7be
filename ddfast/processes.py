"""The processes that torchrun started for one command: what they agree on, and how one that fails ends the others.

One process alone agrees with itself: everything here then does nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import os
import pickle
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ddfast import env, private_api
from ddfast.errors import DDFastError, first_line
from ddfast.interruption import Terminated, deferred, ignore

T = TypeVar("T")

_SIGNS_PER_SECOND = 1.0
_LOOKS_PER_SECOND = 10.0

_GRACE = 1.0
"""Seconds in which those that lose the same process all find out."""

_TERMINATED, _INTERRUPTED, _LOST = "SIGTERM", "Ctrl-C", "lost another process"
"""What a process leaves behind that no error of its own ended."""


class _Lost(RuntimeError):
    """Another process has ended, or is silent."""


class _Group:
    """This process's place among those that talk to each other."""

    def __init__(self, store: Any, rank: int, size: int, timeout: float, option: str, kept: str) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.option, self.kept = f" ({option})" if option else "", f"; {kept}" if kept else ""
        self.waits, self.last_sign = 0, 0.0
        # Who waits in PyTorch for `timeout` shall find out before its own watchdog wakes, and say who is silent.
        self.watch = 1.1 * timeout + 2
        place, local_size = env.local_rank_and_world_size()
        self.here = range(rank - place, rank - place + local_size)
        store.set(f"process/{rank}", str(os.getpid()))

    def sign(self) -> None:
        """Show the others, and the watchdog, that this process goes on."""
        now = time.monotonic()
        if now - self.last_sign >= 1 / _SIGNS_PER_SECOND:
            self.last_sign = now
            self.store.add(f"signs/{self.rank}", 1)
            self.guard()

    def guard(self) -> None:
        """Let this process show where it stands, and end, when it has not come here again within the limit."""
        faulthandler.dump_traceback_later(self.watch, exit=True)

    def wait(self) -> None:
        """Until all have come as far, as long as those who have not show signs of life: waiting is none."""
        self.waits += 1
        self.store.add(f"waits/{self.rank}", 1)
        seen = {other: (-1, time.monotonic()) for other in self.others()}
        while behind := [other for other in seen if self.store.add(f"waits/{other}", 0) < self.waits]:
            time.sleep(1 / _LOOKS_PER_SECOND)
            self.guard()
            for other in behind:
                signs, since = seen[other]
                now = self.store.add(f"signs/{other}", 0)
                gone = self.left(other) or not self.lives(other)
                if gone and self.store.add(f"waits/{other}", 0) < self.waits:  # it had not come before it went
                    raise _Lost
                if now != signs:
                    seen[other] = now, time.monotonic()
                elif time.monotonic() - since > self.timeout:
                    raise _Lost("timed out")
        self.sign()

    def others(self) -> list[int]:
        """All ranks but this one."""
        return [other for other in range(self.size) if other != self.rank]

    def lives(self, other: int) -> bool:
        """Whether another process is there; of another machine's, only its silence tells."""
        place = f"process/{other}"
        if other not in self.here or os.name != "posix" or not self.store.check([place]):
            return True
        try:
            os.kill(int(self.store.get(place)), 0)
        except ProcessLookupError:
            return False
        return True

    def leave(self, error: BaseException) -> None:
        """Tell the others what ends this process."""
        reason = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, KeyboardInterrupt):
            reason = _TERMINATED if isinstance(error, Terminated) else _INTERRUPTED
        with contextlib.suppress(RuntimeError):  # torchrun may be what has ended
            self.store.set(f"left/{self.rank}", _LOST if _of_others(error) else reason)

    def left(self, other: int) -> str:
        """What ended another process, as it said; empty: it has said nothing."""
        place = f"left/{other}"
        return self.store.get(place).decode() if self.store.check([place]) else ""

    def cause(self, error: BaseException) -> BaseException:
        """What ends this process: its own error, or where it lost another one, what ended that."""
        lost = _of_others(error)
        if not lost:
            return error
        silent = "timed out" in str(lost).lower()
        # One that is silent shall have shown where it stands before those who wait for it end, and torchrun ends it.
        until = time.monotonic() + _GRACE + (self.watch - self.timeout if silent else 0)
        try:
            reasons = {other: self.left(other) for other in self.others()}
            while not all(reasons.values()) and time.monotonic() < until:
                time.sleep(1 / _LOOKS_PER_SECOND)
                self.guard()
                reasons = {other: self.left(other) for other in self.others()}
        except RuntimeError:
            return DDFastError(f"what started the processes (torchrun) does not answer{self.kept}")
        causes = {other: reason for other, reason in reasons.items() if reason != _LOST}
        if _TERMINATED in causes.values():
            return Terminated()
        if _INTERRUPTED in causes.values():
            return KeyboardInterrupt()
        for other, reason in sorted(causes.items(), key=lambda cause: not cause[1]):
            how = f"has ended: {reason}"
            if not reason:
                how = "has been ended (killed, perhaps for want of memory)"
                if silent:
                    how = f"has shown no sign of life for {self.timeout:g} s{self.option}"
            return DDFastError(f"process {other} of {self.size} {how}; see its own messages{self.kept}")
        return error


_group: _Group | None = None
_alone: _Group | None = None
"""The group of a process that works alone for a while, the others waiting for it."""

_meetings = 0
"""How often the processes have come together: each time is one of its own in the store that they share."""


@contextlib.contextmanager
def together(device: str, timeout: float, *, option: str = "", kept: str = "") -> Iterator[None]:
    """Within, the processes that torchrun started talk to each other; each takes a GPU of its own.

    A process that makes no step for `timeout` seconds (and a tenth, and 2) prints where it stands and ends. Those that
    wait for it, or for one that has ended, end as well and say which it is: torchrun then ends what is left, and starts
    all again where it is told to (`--max-restarts`).

    Args:
        device: cpu or cuda.
        timeout: seconds.
        option: the command's, that sets the timeout; empty: it has none.
        kept: what is left of the work when a process ends, as an error's last words; empty: nothing.

    Raises:
        DDFastError: there are not enough GPUs, or the device is a certain one; another process has ended, or is silent.
        KeyboardInterrupt: another process was interrupted, or got SIGTERM (`ddfast.interruption.Terminated`).
    """
    global _group, _meetings
    rank, size = env.rank_and_world_size()
    if size == 1 or _group is not None:
        yield
        return
    backend = "gloo"
    if device.startswith("cuda"):
        _take_gpu(device)
        backend = "cpu:gloo,cuda:nccl"
    limit = datetime.timedelta(seconds=timeout)
    _meetings += 1
    try:
        store = dist.PrefixStore(f"meeting/{_meetings}", _store(limit))
    except (ValueError, RuntimeError) as error:  # a variable of torchrun's is missing, or nobody answers there
        raise DDFastError(
            f"{size} processes (WORLD_SIZE) do not find each other: {first_line(error)}; start them by torchrun"
        ) from error
    group_store = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=limit)
    _group = group = _Group(dist.PrefixStore("ddfast", store), rank, size, timeout, option, kept)
    group.sign()

    try:
        _check_devices(device)
        yield
        _group = None
        group.guard()
        gc.collect()  # networks that were spread hold groups of their own
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
    except BaseException as error:
        with deferred():  # torchrun's SIGTERM, as one of them has ended: it shall not take the place of the cause
            group.leave(error)
            _group = None
            _abort()
            cause = group.cause(error)
            # What is left of the talk may hang at the process's end.
            faulthandler.dump_traceback_later(_PATIENCE + _LAST_SECONDS, exit=True)
            if cause is error:
                raise
            raise cause from error


_LAST_SECONDS = 30.0
"""Of a process that ends, to say why and to go."""


def _abort() -> None:
    """End the talk, so that those who wait for this process do no longer; NCCL may itself wait for others there."""
    aborting = threading.Thread(target=private_api.abort_groups, daemon=True)
    aborting.start()
    aborting.join(_PATIENCE)


def _check_devices(device: str) -> None:
    """Raise where processes share a GPU, on which NCCL would fail later."""
    if not device.startswith("cuda"):
        return
    mine = platform.node(), str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    sharers = gather(mine).count(mine)
    if sharers > 1:
        raise DDFastError(f"{sharers} processes share a GPU of {mine[0]}: start as many per machine as it has GPUs")


def _take_gpu(device: str) -> None:
    """Make the GPU of this process's number on the machine its own: NCCL refuses one that another has."""
    if torch.device(device).index is not None:
        raise DDFastError(f"--device {device}: of several processes each takes a GPU of its own: --device cuda")
    (local, processes), gpus = env.local_rank_and_world_size(), torch.cuda.device_count()
    if 1 < gpus < processes:  # one: each may see no other than its own
        raise DDFastError(
            f"{processes} processes (LOCAL_WORLD_SIZE) and {gpus} GPUs on this machine: "
            f"start at most {gpus} per machine"
        )
    torch.cuda.set_device(local if gpus > 1 else 0)


def _of_others(error: BaseException) -> BaseException | None:
    """What in an error's causes says that the talk with others broke off, if anything does."""
    cause: BaseException | None = error
    while cause and not (
        isinstance(cause, (_Lost, dist.DistError)) or (isinstance(cause, RuntimeError) and "gloo" in str(cause))
    ):
        cause = cause.__cause__ or cause.__context__
    return cause


def limit_waits(groups: Iterable[Any]) -> None:
    """Let groups of processes (PyTorch's) wait for each other as long as all do: they begin with half an hour."""
    if _group:
        for group in groups:
            private_api.set_timeout(group, datetime.timedelta(seconds=_group.timeout))


def per_node() -> int:
    """How many processes a node has; all of them, where nodes have several sizes or one process each."""
    sizes = set(gather(env.local_rank_and_world_size()[1]))
    size = sizes.pop()
    return size if not sizes and size > 1 else count()


def meeting() -> int:
    """A number of this coming together."""
    return _meetings


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Within, this process signs by itself: for one long call, of a disk say, that cannot."""
    if not (_group or _alone):
        yield
        return
    done = threading.Event()

    def signing() -> None:
        while not done.wait(1 / _SIGNS_PER_SECOND):
            sign()

    signer = threading.Thread(target=signing, daemon=True)
    signer.start()
    try:
        yield
    finally:
        done.set()
        signer.join()


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
        # Ctrl-C and SIGTERM are no such end: this process leaves at once, and the others find out.
        finally:
            _group, _alone = group, None
    group.wait()
    own = said[1]
    dist.broadcast_object_list([None, _portable(own)] if own else said, device=torch.device("cpu"))
    if own or said[1]:
        raise own or said[1]
    return said[0]


def _portable(error: Exception) -> Exception:
    """An error as other processes can have it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


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


def share(parts: Sequence[T]) -> Sequence[T]:
    """What this process does of a work that all share: every `count()`th part, from the one of its rank on."""
    return parts[rank() :: count()]


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
    turns = range(len(shares[0]) if shares else 0)
    return [one[turn] for turn in turns for one in shares if turn < len(one)]


_PATIENCE = 5.0
"""Seconds that a process that ends waits for the first one to say why."""


def last_words(text: str, say: Callable[[str], object], *, interrupted: bool = False) -> None:
    """Say what ends this process, once where it ends all of them alike.

    The first process speaks. Another one waits for it (if that one ended first, torchrun would end the first before it
    has spoken), and then says only what the first has not said, with its number.

    Args:
        text: the reason.
        say: prints it.
        interrupted: it is no fault, and ends all: the others need not speak.
    """
    rank, size = env.rank_and_world_size()
    if size > 1:
        ignore()  # the SIGTERM that torchrun sends to all as soon as one has ended
    if rank == 0:
        say(text)
    if size == 1 or interrupted:
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


def record(error: Exception) -> None:
    """Give an error to torchrun, whose table of what failed then shows it."""
    if env.rank_and_world_size()[1] > 1:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


_messages: Any = None


def _store(limit: datetime.timedelta) -> Any:
    """Where torchrun's processes leave each other messages; kept, for the first one's may be its only place.

    Raises:
        RuntimeError, ValueError: it is not reached within the limit, or the environment does not say where it is.
    """
    global _messages
    if _messages is None:
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        # torchrun's store is the same after a restart: what processes that are gone have left there shall not be found.
        _messages = dist.PrefixStore(f"attempt/{env.restarts()}", store)
    return _messages

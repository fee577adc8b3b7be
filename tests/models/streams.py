"""What stands for a GPU's graphs, streams and events where there is none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """What a CUDA graph does: the same operations on the same memory, nothing that Python did in between."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


Clock = dict["Stream", int]
"""How far every stream has come, as far as one knows."""


def learn(clock: Clock, other: Clock) -> None:
    for stream, step in other.items():
        clock[stream] = max(step, clock.get(stream, 0))


class Stream:
    """Work in order. What it knows of other streams, it knows from events."""

    def __init__(self, _: torch.device | None = None) -> None:
        self.clock: Clock = {}

    def wait_event(self, event: Event) -> None:
        event.device.log.append("wait")
        learn(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        learn(self.clock, other.clock)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.clock = device, {}

    def record(self, stream: Stream) -> None:
        self.device.log.append("record")
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        self.device.log.append("synchronize")
        self.device.forget(self.clock)


class Graph:
    def __init__(self, device: Device) -> None:
        self.recorder, self.device = Recorder(), device

    def replay(self) -> None:
        self.device.log.append("replay")
        self.recorder.replay()


class Device(TorchDispatchMode):
    """Sees every operation of the threads that enter it, and two of them that touch `watched` memory without an order.

    Attributes:
        log: waits and records of events, replays, and operations on watched memory, in the order of their launches.
        races: operations that nothing orders behind what another stream did to the same memory.
        kept: memory and stream of every `Tensor.record_stream`.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.log: list[str] = []
        self.races: list[str] = []
        self.kept: list[tuple[int, Stream]] = []
        self.watched: dict[int, tuple[Stream, int] | None] = {}
        self.own = threading.local()
        self.captures, self.capturing = 0, threading.Lock()
        for name, value in {
            "Stream": Stream, "Event": lambda: Event(self), "CUDAGraph": lambda: Graph(self), "graph": self.capture,
            "graph_pool_handle": lambda: (0, 0), "current_stream": lambda _=None: self.stream, "stream": self.on,
            "device": lambda _: contextlib.nullcontext(),
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        kept = self.kept
        patch.setattr(torch.Tensor, "record_stream", lambda given, stream: kept.append((memory(given), stream)))

    @property
    def stream(self) -> Stream:
        """The thread's current one."""
        return self.own.stream

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before = getattr(self.own, "stream", None)
        self.own.stream = stream
        with self:
            yield
        if before is None:
            del self.own.stream
        else:
            self.own.stream = before

    @contextlib.contextmanager
    def capture(self, graph: Graph, *, stream: Stream, **_: Any) -> Iterator[None]:
        """What is captured is not run: here it is, to record it, but touches nothing."""
        assert self.capturing.acquire(blocking=False), "two captures at a time"
        self.captures += 1
        self.own.captures = True
        with graph.recorder:
            yield
        self.own.captures = False
        self.capturing.release()

    def watch(self, tensors: list[torch.Tensor]) -> None:
        """Watch their memory from now on, where a thread is on a stream of this device."""
        if hasattr(self.own, "stream"):
            self.watched |= dict.fromkeys(memory(tensor) for tensor in tensors if tensor.numel())

    def forget(self, clock: Clock) -> None:
        """Watch no longer what nobody is at who has not come further: it may be freed, and given to anybody."""
        for key, last in list(self.watched.items()):
            if last is not None and clock.get(last[0], 0) >= last[1]:
                del self.watched[key]

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not getattr(self.own, "captures", False) and hasattr(self.own, "stream") and not func.is_view:
            stream = self.stream
            stream.clock[stream] = step = stream.clock.get(stream, 0) + 1
            touched = {memory(one) for one in tree_leaves((args, kwargs, out)) if isinstance(one, torch.Tensor)}
            for key in touched & self.watched.keys():
                name = func.overloadpacket.__name__
                self.log.append(name)
                last = self.watched[key]
                if last is not None and stream.clock.get(last[0], 0) < last[1]:
                    self.races.append(name)
                self.watched[key] = (stream, step)
        return out


def memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

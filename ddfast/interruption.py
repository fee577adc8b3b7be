"""Ctrl-C and SIGTERM: at once where nothing is lost, at a point of its choosing where training would lose work."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 75
"""Of a command that SIGTERM ended, such as a scheduler's that takes the machine back: what is done is saved, the same
command goes on (EX_TEMPFAIL of sysexits.h)."""

_IMPATIENT_SECONDS = 2.0
"""Between two Ctrl-C of a person; torchrun passes on at once what the terminal has sent already."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


class Wishes:
    """Signals that have come and wait to be answered."""

    def __init__(self) -> None:
        self.interrupted = self.terminated = False
        self._first = 0.0

    def take(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler; a second Ctrl-C is answered at once, and what came after the last checkpoint is lost."""
        if number == signal.SIGTERM:
            self.terminated = True
        elif not self.interrupted:
            self.interrupted, self._first = True, time.monotonic()
        elif time.monotonic() - self._first > _IMPATIENT_SECONDS:
            raise KeyboardInterrupt

    def answer(self) -> KeyboardInterrupt | None:
        """What to raise, if anything."""
        global _asked
        if self.terminated or self.interrupted:
            _asked = time.monotonic()
        if self.terminated:
            return Terminated()
        return KeyboardInterrupt() if self.interrupted else None


_asked = -math.inf
"""When this process was last asked to end, and answered."""


def _raise(number: int, frame: FrameType | None) -> None:
    global _asked
    now = time.monotonic()
    if now - _asked > _IMPATIENT_SECONDS:
        _asked = now
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Within, SIGTERM raises `Terminated`, and Ctrl-C KeyboardInterrupt: in the main thread of a command.

    Each of several processes gets both twice, from the terminal or the scheduler and from torchrun: once is enough.
    """
    global _asked
    _asked = -math.inf
    if not _in_main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN or number == signal.SIGTERM:  # as a shell's script starts what runs beside it
            signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items() if not _ends else ():
            signal.signal(number, handler)


_ends = False
"""This process ends: what was before comes no more."""


def ignore() -> None:
    """Let neither come any more: this process ends."""
    global _ends
    if _in_main_thread():
        _ends = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def deferred() -> Iterator[Wishes]:
    """Within, Ctrl-C and SIGTERM are noted; what the body did not answer is raised after it.

    In another thread than the main one they never come.
    """
    wishes = Wishes()
    if not _in_main_thread():
        yield wishes
        return
    before = {number: signal.signal(number, wishes.take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wishes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    answer = wishes.answer()
    if answer:
        raise answer


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

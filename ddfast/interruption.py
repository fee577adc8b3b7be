"""Ctrl-C and SIGTERM: at once where nothing is lost, at a point of its choosing where training would lose work."""

from __future__ import annotations

import contextlib
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
        if self.terminated:
            return Terminated()
        return KeyboardInterrupt() if self.interrupted else None


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated


def answer_termination() -> None:
    """Let SIGTERM raise `Terminated`: in the main thread of a command."""
    if _in_main_thread():
        signal.signal(signal.SIGTERM, _raise)


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

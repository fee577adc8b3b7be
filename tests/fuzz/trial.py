"""One case: bytes as a file, a loader on it, and what must be so then, within bounds of time, memory and place."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from targets import Target

from ddfast.errors import DDFastError

SECONDS = 10.0
"""That a case may take; it takes milliseconds."""

MEMORY = 2**30
"""Bytes that the process may take beside what it has; files have some thousand bytes."""

LONGEST = 20_000
"""Letters of a message."""


class Finding(AssertionError):
    """A loader that did something else than to read or to refuse."""


class _TooLong(BaseException):
    """No error that anybody would catch."""


_watched: list[Path] = []
"""The folder that a loader may open files in, while one is at work."""

_outside: list[str] = []

_STARTS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        python = path.startswith(
            (*filter(None, sys.path), sys.prefix, sys.base_prefix, "/proc/", "/dev/", "/sys/")
        ) or path.endswith((".py", ".pyc"))
        if not f"{path}{os.sep}".startswith(f"{_watched[-1]}{os.sep}") and (writes or not python):
            _outside.append(f"opened {path}")
    elif event.startswith(_STARTS):
        _outside.append(f"{event} {arguments}"[:200])


_audited = False


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Within, what is opened outside a folder, or started, goes to the list."""
    global _audited
    if not _audited:  # such a hook stays
        sys.addaudithook(_audit)
        _audited = True
    _outside.clear()
    _watched.append(Path(os.path.abspath(folder)))
    try:
        yield _outside
    finally:
        _watched.pop()


@contextlib.contextmanager
def within(seconds: float = SECONDS) -> Iterator[None]:
    """The body, ended when it takes longer."""

    def end(number: int, frame: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TooLong:
        raise Finding(f"takes longer than {seconds} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def little_memory(more: int = MEMORY) -> Iterator[None]:
    """The body in the memory that this process has, and so many bytes."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def one_line(error: DDFastError) -> None:
    """Raise unless an error is one line of letters that a terminal shows."""
    text = str(error)
    if not text.isprintable() or not text or len(text) > LONGEST:
        raise Finding(f"a message of {len(text.splitlines())} lines, {len(text)} letters: {text[:300]!r}")
    if "allocate memory" in text or "bad_alloc" in text:
        raise Finding(f"asked for the memory that a file claims: {text}")


def refused(target: Target, folder: Path, data: bytes) -> str:
    """Let a target read bytes; returns the message with which it refused them, or nothing.

    Raises:
        Finding: it did something else.
    """
    path = folder / target.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    with watched(folder) as outside, warnings.catch_warnings():
        nowhere = io.StringIO()
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), within():
            try:
                target.read(path)
                said = ""
            except DDFastError as error:
                one_line(error)
                said = str(error)
            except Finding:
                raise
            except Exception as error:
                raise Finding(f"{type(error).__name__}: {str(error)[:300]}") from error
    if outside:
        raise Finding("; ".join(outside[:3]))
    return said

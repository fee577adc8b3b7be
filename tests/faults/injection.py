"""Functions run in processes in which, from a chosen event on, the file system fails or a signal comes.

The faults come from outside (injector.c, preloaded): what fails is whatever the program, or a library below it, asks of
the system. The processes are forked from one that has loaded PyTorch.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("injector.c")

WRITE, CREATE, SYNC, RENAME, REMOVE, MEMORY, CLOCK = 1, 2, 4, 8, 16, 32, 64
"""Kinds of events, as injector.c has them."""

_ALL = WRITE | CREATE | SYNC | RENAME | REMOVE
_FOREVER = 2**62


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong.

    Attributes:
        name: as the table has it.
        what: 1 killed, 2 a signal, 3 an error, 4 a short write, 5 a clock set back by a day.
        kinds: of events that count.
        detail: the signal's number, or the errno.
        lasts: to the end; else it is one event.
        harmless: nothing may come of it.
    """

    name: str
    what: int
    kinds: int
    detail: int = 0
    lasts: bool = False
    harmless: bool = False


FAULTS = {
    fault.name: fault
    for fault in (
        Fault(name="SIGKILL", what=1, kinds=_ALL),
        Fault(name="SIGTERM", what=2, kinds=_ALL, detail=signal.SIGTERM),
        Fault(name="Ctrl-C", what=2, kinds=_ALL, detail=signal.SIGINT),
        Fault(name="disk full", what=3, kinds=WRITE | CREATE, detail=errno.ENOSPC, lasts=True),
        Fault(name="disk full for a moment", what=3, kinds=WRITE, detail=errno.ENOSPC),
        Fault(name="read-only", what=3, kinds=CREATE | RENAME | REMOVE, detail=errno.EROFS, lasts=True),
        Fault(name="short write", what=4, kinds=WRITE, lasts=True, harmless=True),
        Fault(name="failed fsync", what=3, kinds=SYNC, detail=errno.EIO),
        Fault(name="failed rename", what=3, kinds=RENAME, detail=errno.EIO),
        Fault(name="failed removal", what=3, kinds=REMOVE, detail=errno.EIO),
        Fault(name="out of memory", what=3, kinds=MEMORY, detail=errno.ENOMEM),
        Fault(name="clock set back", what=5, kinds=CLOCK, lasts=True, harmless=True),
    )
}
"""By their names."""

FULL_TEMPORARY = Fault(name="full /tmp", what=3, kinds=_ALL, detail=errno.ENOSPC, lasts=True)
"""For a process's own folder of temporary files."""

NOTHING = Fault(name="nothing", what=0, kinds=_ALL)


@dataclass(frozen=True)
class Ended:
    """Exit code (negative: a signal's number), what was written, and how many events there were."""

    code: int
    out: str
    errors: str
    events: int


class Server:
    """Forks processes; `run` one after the other."""

    def __init__(self, folder: Path) -> None:
        library = folder / "injector.so"
        compiler = shutil.which("cc") or shutil.which("gcc")
        assert compiler
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
        environment = {
            **os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(library)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(
        self, function: str, *arguments: object, below: Path | None = None, fault: Fault = NOTHING, at: int = 0,
        limit: float = 120,
    ) -> Ended:  # fmt: skip
        """Run a function with a fault.

        Args:
            function: "module:name"; what it returns is the exit code.
            arguments: as strings.
            below: folder whose files' events count; None: the one of the process's temporary files.
            fault: what goes wrong.
            at: at which of its events, from 0.
            limit: seconds after which it is killed.
        """
        assert self.process.stdin and self.process.stdout
        last = _FOREVER if fault.lasts else at
        with tempfile.TemporaryDirectory() as place:
            temporary = Path(place, "tmp")
            temporary.mkdir()
            choice = [str((below or temporary).resolve()), fault.what, fault.kinds, fault.detail, at, last]
            request = {"function": function, "arguments": [*map(str, arguments)], "inject": choice, "place": place}
            self.process.stdin.write(json.dumps({**request, "limit": limit}) + "\n")
            self.process.stdin.flush()
            code = int(self.process.stdout.readline())
            out, errors = (Path(place, name).read_text(errors="replace") for name in ("out", "errors"))
            events = Path(place, "events")
            return Ended(code, out, errors, int(events.read_text()) if events.exists() else -1)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    """A server, with its library in a folder."""
    running = Server(folder)
    try:
        yield running
    finally:
        running.close()


def _serve(library: str) -> None:
    import ctypes

    for name in ("pytest", "ddfast.train", "ddfast.sample", "ddfast.evaluate", "ddfast.convert", "ddfast.hub"):
        importlib.import_module(name)
    injector = ctypes.CDLL(library)
    injector.inject.argtypes = [ctypes.c_char_p, *[ctypes.c_int] * 3, *[ctypes.c_long] * 2]
    injector.events.restype = ctypes.c_long
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _run(request, injector)
        print(_waited(child, request["limit"]), file=answers, flush=True)


def _waited(child: int, limit: float) -> int:
    until = time.monotonic() + limit
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 1000
        time.sleep(0.005)


def _run(request: dict[str, Any], injector: Any) -> None:
    place, code = Path(request["place"]), 99
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for descriptor, name in ((1, "out"), (2, "errors")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ["TMPDIR"] = tempfile.tempdir = str(place / "tmp")
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    try:
        module, _, name = request["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        where, *choice = request["inject"]
        injector.inject(where.encode(), *choice)
        try:
            code = int(function(*request["arguments"]) or 0)
        except SystemExit as stop:
            code = int(stop.code or 0)
        count = injector.events()
        injector.inject(b"", 0, 0, 0, 0, 0)
        (place / "events").write_text(str(count))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])

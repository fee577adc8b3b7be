"""Processes as torchrun starts them, from functions of the tests.

They are forked from one process that has loaded PyTorch, which takes a hundredth of what torchrun takes to start them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

if "tests" not in sys.modules:
    # Functions travel by their modules' names, and a library (torch-fidelity) has installed a `tests` of its own.
    sys.modules["tests"] = types.ModuleType("tests")
    sys.modules["tests"].__path__ = [str(Path(__file__).parent)]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pytest", "torch.distributed", "ddfast.sample", "ddfast.evaluate", "ddfast.train"])


@dataclass(frozen=True)
class Ended:
    """How a process ended: what the function returned, the exit code (negative: a signal's number), what it wrote."""

    value: Any
    code: int
    out: str
    errors: str
    seconds: float


class Launched:
    """Processes that run; `ended` waits for them."""

    def __init__(self, count: int, function: Callable[..., Any], arguments: tuple[Any, ...], **variables: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        # As torchrun's agent: the store is here, so that it outlives each of them, on a port that is free.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.started = time.monotonic()
        self.processes = []
        for rank in range(count):
            own = {
                "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "OMP_NUM_THREADS": "1",
                "TORCHELASTIC_USE_AGENT_STORE": "True", **variables,
            }  # fmt: skip
            place = str(Path(self.folder.name) / str(rank))
            self.processes.append(_CONTEXT.Process(target=_run, args=(place, own, function, arguments), daemon=True))
            self.processes[-1].start()

    def ended(self, *, limit: float = 120.0, together: bool = False) -> list[Ended]:
        """All of them, by rank.

        Args:
            limit: seconds after which those that go on are killed.
            together: the first that fails ends the others, as by torchrun.
        """
        ends, told = [0.0] * len(self.processes), False
        while not all(ends) and time.monotonic() - self.started < limit:
            time.sleep(0.02)
            for rank, process in enumerate(self.processes):
                if not ends[rank] and process.exitcode is not None:
                    ends[rank] = time.monotonic() - self.started
            if together and not told and any(process.exitcode for process in self.processes):
                told = True
                for process in self.processes:
                    process.terminate()
        for process in self.processes:
            process.kill()
            process.join()
        results = [self._result(rank, end or limit) for rank, end in enumerate(ends)]
        self.folder.cleanup()
        return results

    def _result(self, rank: int, seconds: float) -> Ended:
        place, code = Path(self.folder.name) / str(rank), self.processes[rank].exitcode
        value = pickle.loads(place.with_suffix(".value").read_bytes()) if place.with_suffix(".value").exists() else None
        out, errors = (
            path.read_text() if path.exists() else ""
            for path in (place.with_suffix(".out"), place.with_suffix(".errors"))
        )
        return Ended(value, code if code is not None else -9, out, errors, seconds)


@contextlib.contextmanager
def launched(count: int, function: Callable[..., Any], *arguments: Any, **variables: str) -> Iterator[Launched]:
    """`function(*arguments)` in `count` processes, with environment variables of torchrun's and these; ended after it.

    Args:
        count: of processes, on this machine.
        function: at the top of a module that can be imported.
        arguments: and what it returns, are pickled.
        variables: of the environment.
    """
    running = Launched(count, function, arguments, **variables)
    try:
        yield running
    finally:
        for process in running.processes:
            process.kill()


def launch(count: int, function: Callable[..., Any], *arguments: Any, **variables: str) -> list[Any]:
    """What `function(*arguments)` returns in each of `count` processes; fails unless all of them end well."""
    with launched(count, function, *arguments, **variables) as running:
        ended = running.ended()
    assert all(end.code == 0 for end in ended), "\n".join(f"{end.code}: {end.errors}" for end in ended)
    return [end.value for end in ended]


def _run(place: str, variables: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    for descriptor, suffix in ((1, ".out"), (2, ".errors")):
        file = os.open(place + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    value = function(*arguments)
    Path(place + ".value").write_bytes(pickle.dumps(value))

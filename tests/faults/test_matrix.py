"""Whatever ddfast writes, faults of the file system and signals come while it does, at random places (by a seed).

After each: no name stands for half a file, what ended it is one line that says what to do, and the same command leads
to what an undisturbed one makes.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import injection
import pytest
from injection import FAULTS, Fault, Server
from operations import OPERATIONS, Operation, result

PLACES = 2
"""Of each fault in each operation; the first one of every third cell is in `make test`."""

CODES = {"SIGKILL": -9, "SIGTERM": 75, "Ctrl-C": 130}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("needs a C compiler")
    with injection.server(tmp_path_factory.mktemp("injector")) as running:
        yield running


@pytest.fixture(scope="module")
def base(server, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    ended = server.run("operations:prepare", folder, below=folder)
    assert ended.code == 0, ended.errors
    return folder


class Undisturbed:
    """Results of operations, and how many events each has; made when first asked for."""

    def __init__(self, server: Server, base: Path, root: Path) -> None:
        self.server, self.base, self.root = server, base, root
        self.results: dict[str, dict[str, str]] = {}
        self.events: dict[tuple[str, int], int] = {}

    def of(self, operation: Operation) -> dict[str, str]:
        if operation.function not in self.results:
            work = start(operation, self.base, self.root / operation.function)
            ended = run(self.server, operation, self.base, work)
            assert ended.code == 0, ended.errors
            self.results[operation.function] = result(work)
        return self.results[operation.function]

    def count(self, operation: Operation, kinds: int) -> int:
        """Events of some kinds."""
        key = operation.function, kinds
        if key not in self.events:
            fault = Fault(name="counted", what=0, kinds=kinds)
            work = start(operation, self.base, self.root / f"{operation.function}-{kinds}")
            self.events[key] = run(self.server, operation, self.base, work, fault).events
        return self.events[key]


@pytest.fixture(scope="module")
def undisturbed(server, base, tmp_path_factory) -> Undisturbed:
    return Undisturbed(server, base, tmp_path_factory.mktemp("undisturbed"))


def start(operation: Operation, base: Path, work: Path) -> Path:
    """A folder with what is there before the operation."""
    work.mkdir(parents=True)
    for source, name in operation.start.items():
        shutil.copytree(base / source, work / name)
    return work


def run(server: Server, operation: Operation, base: Path, work: Path, fault: Fault = injection.NOTHING, at: int = 0):
    return server.run(f"operations:{operation.function}", base, work, below=work, fault=fault, at=at)


def cells() -> list:
    found, number = [], 0
    for operation in OPERATIONS.values():
        for fault in FAULTS.values():
            for place in range(PLACES):
                mark = () if place == 0 and number % 3 == 0 else pytest.mark.full
                name = f"{operation.function}-{fault.name}-{place}"
                found.append(pytest.param(operation, fault, place, id=name, marks=mark))
            number += 1
    return found


@pytest.mark.parametrize(("operation", "fault", "place"), cells())
def test_nothing_is_lost(server, base, undisturbed, tmp_path, operation, fault, place):
    whole = undisturbed.of(operation)
    events = undisturbed.count(operation, fault.kinds)
    if not events:
        pytest.skip("the operation has no such event")
    at = random.Random(f"{operation.function} {fault.name} {place}").randrange(events)
    work = start(operation, base, tmp_path / "work")
    ended = run(server, operation, base, work, fault, at)
    where = f"{fault.name} at event {at} of {events}: {ended}"

    assert ended.code in {0, 1, CODES.get(fault.name, 1)}, where
    assert "Traceback" not in ended.errors, where
    if ended.code == 1:
        assert [line.startswith(("ddfast", "warning")) for line in ended.errors.splitlines()].count(True) >= 1, where
        assert ended.errors.count("error:") == 1, where
    found = result(work)
    if fault.name == "failed removal":  # then something is left that nobody reads
        found = {name: digest for name, digest in found.items() if "/checkpoints/" not in name}
    if ended.code == 0:
        assert found == whole, where
        return
    halves = [name for name, digest in found.items() if half(name, digest, whole, operation)]
    assert not halves, (where, halves)
    if not operation.again and named(found) == named(whole):
        return  # it was done when the fault came
    again = run(server, operation, base, work)
    assert again.code == 0, (where, again)
    found = result(work)
    if fault.name == "SIGKILL":  # which leaves nobody who could tidy up
        found = named(found)
    assert found == whole, where


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def named(found: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in found.items() if not is_hidden(name)}


def half(name: str, digest: str, whole: dict[str, str], operation: Operation) -> bool:
    """Whether a file stands for something that it is not: what grows, and what goes again, has none to compare with."""
    if is_hidden(name) or name.endswith(".jsonl") or "/checkpoints/" in name:
        return False
    return whole.get(name) != digest

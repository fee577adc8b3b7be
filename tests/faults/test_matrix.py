"""Whatever ddfast writes, faults of the file system and signals come while it does, at random places (by a seed).

After each: no name stands for half a file, what ended it is one line that says what to do, and the same command leads
to what an undisturbed one makes.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from injection import FAULTS, FULL_TEMPORARY
from operations import OPERATIONS, each, result, run, start

PLACES = 2
"""Of each fault in each operation."""

QUICK = ("pairs", "sample_codes", "hub_save", "dd1")
"""Operations of `make test`, which has every fault in one of them."""

CODES = {"SIGKILL": -9, "SIGTERM": 75, "Ctrl-C": 130, "out of memory": -11}
"""How a fault ends a process; -11: oneDNN, PyTorch's library of convolutions, uses what it was not given."""


TRAIN = ("dd1", "dd2", "teacher_cache")
"""Operations that train a network."""


def cells() -> list:
    found = []
    for operation in OPERATIONS.values():
        for number, fault in enumerate(FAULTS.values()):
            for place in range(PLACES if operation.meets(fault) else 0):
                quick = place == 0 and operation.function == QUICK[number % len(QUICK)]
                name = f"{operation.function}-{fault.name}-{place}"
                found.append(pytest.param(operation, fault, place, id=name, marks=() if quick else pytest.mark.full))
    return found


@pytest.mark.parametrize(("operation", "fault", "place"), cells())
def test_nothing_is_lost(server, base, undisturbed, tmp_path, operation, fault, place):
    whole = undisturbed.of(operation)
    events = undisturbed.count(operation, fault.kinds)
    assert events
    at = random.Random(f"{operation.function} {fault.name} {place}").randrange(events)
    work = start(operation, base, tmp_path / "work")
    before = result(work)
    ended = run(server, operation, base, work, fault, at)
    where = f"{fault.name} at event {at} of {events}: {ended}"

    assert ended.code in ({0} if fault.harmless else {0, 1, CODES.get(fault.name, 1)}), where
    assert "Traceback" not in ended.errors, where
    if ended.code == 1:
        assert [line.startswith(("ddfast", "warning")) for line in ended.errors.splitlines()].count(True) >= 1, where
        assert ended.errors.count("error:") == 1, where
    found = result(work)
    if fault.name == "failed removal":  # then something is left that nobody reads
        found = {name: digest for name, digest in named(found).items() if "/checkpoints/" not in name}
    if ended.code == 0 and not (operation.optional and "warning" in ended.errors):
        assert found == whole, where
        return
    halves = [name for name, digest in found.items() if half(name, digest, whole, before)]
    assert not halves, (where, halves)
    if not operation.again and named(found) == named(whole):
        return  # it was done when the fault came
    again = run(server, operation, base, work)
    assert again.code == 0, (where, again)
    found = result(work)
    if ended.code < 0 or fault.name == "read-only":  # nobody could tidy up
        found = named(found)
    assert found == whole, where


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def named(found: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in found.items() if not is_hidden(name)}


def half(name: str, digest: str, whole: dict[str, str], before: dict[str, str]) -> bool:
    """Whether a file is neither what it was nor what it becomes; what grows or goes again has none to compare with."""
    if is_hidden(name) or name.endswith((".jsonl", "kernels.json")) or "/checkpoints/" in name:
        return False
    return digest not in (whole.get(name), before.get(name))


@pytest.mark.parametrize("operation", each("pairs"))
def test_a_full_tmp_harms_nothing(server, base, undisturbed, tmp_path, operation):
    """Results go through no folder of temporary files; PyTorch makes one of its own there when a training begins."""
    work = start(operation, base, tmp_path / "work")
    ended = server.run(f"operations:{operation.function}", base, work, fault=FULL_TEMPORARY)
    if operation.function in TRAIN:
        assert ended.code == 1, ended
        assert ended.errors.count("error:") == ended.errors.count("No space left on device") == 1, ended
        ended = run(server, operation, base, work)
    assert ended.code == 0, ended
    assert result(work) == undisturbed.of(operation)

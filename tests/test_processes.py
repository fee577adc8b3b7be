"""What processes agree on, and how one that ends or hangs ends the others."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from launching import launch, launched

from ddfast import interruption, processes
from ddfast.errors import DDFastError

TIMEOUT = 3.0
LETTERS = "abcdefg"


def agreements(folder: Path) -> dict:
    """What this process gets of everything that processes agree on; alone it gets the same, but for its number."""
    rank, kept = int(os.environ.get("RANK", "0")), folder / "kept"

    def fail() -> None:
        raise DDFastError(f"process {rank} cannot")

    def found() -> bool:
        there = kept.exists()
        kept.write_text("here")
        return there

    got = {}
    with processes.together("cpu", TIMEOUT):
        got["place"] = processes.rank(), processes.count()
        got["first"] = processes.first_does(lambda: (rank, os.getpid()))
        got["alone"] = processes.first_does(lambda: processes.first_does(lambda: processes.gather(processes.count())))
        with pytest.raises(DDFastError, match="process 0 cannot"):
            processes.first_does(fail)
        got["found"] = processes.first_then_all(found)
        got["gathered"] = processes.gather(rank)
        got["total"] = processes.total(torch.tensor([float(rank), 1.0])).tolist()
        own = list(processes.share(LETTERS))
        got["own"], got["first's"] = "".join(own), "".join(processes.collected(own))
        got["everybody's"] = "".join(processes.collected(own, everywhere=True))
    with processes.together("cpu", TIMEOUT):  # once more, and one of them is slow, but lives
        for _ in range(7 * (rank == 1)):
            time.sleep(TIMEOUT / 6)
            processes.sign()
        before = time.monotonic()
        processes.wait()
        got["waited"] = time.monotonic() - before
    return got


def test_processes_agree(tmp_path):
    ended = launch(3, agreements, tmp_path)
    assert [end["place"] for end in ended] == [(0, 3), (1, 3), (2, 3)]
    assert len({end["first"] for end in ended}) == 1
    assert ended[0]["first"][0] == 0
    assert [end["alone"] for end in ended] == [[1]] * 3
    assert [end["found"] for end in ended] == [False, True, True]
    assert [end["gathered"] for end in ended] == [[0, 1, 2]] * 3
    assert [end["total"] for end in ended] == [[3.0, 3.0]] * 3
    assert [end["own"] for end in ended] == ["adg", "be", "cf"]
    assert [end["first's"] for end in ended] == [LETTERS, "", ""]
    assert [end["everybody's"] for end in ended] == [LETTERS] * 3
    assert ended[0]["waited"] > TIMEOUT > ended[1]["waited"]


def test_one_process_agrees_with_itself(tmp_path):
    got = agreements(tmp_path)
    assert got["place"] == (0, 1)
    assert (got["alone"], got["found"], got["gathered"], got["total"]) == ([1], False, [0], [0.0, 1.0])
    assert got["own"] == got["first's"] == got["everybody's"] == LETTERS


class Awkward(Exception):
    """One that can be pickled, but not made again."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


def ends(how: str) -> None:
    """Process 1 ends, or hangs, where process 0 waits for it in PyTorch, or in a wait of ours (`* alone`)."""
    how, _, alone = how.partition(" ")
    told = {} if alone else {"option": "--limit", "kept": "much is kept"}
    with interruption.answered(), processes.together("cpu", TIMEOUT, **told):
        processes.gather(0)
        if processes.rank() == 1:
            if how == "hangs":
                hangs_here()
            if how in ("killed", "stopped"):
                os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            if how == "terminated":
                signal.raise_signal(signal.SIGTERM)
            raise RuntimeError("an unexpected one")
        if alone:
            processes.first_does(lambda: None)
        processes.total(torch.zeros(3))


def hangs_here() -> None:
    time.sleep(600)


def first_ends(how: str) -> str:
    """Process 0 ends in what it does alone; returns what the others get."""

    def alone() -> None:
        if how == "terminated":
            signal.raise_signal(signal.SIGTERM)
        raise Awkward("it", "fails")

    try:
        with interruption.answered(), processes.together("cpu", 60):
            processes.first_does(alone)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


ENDINGS = {
    "killed": "has been ended (killed, perhaps for want of memory)",
    "raises": "has ended: RuntimeError: an unexpected one",
    "hangs": f"has shown no sign of life for {TIMEOUT:g} s",
    "stopped": f"has shown no sign of life for {TIMEOUT:g} s",
    "terminated": "Terminated",
}


def test_one_that_ends_or_hangs_ends_the_others():
    """By name, and within the limit, a tenth of it and some seconds; nobody gives up silently."""
    with contextlib.ExitStack() as until_then:
        started = {
            how + where: until_then.enter_context(launched(2, ends, how + where))
            for how in ENDINGS
            for where in ("", " alone")
        }
        begun = time.monotonic()
        while any(running.processes[0].is_alive() for running in started.values()):
            assert time.monotonic() - begun < 1.1 * TIMEOUT + 2 + 20  # what it takes to start ten times two processes
            time.sleep(0.05)
        ended = {how: running.ended(limit=0) for how, running in started.items()}  # one that is stopped stays
    for how, (waiting, other) in ended.items():
        how, _, alone = how.partition(" ")
        assert waiting.code == 1, (how, waiting)
        assert ENDINGS[how] in waiting.errors, (how, waiting.errors)
        assert how == "terminated" or "process 1 of 2" in waiting.errors
        assert ("; see its own messages; much is kept\n" in waiting.errors) == (not alone and how != "terminated")
        assert (f"{TIMEOUT:g} s (--limit)" in waiting.errors) == (not alone and how in ("hangs", "stopped"))
        if how == "hangs":
            assert other.code == 1
            assert "Timeout" in other.errors
            assert "in hangs_here" in other.errors
        if how == "raises":
            assert "RuntimeError: an unexpected one" in other.errors


def test_every_process_takes_a_gpu_of_its_own(monkeypatch):
    """Those that have none say so before they talk: NCCL's own words are of a duplicate."""
    for name, value in {"WORLD_SIZE": "6", "RANK": "1", "LOCAL_WORLD_SIZE": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)

    def nobody(limit: object) -> None:
        raise RuntimeError("nobody is met here")

    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(processes, "_store", nobody)
    for device, gpus, words in (
        ("cuda", 2, r"3 processes \(LOCAL_WORLD_SIZE\) and 2 GPUs on this machine: start at most 2 per machine"),
        ("cuda:1", 3, "--device cuda:1: of several processes each takes a GPU of its own: --device cuda"),
        ("cuda", 3, "do not find each other: nobody is met here"),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        with pytest.raises(DDFastError, match=words), processes.together(device, TIMEOUT):
            pass
    assert taken == [1]


def test_what_ends_the_first_alone_ends_all():
    """Also where an error cannot be sent, and at once where a signal ends it."""
    (own, others), (terminated, waiting) = launch(2, first_ends, "raises"), launch(2, first_ends, "terminated")
    assert own == "Awkward: it: fails"
    assert others == "RuntimeError: Awkward: it: fails"
    assert terminated == waiting == "Terminated: "

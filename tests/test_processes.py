"""What processes agree on, and how one that ends or hangs ends the others."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import launch, launched

from ddfast import processes
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


def ends(how: str) -> None:
    """Process 1 is killed, or hangs; process 0 waits for it."""
    with processes.together("cpu", TIMEOUT):
        processes.gather(0)
        if processes.rank() == 1 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if processes.rank() == 1:
            hangs_here()
        processes.first_does(lambda: None)


def hangs_here() -> None:
    time.sleep(600)


def test_one_that_is_killed_or_hangs_ends_the_others():
    with launched(2, ends, "killed") as killed, launched(2, ends, "hangs") as hanging:
        (waiting, dead), (other, hung) = killed.ended(limit=60), hanging.ended(limit=60)
    assert dead.code == -signal.SIGKILL
    assert hung.code == 1
    assert "hangs_here" in hung.errors
    assert "Timeout" in hung.errors
    for end in (waiting, other):
        assert end.code == 1
        assert f"process 1 of 2 has shown no sign of life for {TIMEOUT:g} s" in end.errors
        assert end.seconds < 3 * TIMEOUT + 10  # and what it takes to start

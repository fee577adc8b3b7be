"""A training in two processes that is killed, told to end, or has no room: it ends in time, and goes on to the same."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import Ended, Launched, launched
from training import different, leftovers, train

from ddfast import pipeline
from ddfast.distill import checkpoints, trainer
from ddfast.trajectories import generate

SECONDS = 30.0
"""From SIGTERM to the end."""

RESUMES = "interrupted; the same command continues where it stopped"


def train_until(cache: Path, out: Path, moment: str, marks: Path) -> None:
    """`train` of DD1 that leaves a mark when its first process comes to a moment, which waits there, once."""

    def come(what: Callable) -> Callable:
        def first(*arguments: object, **more: object) -> object:
            mark = marks / moment
            if not mark.exists() and os.environ["RANK"] == "0":
                mark.touch()
                time.sleep(1.0 if moment in GOES_ON else 60)
            return what(*arguments, **more)

        return first

    with pytest.MonkeyPatch.context() as patch:
        module, name = MOMENTS[moment]
        patch.setattr(module, name, come(getattr(module, name)))
        train(cache, out, "dd1")


MOMENTS = {
    "files written": (checkpoints, "_written_here"),  # of a checkpoint that has no name yet
    "student written": (checkpoints, "remove"),
    "in a step": (trainer, "_agreed"),
    "trajectories": (generate, "_decode"),
    "evaluation": (pipeline, "evaluate"),
}
GOES_ON = ("in a step",)


@contextlib.contextmanager
def at(moment: str, cache: Path, out: Path, marks: Path) -> Iterator[Launched]:
    """Two processes, of which the first has come to a moment."""
    marks.mkdir(exist_ok=True)
    with launched(2, train_until, cache, out, moment, marks) as running:
        until = time.monotonic() + 60
        while not (marks / moment).exists() and time.monotonic() < until:
            time.sleep(0.005)
        yield running


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory) -> Path:
    """What an undisturbed run of two processes has made; the cache has the teacher then."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with launched(2, train, cache, out, "dd1") as running:
        assert [end.code for end in running.ended()] == [0, 0]
    return out


def send(number: int, running: Launched, *ranks: int) -> None:
    for rank in ranks:
        os.kill(running.processes[rank].pid, number)


def test_killed_again_and_again_it_ends_as_the_undisturbed_run(cache, whole, tmp_path):
    """SIGKILL, SIGTERM and Ctrl-C, to one and to all; a second command in the folder is refused meanwhile."""
    out, marks = tmp_path / "run", tmp_path / "marks"

    with at("trajectories", cache, out, marks) as running:
        send(signal.SIGTERM, running, 1)
        told = running.ended(together=True, limit=SECONDS + 60)
        answered(told)

    with at("files written", cache, out, marks) as running:
        with launched(2, train, cache, out, "dd1") as second:
            refused = second.ended()
        assert [end.code for end in refused] == [1, 1]
        assert refused[0].errors.count("a run is going on in") == refused[0].errors.count("\n") == 1
        assert refused[1].errors == ""
        send(signal.SIGKILL, running, 0)
        one, other = running.ended(together=True)
        assert one.code == -signal.SIGKILL
        assert other.code in (1, 75)
    assert list((out / "checkpoints").glob(".*.tmp"))

    with at("in a step", cache, out, marks) as running:  # as a terminal and torchrun's agent send it
        for _ in range(2):
            send(signal.SIGINT, running, 0, 1)
            time.sleep(0.1)
        answered(running.ended(), code=130)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["distillation-00000000"]

    with launched(2, no_room, cache, out, "dd1", "1") as running:
        first, second = running.ended()
    assert (first.code, second.code) == (1, 1)
    assert first.errors.count("\n") == 1
    assert "/checkpoints/distillation-00000002: File too large; the last checkpoint is kept" in first.errors
    assert second.errors == ""
    assert [path.name for path in (out / "checkpoints").glob("[!.]*")] == ["distillation-00000000"]

    with at("student written", cache, out, marks) as running:
        send(signal.SIGKILL, running, 0, 1)
        running.ended()
    assert (out / "student.safetensors").exists()
    assert (out / "checkpoints").exists()

    with at("evaluation", cache, out, marks) as running:
        asked = time.monotonic()
        send(signal.SIGTERM, running, 0, 1)
        answered(running.ended(together=True))
        assert time.monotonic() - asked < SECONDS

    with launched(2, train, cache, out, "dd1") as running:
        last = running.ended()
    assert [end.code for end in last] == [0, 0], last
    assert different(out, whole) == []
    assert leftovers(out) == []


def answered(ended: list[Ended], code: int = 75) -> None:
    """Both processes end by it, and the first says so, once."""
    assert [end.code for end in ended] == [code, code], ended
    assert ended[0].errors.count(RESUMES) == 1
    assert "Traceback" not in ended[0].errors + ended[1].errors
    assert RESUMES not in ended[1].errors


def no_room(cache: Path, out: Path, method: str, rank: str) -> None:
    """`train`, where one process cannot write a file of more than 20 kB once the training has begun."""
    enter = trainer._Loop.__enter__

    def limited(loop: object) -> object:
        if os.environ["RANK"] == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return enter(loop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Loop, "__enter__", limited)
        train(cache, out, method)


DIES_ONCE = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from ddfast.distill.trainer import _Loop
from training import train

step = _Loop.take_step

def dies_once(loop, *arguments):
    if loop.step == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(loop, *arguments)

_Loop.take_step = dies_once
train(Path({cache!r}), Path({out!r}), "dd1")
"""


@pytest.mark.full
def test_torchrun_starts_it_again_by_itself(cache, environment, whole, tmp_path):
    out, script = tmp_path / "run", tmp_path / "dies_once.py"
    here = Path(__file__).parent
    script.write_text(DIES_ONCE.format(paths=[str(here), str(here.parent)], cache=str(cache), out=str(out)))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run([*start, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert different(out, whole) == []

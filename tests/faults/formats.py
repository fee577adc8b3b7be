"""Files of every kind, as the installed version writes them: later versions are held to reading them.

    python tests/faults/formats.py tests/data/formats/NUMBER

makes them (at every change of a format, before it is made); test_upgrades.py reads what is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import injection
import operations
import pytest
from injection import FAULTS, Server
from operations import command
from training import SIZES

from ddfast.models.checkpoint import digest, load_tensors
from ddfast.runs import METRICS_JSON

SMALL = ["--tokenizer.width=8", "--teacher.width=16", "--trajectories.count=100"]
"""Sizes of kilobytes."""

SAMPLES = ["--student", "run", "--count=24", "--batch-size=8", "--format=codes", "--to", "codes.safetensors"]

EXPECTED = "expected.json"


@contextlib.contextmanager
def small() -> Iterator[None]:
    """In the folder where the files are, without judging."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(operations.SIZES, "dd1", [*SIZES["dd1"], *SMALL])
        yield


def train(base: str, work: str) -> int:
    """A run of DD1, in a folder of this name, up to its student."""
    os.chdir(base)
    with small():
        code = operations.train(".", ".", "dd1")
    Path("run", METRICS_JSON).unlink(missing_ok=True)  # of no figures
    return code


def stopped(base: str, work: str) -> int:
    """The same, in another folder."""
    os.chdir(work)
    with small():
        return operations.train("..", ".", "dd1")


def hub(base: str, work: str) -> int:
    os.chdir(base)
    return operations.hub_save(".", ".")


def sample(base: str, work: str) -> int:
    os.chdir(base)
    return command(".", "sample", *SAMPLES)


def verdicts(base: str, work: str) -> int:
    return operations.verdicts(base, base)


def numbers(folder: Path) -> dict[str, str]:
    """What the files' tensors are."""
    return {
        str(path.relative_to(folder)): digest(load_tensors(path)[0]) for path in sorted(folder.rglob("*.safetensors"))
    }


def make(folder: Path, server: Server) -> None:
    """All of them, in a new folder."""
    work = folder / "stopped"
    work.mkdir(parents=True)
    stop = FAULTS["SIGTERM"]
    for name in ("train", "hub", "verdicts"):
        ended = server.run(f"formats:{name}", folder, folder, below=folder)
        assert ended.code == 0, ended
    for name, share in (("stopped", 0.45), ("sample", 0.5)):
        with contextlib.ExitStack() as trial:
            copy = Path(shutil.copytree(folder, folder.with_name("trial")))
            trial.callback(shutil.rmtree, copy)
            events = server.run(f"formats:{name}", copy, copy / "stopped", below=copy, fault=stop, at=2**40).events
        ended = server.run(f"formats:{name}", folder, work, below=folder, fault=stop, at=int(share * events))
        assert ended.code in (75, 130), ended
    (folder / EXPECTED).write_text(json.dumps(numbers(folder), indent=1) + "\n")


if __name__ == "__main__":
    made = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as place, injection.server(Path(place)) as running:
        make(made, running)
    for left in [*made.rglob("*.lock"), *made.rglob("throughput.jsonl")]:
        left.unlink()
    shutil.rmtree(sorted(made.glob("stopped/run/checkpoints/*"))[0])  # one is enough

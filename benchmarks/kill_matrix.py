"""Kills any process of a training at any moment, again and again, and compares what the resumed runs have made.

    python benchmarks/kill_matrix.py --kills 100 --processes 2 --json kills.json

A tiny run of digits, DD1 and DD2 in turn. Each run is killed up to three times, and ends with the bits of one that
nobody disturbed, or the table says what differs. Most are started as torchrun starts processes, by forking, which
saves seconds; every `--torchrun`th run by torchrun itself, whose agent may get the SIGTERM too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "cli")]

from commands import prepare  # noqa: E402
from launching import launched  # noqa: E402
from training import SIZES, different, leftovers, train  # noqa: E402

KILLS_OF_A_RUN = 3
LIMIT = 600.0

Row = dict[str, Any]


def main() -> None:
    """Run the matrix, print its table, and exit with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torchrun", type=int, default=5, help="every such run is started by torchrun; 0: none")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no further run after these; 0: no limit")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = matrix(options, Path(folder))
    bad = [row for row in rows if row["verdict"] != "same"]
    print(f"{len(rows)} kills, {len(rows) - len(bad)} of them in runs that ended with the same bits")
    print(
        "moments: " + ", ".join(f"{where} {count}" for where, count in Counter(stage_of(row) for row in rows).items())
    )
    slowest = max((row["seconds_to_end"] for row in rows if row["signal"] == "SIGTERM"), default=0.0)
    print(f"longest from SIGTERM to the end of all processes: {slowest:.1f} s")
    if options.json:
        options.json.write_text(json.dumps({**vars(options), "json": None, "rows": rows}, indent=2) + "\n")
    sys.exit(1 if bad else 0)


def matrix(options: argparse.Namespace, root: Path) -> list[Row]:
    """A row per kill."""
    started = time.monotonic()
    chance, cache = random.Random(options.seed), root / "cache"
    prepare(cache)
    shutil.copytree(cache, root / "cold")  # where the teacher is to be trained still
    durations = {}
    for method in SIZES:
        for out in (root / f"{method}-first", root / method):  # the first one trains the teacher
            begun = time.monotonic()
            with launched(options.processes, train, cache, out, method) as run:
                assert [end.code for end in run.ended(limit=LIMIT)] == [0] * options.processes
            durations[method] = time.monotonic() - begun
        assert not different(root / f"{method}-first", root / method)
        print(f"{method} undisturbed: {durations[method]:.1f} s", flush=True)
    titles = ("run", "kill", "whom", "signal", "moment", "exit codes", "s to the end", "verdict")
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    rows: list[Row] = []
    number = 0
    while len(rows) < options.kills and not 0 < options.minutes * 60 < time.monotonic() - started:
        number += 1
        method, out = list(durations)[number % 2], root / f"run-{number}"
        by_torchrun = bool(options.torchrun) and number % options.torchrun == 0
        own_cache = cache
        if chance.random() < 0.15:
            shutil.copytree(root / "cold", own_cache := root / f"cache-{number}")
        start = Torchrun if by_torchrun else Forked
        of_run = []
        for _ in range(min(KILLS_OF_A_RUN, options.kills - len(rows))):
            row = killed(start, options.processes, own_cache, out, method, chance, durations[method])
            if row is None:
                break
            of_run.append(row)
        with start(options.processes, own_cache, out, method) as run:
            codes = run.codes()
        wrong = different(out, root / method) + leftovers(out) if not any(codes) else [f"exit codes {codes}"]
        for row in of_run:
            row |= {"run": number, "method": method, "torchrun": by_torchrun, "verdict": ", ".join(wrong) or "same"}
            rows.append(row)
            cells = (f"{number} {method}{' torchrun' if by_torchrun else ''}", len(rows), row["whom"], row["signal"])
            cells += (row["moment"], row["codes"], f"{row['seconds_to_end']:.1f}", row["verdict"])
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        if not wrong:
            shutil.rmtree(out)
    return rows


def killed(
    start: Callable[..., Any], count: int, cache: Path, out: Path, method: str, chance: random.Random, duration: float
) -> Row | None:
    """Start the command, end one of its processes at a random moment, and wait for all; None: it was done before."""
    after, name = chance.uniform(0, duration), chance.choice(["SIGKILL", "SIGTERM"])
    in_writing = chance.random() < 0.3  # a moment that is too short to be hit often: a checkpoint's files are written
    with start(count, cache, out, method) as run:
        until = time.monotonic() + after
        while run.alive() and time.monotonic() < until:
            time.sleep(0.005)
        while in_writing and run.alive() and time.monotonic() < until + 10 and not writing(out):
            time.sleep(0.0005)
        targets = run.targets(name)
        whom = chance.choice(sorted(targets) or [""])
        if not run.alive() or not whom:
            return None
        where = moment(out)
        asked = time.monotonic()
        for target in targets[whom]:
            os.kill(target, getattr(signal, name))
        codes = run.codes()
        if not any(codes):  # it had ended all but its process
            return None
    return {
        "whom": whom, "signal": name, "moment": where, "codes": codes, "seconds_to_end": time.monotonic() - asked
    }  # fmt: skip


def writing(out: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((out / "checkpoints").glob(".*.tmp"))


def moment(out: Path) -> str:
    """Where a run is, by what its folder holds."""
    if not out.exists():
        return "start"
    checkpoints = sorted(path.name for path in (out / "checkpoints").glob("*"))
    stages = {
        "evaluation": out / "student.safetensors",
        "matching": out / "ar-diffusion.safetensors",
    }
    stage = next((stage for stage, path in stages.items() if path.exists()), "")
    if not stage:
        shards = len(list((out / "trajectories").glob("shard*")))
        stage = f"trajectories, {shards} shards" if (out / "trajectories").exists() else "teacher"
    kept = [name for name in checkpoints if not name.startswith(".")]
    words = [kept[-1] if kept else stage]
    words += ["writing a checkpoint"] if len(kept) < len(checkpoints) else []
    words += ["student there, checkpoints too"] if stage == "evaluation" and kept else []
    return ", ".join(words)


def stage_of(row: Row) -> str:
    """The moment without its step."""
    moment = row["moment"]
    return "writing a checkpoint" if "writing" in moment else moment.partition("-")[0].partition(",")[0]


class Forked:
    """Processes as torchrun starts them; the end of one ends the others."""

    def __init__(self, count: int, cache: Path, out: Path, method: str) -> None:
        self._context = launched(count, train, cache, out, method)

    def __enter__(self) -> Forked:
        self._run = self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def alive(self) -> bool:
        """Whether all run still."""
        return all(process.exitcode is None for process in self._run.processes)

    def targets(self, name: str) -> dict[str, list[int]]:
        """Processes that a kill may be meant for."""
        ranks = {f"process {rank}": [process.pid] for rank, process in enumerate(self._run.processes)}
        return ranks | {"all": [process.pid for process in self._run.processes]}

    def codes(self) -> list[int]:
        """Wait for all; their exit codes."""
        return [end.code for end in self._run.ended(limit=LIMIT, together=True)]


class Torchrun:
    """The command as torchrun runs it."""

    def __init__(self, count: int, cache: Path, out: Path, method: str) -> None:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        self._command = [*start, str(HERE.parent / "tests" / "cli" / "training.py"), str(cache), str(out), method]

    def __enter__(self) -> Torchrun:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        quiet = subprocess.DEVNULL
        self._agent = subprocess.Popen(self._command, env=environment, stdout=quiet, stderr=quiet)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._agent.poll() is None:
            self._agent.terminate()
            self._agent.wait()

    def alive(self) -> bool:
        """Whether torchrun runs still."""
        return self._agent.poll() is None

    def targets(self, name: str) -> dict[str, list[int]]:
        """Processes that a kill may be meant for; what a SIGKILL of the agent leaves behind is nobody's to end."""
        asked = ["ps", "-o", "pid=", "--ppid", str(self._agent.pid)]
        children = subprocess.run(asked, capture_output=True, text=True).stdout.split()
        found = {f"process {turn}": [int(child)] for turn, child in enumerate(children)}
        if name == "SIGTERM":
            found["torchrun"] = [self._agent.pid]
        return found

    def codes(self) -> list[int]:
        """Wait for it; its exit code."""
        return [self._agent.wait(LIMIT)]


if __name__ == "__main__":
    main()

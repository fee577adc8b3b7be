"""Samples, trains and judges at small sizes, of ever other shapes, in one process: what grows with time?

    python benchmarks/long_run.py --minutes 60 --json long-run.json

Resident memory, open files, threads and entries of this package's caches, after every turn. The first quarter of the
time is for what is imported and set up once; from there to the end memory may grow by 2 %, the rest by nothing.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ddfast.hub import Generator
from ddfast.ops.codebook_posterior import codebook_posterior
from ddfast.ops.flow_sample import flow_sample
from ddfast.ops.nearest_code import nearest_code

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "cli")]

from commands import in_this_process, prepare  # noqa: E402
from training import SIZES  # noqa: E402

GROWTH = 0.02
PATHS = ["--evaluation.paths=0"]


def main() -> None:
    """Run for as long as is asked for, print what grew, and exit with 1 where something may not have."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(Path(folder), 60 * options.minutes, random.Random(options.seed))
    settled, last = halves(rows)
    for name in rows[0]:
        print(f"{name}: {settled[name]:g} after the first quarter, {last[name]:g} at the end")
    if options.json:
        said = {"minutes": options.minutes, "seed": options.seed, "torch": torch.__version__, "rows": rows}
        options.json.write_text(json.dumps(said) + "\n")
    grown = [name for name in GROWS if last[name] > (1 + GROWTH * (name == "memory_mib")) * settled[name]]
    sys.exit(f"grows: {', '.join(grown)}" if grown else 0)


GROWS = ("memory_mib", "open_files", "threads", "cached")
"""What may not."""


def run(folder: Path, seconds: float, draw: random.Random) -> list[dict[str, float]]:
    """Turns until the time is over; what there was after each."""
    cache, student = folder / "cache", folder / "student"
    prepare(cache)
    command(cache, "train", *SIZES["dd1"], *PATHS, "--out", student)
    begun, rows = time.monotonic(), []
    while time.monotonic() < begun + seconds or len(rows) < 4:
        turn(folder, cache, student, draw)
        gc.collect()
        rows.append({"minute": (time.monotonic() - begun) / 60, **held()})
    return rows


def turn(folder: Path, cache: Path, student: Path, draw: random.Random) -> None:
    """A training of either method, samples of every form, some images, ops of random shapes; nothing is kept."""
    method, count = draw.choice(sorted(SIZES)), draw.randrange(5, 60)
    settings = ["--student", student, "--count", count, "--batch-size", draw.randrange(1, 30)]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        command(cache, "train", *SIZES[method], *PATHS, "--out", f"{place}/run")
        for form, name in (("codes", "a.safetensors"), ("npz", "a.npz"), ("files", "files"), ("grid", "a.png")):
            command(cache, "sample", *settings, "--format", form, "--to", f"{place}/{name}")
        command(cache, "sample", *settings, "--refine", "exact", "--to", f"{place}/exact.png")
    labels = [draw.randrange(10) for _ in range(draw.randrange(1, 40))]
    Generator.from_run(student).images(labels, seed=draw.randrange(2**31), steps=draw.choice((1, 2)))
    for _ in range(20):
        rows, codes, dim = draw.randrange(1, 300), draw.randrange(2, 3000), draw.randrange(1, 40)
        noise, codebook = torch.randn(rows, dim), torch.randn(codes, dim)
        log_probs = torch.randn(rows, codes).log_softmax(-1)
        flow_sample(log_probs, noise, codebook)
        nearest_code(noise, codebook)
        codebook_posterior(noise, draw.uniform(0.01, 1.0), log_probs, codebook)


def command(cache: Path, *arguments: object) -> None:
    """A command in this process; its words go nowhere."""
    with open(os.devnull, "w") as nowhere:
        kept, sys.stdout = sys.stdout, nowhere
        try:
            code = in_this_process(cache, *arguments)
        finally:
            sys.stdout = kept
    if code:
        sys.exit(f"{arguments}: exit code {code}")


def held() -> dict[str, float]:
    """What the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    caches: list[Any] = [found for found in gc.get_objects() if type(found) is functools._lru_cache_wrapper]
    ours = [found for found in caches if str(getattr(found, "__module__", "")).startswith("ddfast")]
    return {
        "memory_mib": pages * resource.getpagesize() / 2**20,
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "cached": sum(found.cache_info().currsize for found in ours),
    }


def halves(rows: list[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of the second quarter, and of the last."""
    quarter = len(rows) // 4
    second, last = rows[quarter : 2 * quarter], rows[-quarter:]
    return tuple({name: statistics.median(row[name] for row in part) for name in rows[0]} for part in (second, last))


if __name__ == "__main__":
    main()

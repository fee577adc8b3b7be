"""A training step of digits by one process under two revisions, in turn: what a change costs who shares nothing.

    python benchmarks/step_time.py main HEAD --steps 100 --json step_time.json

Each revision is checked out into a work tree of its own. Both train the same stage, in a process each, and take their
steps in turn, one waiting while the other works: what slows the machine slows both. The figure is the median of the
ratios of the pairs of steps, without the first ten. Both run under this interpreter and its compiled modules.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = ("dd1", "tuning", "matching", "matching, adamw")
WARM_UP = 10

WORK = """
import sys, tempfile, time
from pathlib import Path
import torch
from ddfast.config import TrainConfig, TrajectoryConfig, update
from ddfast.distill.stages import distill, match, new_network, tune
from ddfast.models.transformer import TransformerTeacher
from ddfast.trajectories.generate import store_settings
from ddfast.trajectories.store import Trajectories

stage, steps = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
sizes = {"groups": (1,) * 16, "num_classes": 10, "width": 96, "depth": 4, "heads": 4}
teacher = TransformerTeacher(codebook=torch.randn(64, 4), **sizes).eval().requires_grad_(False)
config, out = TrainConfig(), Path(tempfile.mkdtemp())
started = time.perf_counter()

def take_turns(*told):
    global started
    print(time.perf_counter() - started, flush=True)
    sys.stdin.readline()
    started = time.perf_counter()

shared = {"batch_size": 128, "log_every": 50, "checkpoint_every": 10**6}
update(config.dd1, {**shared, "iterations": steps})
update(config.dd2.tune, {**shared, "iterations": steps, "source": "teacher"})
parts = dict.fromkeys(("start_iterations", "guidance_first", "iterations"), steps // 3 + 1)
update(config.dd2.match, {**shared, **parts, "watch_every": 10**6})
config.dd2.match.optimizer = "adamw" if stage.endswith("adamw") else "muon"
told = {"progress": take_turns}
if stage == "dd1":
    codes = torch.randint(64, (1000, 16)).to(torch.uint8)
    index = torch.arange(1000)
    pairs = Trajectories(
        codes=codes, condition=index % 10, index=index, settings=store_settings(teacher, TrajectoryConfig(), 0)
    )
    distill(config, teacher, pairs, out, **told)
elif stage == "tuning":
    tune(config, teacher, new_network(config, teacher), None, out, **told)
else:
    match(config, teacher, new_network(config, teacher), new_network(config, teacher), out, **told)
"""


def main() -> None:
    """Time both revisions and print the medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs=2, metavar="REVISION", help="before and after")
    parser.add_argument("--steps", type=int, default=100, help="of each, after ten that warm up")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    git = ["git", "-C", str(ROOT)]
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trees = [Path(folder) / name for name in ("before", "after")]
        for tree, revision in zip(trees, options.revisions, strict=True):
            subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            print("| stage | before, ms | after, ms | after / before: median, quartiles |\n|---|---|---|---|")
            for stage in options.stages:
                found[stage] = in_turn(trees, stage, options.steps)
                before, after = (statistics.median(values) for values in zip(*found[stage], strict=True))
                low, middle, high = statistics.quantiles([there / here for here, there in found[stage]], n=4)
                print(f"| {stage} | {before:.1f} | {after:.1f} | {middle:.3f}, {low:.3f} to {high:.3f} |", flush=True)
        finally:
            for tree in trees:
                subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)
    if options.json:
        commits = [subprocess.check_output([*git, "rev-parse", name], text=True).strip() for name in options.revisions]
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        told = {"command": sys.argv, "commits": commits, **machine, "date": time.strftime("%Y-%m-%d")}
        rounded = {stage: [[round(value, 2) for value in pair] for pair in pairs] for stage, pairs in found.items()}
        options.json.write_text(json.dumps({**told, "ms": rounded}) + "\n")


def in_turn(trees: Sequence[Path], stage: str, steps: int) -> list[tuple[float, float]]:
    """Milliseconds of every step under both trees' code."""
    call = [sys.executable, "-c", WORK, stage, str(WARM_UP + steps)]
    both = [
        subprocess.Popen(
            call, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, bufsize=1,
        )
        for tree in trees
    ]  # fmt: skip
    pairs = []
    try:
        for step in range(WARM_UP + steps):
            taken = []
            for process in both if step % 2 else reversed(both):  # neither always goes first
                assert process.stdin is not None and process.stdout is not None
                if step:
                    process.stdin.write("\n")
                taken.append(1e3 * float(process.stdout.readline()))
            pairs.append((taken[0], taken[1]) if step % 2 else (taken[1], taken[0]))
    finally:
        for process in both:
            process.kill()
            process.wait()
    return pairs[WARM_UP:]


if __name__ == "__main__":
    main()

"""A training step of digits by one process under two revisions, in turn: what a change costs who shares nothing.

    python benchmarks/step_time.py main HEAD --rounds 5 --json step_time.json

Each revision is checked out into a work tree of its own; a round trains every stage for some steps by one revision and
then by the other, in a process each. A run's figure is the median of its steps, without the first five. Both run under
this interpreter and its compiled modules.
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
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = {"dd1": 60, "tuning": 60, "matching": 100, "matching, adamw": 100}

WORK = """
import statistics, sys, tempfile, time
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
config, marks, out = TrainConfig(), [], Path(tempfile.mkdtemp())
shared = {"batch_size": 128, "log_every": 50, "checkpoint_every": 10**6}
update(config.dd1, {**shared, "iterations": steps})
update(config.dd2.tune, {**shared, "iterations": steps, "source": "teacher"})
parts = dict.fromkeys(("start_iterations", "guidance_first", "iterations"), steps // 5)
update(config.dd2.match, {**shared, **parts, "watch_every": 10**6})
config.dd2.match.optimizer = "adamw" if stage.endswith("adamw") else "muon"
told = {"progress": lambda *_: marks.append(time.perf_counter())}
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
print(1e3 * statistics.median(after - before for before, after in zip(marks[5:], marks[6:])))
"""


def main() -> None:
    """Time both revisions and print the medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs=2, metavar="REVISION", help="before and after")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stages", nargs="*", choices=STEPS, default=list(STEPS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    git = ["git", "-C", str(ROOT)]
    found: dict[str, list[list[float]]] = {stage: [] for stage in options.stages}
    with tempfile.TemporaryDirectory() as folder:
        trees = [Path(folder) / name for name in ("before", "after")]
        for tree, revision in zip(trees, options.revisions, strict=True):
            subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            for stage in options.stages * options.rounds:
                found[stage].append([milliseconds(tree, stage) for tree in trees])
                print(stage, [round(value, 2) for value in found[stage][-1]], flush=True)
        finally:
            for tree in trees:
                subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)
    print("\n| stage | before, ms | after, ms | ratio: median, lowest, highest |\n|---|---|---|---|")
    for stage, pairs in found.items():
        before, after = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratios = sorted(there / here for here, there in pairs)
        row = f"{statistics.median(ratios):.3f}, {ratios[0]:.3f}, {ratios[-1]:.3f}"
        print(f"| {stage} | {before:.1f} | {after:.1f} | {row} |")
    if options.json:
        commits = [subprocess.check_output([*git, "rev-parse", name], text=True).strip() for name in options.revisions]
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        told = {"command": sys.argv, "commits": commits, **machine, "date": time.strftime("%Y-%m-%d"), "ms": found}
        options.json.write_text(json.dumps(told, indent=1) + "\n")


def milliseconds(tree: Path, stage: str) -> float:
    """A step's median under the code of a tree."""
    call = [sys.executable, "-c", WORK, stage, str(STEPS[stage])]
    done = subprocess.run(
        call, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()

"""On a machine with a GPU: install, prove, time and profile, in steps of minutes, into one JSON file per GPU model.

    make gpu-check [PYTHON=python3] [STEPS="risks kernels"] [OUT=benchmarks/results] [PEERS="--peer-path var=VAR"]

Without STEPS, those that have not passed at this commit yet run in their order: what may be wrong first, then what is
slow, then why. A step that fails or runs out of its time does not keep the later ones from running; the exit code
tells. PyTorch, Triton, pytest and NumPy are enough for all steps but the last ones, which say what they miss.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 480
"""Seconds of a step: a GPU is often to be had for minutes only, and what a step found is kept when it ends."""

RISKS = "tests/gpu/test_risks.py"
SANITIZED = "cluster"
"""Which tests compute-sanitizer runs: clusters, staged codes and the second launch, on few rows."""

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
OPS = ("nearest_code", "filter_logits", "codebook_posterior", "flow_sample", "sample_codes", "draw_codes")
INSTALL = (sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", ".")
TUNE = (sys.executable, "-m", "ddfast.tune")
_DOCTOR = "from ddfast.diagnosis import diagnosis; print('\\n'.join(diagnosis()))"


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command with a time limit.

    Attributes:
        name: for STEPS.
        command: its words; "{results}" stands for the JSON file.
        limit: seconds.
        needs: programs and packages without which it is left out.
    """

    name: str
    command: tuple[str, ...]
    limit: int = LIMIT
    needs: tuple[str, ...] = ()


def _tests(name: str, *arguments: str, **more: Any) -> Step:
    return Step(name=name, command=(*PYTEST, "-m", "gpu", *arguments), **more)


def _benchmark(name: str, *arguments: str, **more: Any) -> Step:
    return Step(name=name, command=(*PYTEST, "-s", "--results", "{results}", *arguments), **more)


def _sanitizer(tool: str) -> Step:
    options = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
    command = (*options, *PYTEST, "-m", "gpu", RISKS, "-k", SANITIZED)
    return Step(name=tool, command=command, needs=("compute-sanitizer",))


FULL = ("einops", "safetensors", "tyro", "nvtx", "tomli_w", "tqdm", "PIL")
"""Packages of whole models and commands."""

PROFILED = "sample_codes and llamagen"

STEPS = (
    Step(name="install", command=INSTALL),
    _tests("risks", "-x", RISKS),
    Step(name="doctor", command=(sys.executable, "-c", _DOCTOR)),
    _sanitizer("memcheck"),
    _sanitizer("racecheck"),
    _sanitizer("synccheck"),
    _tests("codes", "tests/gpu/test_ops.py", "-k", " or ".join(OPS)),
    _tests("layers", "tests/gpu/test_ops.py", "-k", "not " + " and not ".join(OPS)),
    _tests("models", "tests/gpu", "--ignore", "tests/gpu/test_ops.py", "--ignore", RISKS, needs=FULL),
    *(_benchmark(f"bench-{op}", "benchmarks/test_gpu_kernels.py", "-k", f"test_{op}") for op in OPS),
    _benchmark("bench-layers", "benchmarks/test_gpu_kernels.py", "-k", " and ".join(f"not test_{op}" for op in OPS)),
    Step(name="tune", command=(*TUNE, "--recipe", "llamagen-l", "--device", "cuda"), needs=FULL),
    _benchmark("decoding", "benchmarks/test_decode.py", *shlex.split(os.environ.get("PEERS", "")), needs=FULL),
    _benchmark("score", "benchmarks/test_dd2_score.py", needs=FULL),
    Step(
        name="profile",
        command=(
            "ncu", "--section", "SpeedOfLight", "--section", "Occupancy", "--kernel-name", "regex:flow|nearest",
            "--launch-count", "6", *PYTEST, "benchmarks/test_gpu_kernels.py", "-k", PROFILED,
        ),
        needs=("ncu",),
    ),
)  # fmt: skip


def missing(needs: Sequence[str]) -> list[str]:
    """Of programs and packages, those that are not here."""
    return [name for name in needs if not shutil.which(name) and importlib.util.find_spec(name) is None]


def commit() -> str:
    """The commit, with a mark where the files differ from it; "unknown" without git."""
    if not shutil.which("git"):
        return "unknown"
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def read(path: Path) -> dict[str, Any]:
    """What earlier calls left in the file."""
    return json.loads(path.read_text()) if path.exists() else {"steps": {}, "benchmarks": []}


def write(path: Path, results: dict[str, Any]) -> None:
    """All of the file or nothing: a step may be killed while another writes."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def wanted(named: Sequence[str], passed: Sequence[str], steps: Sequence[Step] = STEPS) -> list[Step]:
    """The steps that are named, or those that have not passed."""
    unknown = sorted({*named} - {step.name for step in steps})
    if unknown:
        known = " ".join(step.name for step in steps)
        raise SystemExit(f"error: STEPS: got {' '.join(unknown)}, expected some of {known}")
    return [step for step in steps if (step.name in named if named else step.name not in passed)]


def run(step: Step, path: Path) -> dict[str, Any]:
    """Run a step; its exit code ("timeout" if it ran out of its time), seconds and last lines."""
    command = [word.replace("{results}", str(path)) for word in step.command]
    began = time.monotonic()
    log = path.with_name(f"{path.stem}-{step.name}.log")
    code: int | str
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout=step.limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = "timeout"
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(lines[-40:]))
    return {
        "code": code,
        "seconds": round(time.monotonic() - began, 1),
        "command": shlex.join(command),
        "tail": lines[-15:],
    }


def check(path: Path, named: Sequence[str], now: str, steps: Sequence[Step] = STEPS) -> bool:
    """Run what is wanted, writing after every step; returns whether all of it passed."""
    earlier = read(path)["steps"]
    passed = [name for name, step in earlier.items() if step["code"] == 0 and step["commit"] == now]
    good = True
    for step in wanted(named, passed, steps):
        lacking = missing(step.needs)
        print(
            f"\n[{time.strftime('%H:%M:%S')}] {step.name}",
            f"left out: no {', '.join(lacking)}" if lacking else "",
            flush=True,
        )
        if lacking:
            continue
        done = run(step, path) | {"commit": now}
        results = read(path)  # a benchmark wrote into it
        results["steps"][step.name] = done
        write(path, results)
        if done["code"] != 0:
            good = False
            print(f"FAILED: {step.name} ({done['code']})")
    return good


def main() -> int:
    """What `make gpu-check` does."""
    import torch

    if not torch.cuda.is_available():
        print(
            f"error: PyTorch of {sys.executable} sees no GPU; set PYTHON to a Python whose PyTorch does",
            file=sys.stderr,
        )
        return 1
    out = ROOT / os.environ.get("OUT", "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"gpu-{torch.cuda.get_device_name().lower().replace(' ', '-')}.json"
    good = check(path, os.environ.get("STEPS", "").split(), commit())
    if read(path)["benchmarks"]:
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / "table.py"), str(path)])
    print(f"results: {path}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

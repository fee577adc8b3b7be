"""On a machine with a GPU: install, prove, time and profile, in steps of minutes, into one JSON file per GPU model.

    make gpu-check [PYTHON=python3] [STEPS="risks codes"] [OUT=benchmarks/results] [PEERS="--peer-path var=VAR"]

Without STEPS, those that have not passed with these very sources and versions run in their order: what may be wrong
first, then what is slow, then why; of a step's benchmarks, those that have not. A step that fails or runs out of its
time does not keep the later ones from running, but for `install`; the exit code tells. Steps import ddfast and Triton's
kernels from this folder, the compiled modules from where they are installed. PyTorch, Triton, pytest and NumPy are
enough for all steps but the last ones, which say what they miss.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 480
"""Seconds of a step: a GPU is often to be had for minutes only, and what a step found is kept when it ends."""

SOURCES = (
    "ddfast", "kernels", "csrc", "tests/gpu", "tests/conftest.py", "tests/ops/[!t]*.py", "tests/ops/t[!e]*.py",
    "tests/models/[!t]*.py", "benchmarks/*.py", "CMakeLists.txt", "setup.py", "setup_cuda.py",
    "pyproject.toml",
)  # fmt: skip
"""What a step's outcome depends on: of other tests what those on a GPU borrow from them, of results nothing."""

RISKS = "tests/gpu/test_risks.py"
SANITIZED = "cluster"
"""Which tests compute-sanitizer runs: clusters, staged codes and the second launch, on few rows."""

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
RESUME = "--resume"
"""For benchmarks: leave out what the results have of these sources; not where a step is named."""

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
        needs: programs and packages, with their least major version, without which it is left out.
        installs: what the later steps run; if it fails, none of them does.
    """

    name: str
    command: tuple[str, ...]
    limit: int = LIMIT
    needs: tuple[str, ...] = ()
    installs: bool = False


def _tests(name: str, *arguments: str, **more: Any) -> Step:
    return Step(name=name, command=(*PYTEST, "-m", "gpu", *arguments), **more)


def _benchmark(name: str, *arguments: str, **more: Any) -> Step:
    return Step(name=name, command=(*PYTEST, "-s", "--results", "{results}", RESUME, *arguments), **more)


def _sanitizer(tool: str) -> Step:
    options = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
    command = (*options, *PYTEST, "-m", "gpu", RISKS, "-k", SANITIZED)
    return Step(name=tool, command=command, needs=("compute-sanitizer",))


FULL = ("einops", "safetensors", "tyro", "nvtx", "tomli_w", "tqdm", "PIL")
"""Packages of whole models and commands."""

BUILD = ("pip>=1", "setuptools>=77", "pybind11>=2", "cmake", "ninja")
"""What pyproject.toml has pip fetch for a build, which a machine without a network has or has not."""

PROFILED = "sample_codes and llamagen"

STEPS = (
    Step(name="install", command=INSTALL, needs=BUILD, installs=True),
    _tests("risks", RISKS),
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
    return [need for need in needs if not _is_here(*need.split(">="))]


def _is_here(name: str, least: str = "0") -> bool:
    if not shutil.which(name) and importlib.util.find_spec(name) is None:
        return False
    return least == "0" or int(_version(name).partition(".")[0]) >= int(least)


def _version(package: str) -> str:
    """ "0" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "0"


@functools.cache
def fingerprint(root: Path = ROOT) -> str:
    """What counts as the same thing checked: a hash of the sources and of the versions of Python, PyTorch, Triton."""
    digest = hashlib.sha256(f"{platform.python_version()} {_version('torch')} {_version('triton')}".encode())
    found = {file for pattern in SOURCES for place in root.glob(pattern) for file in (place, *place.rglob("*"))}
    for file in sorted(found):
        if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".so":
            content = file.read_bytes()
            digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def commit() -> str:
    """The commit, for who reads the results, with a mark where files differ from it; "unknown" without git."""
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


@contextlib.contextmanager
def source_tree() -> Iterator[dict[str, str]]:
    """An environment in which ddfast and Triton's kernels are those of this folder, installed or not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "ddfast_kernels").symlink_to(ROOT / "kernels", target_is_directory=True)
        places = [str(ROOT), folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        yield {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


def run(step: Step, path: Path, *, anew: bool = False) -> dict[str, Any]:
    """Run a step; its exit code ("timeout" if it ran out of its time), seconds and last lines.

    At its end nothing runs any more of what it has started: a kernel that hangs would hold the GPU.
    """
    command = [word.replace("{results}", str(path)) for word in step.command if not (anew and word == RESUME)]
    began = time.monotonic()
    log = path.with_name(f"{path.stem}-{step.name}.log")
    code: int | str
    # pip must not take the folder that it installs from for an installed package.
    around = contextlib.nullcontext(None) if step.installs else source_tree()
    with log.open("w") as output, around as environment:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=step.limit)
        except subprocess.TimeoutExpired:
            code = "timeout"
        finally:  # also of Ctrl-C, which a session of its own does not get
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(lines[-40:]))
    return {
        "code": code,
        "seconds": round(time.monotonic() - began, 1),
        "command": shlex.join(command),
        "tail": lines[-15:],
    }


def check(path: Path, named: Sequence[str], now: str, steps: Sequence[Step] = STEPS) -> bool:
    """Run what is wanted, writing after every step; returns whether all of it passed.

    Args:
        path: the results.
        named: steps that run whatever has passed; empty: all that have not.
        now: `fingerprint()`.
        steps: all that there are.
    """
    earlier = read(path)["steps"]
    passed = [name for name, step in earlier.items() if step["code"] == 0 and step.get("sources") == now]
    if _version("ddfast") == "0":  # another environment than that of the results
        passed = [name for name in passed if name not in {step.name for step in steps if step.installs}]
    good = True
    for step in wanted(named, passed, steps):
        lacking = missing(step.needs)
        print(
            f"\n[{time.strftime('%H:%M:%S')}] {step.name}",
            f"left out: no {', '.join(lacking)}" if lacking else "",
            flush=True,
        )
        if lacking:
            if step.installs:
                cuda = "do not" if importlib.util.find_spec("ddfast_cuda") is None else "as installed before"
                print(f"Triton's kernels run from this folder, CUDA's {cuda}")
            continue
        done = run(step, path, anew=bool(named)) | {"sources": now, "commit": commit()}
        results = read(path)  # a benchmark wrote into it
        results["steps"][step.name] = done
        write(path, results)
        if done["code"] != 0:
            good = False
            print(f"FAILED: {step.name} ({done['code']})")
            if step.installs:
                print("nothing else was run: it would be what was installed before")
                break
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `run` ends what it has started
    good = check(path, os.environ.get("STEPS", "").split(), fingerprint())
    if read(path)["benchmarks"]:
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / "table.py"), str(path)])
    print(f"results: {path}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

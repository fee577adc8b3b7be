"""What of the CUDA module can be built here: by which compiler, for which GPUs, with how many compilers at once.

setup.py builds what `plan` says. An architecture is written as CMake writes it: 90-real is machine code for sm_90,
90-virtual its PTX, which a driver translates for newer GPUs; "90" stands for both.
"""

from __future__ import annotations

import functools
import math
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS = ("80", "86", "89", "90a", "100", "120")
"""Built where neither the environment nor a GPU says what for: A100, RTX 30 and 40, H100, B200, RTX 50."""

LEAST = 80
"""Compute capability that the kernels need, times 10."""

NAMES = {
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}
"""What PyTorch understands by names in TORCH_CUDA_ARCH_LIST."""

MEMORY_PER_COMPILER = 1 << 30
"""Bytes; nvcc 13.0 and g++ 12 took a quarter of it at most, whatever the file."""

OWN_GPU = "the GPU of this machine"

TOOLKIT = "/usr/local/cuda"
"""Where a CUDA toolkit lies if nothing says otherwise."""

ELSEWHERE = f"CUDA_HOME={TOOLKIT} pip install ."
"""The command that builds with the toolkit in that folder."""


class LeftOut(Exception):
    """The CUDA module cannot be built; the text is one line that says why and what to do."""


@dataclass(frozen=True)
class Wish:
    """Architectures and who asks for them: a variable, the machine's GPU, or nobody (empty).

    `unreadable`: what the variable has besides.
    """

    architectures: tuple[str, ...]
    by: str = ""
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What to build.

    Attributes:
        architectures: at least one.
        left_out: a line that says what of the wish is not among them, why, and what to do; empty: nothing.
        unmet: whether a variable asks for what is left out, and another compiler or value would mend it.
    """

    architectures: tuple[str, ...]
    left_out: str = ""
    unmet: bool = False


def flag(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "0") not in ("", "0")


def decision(environment: Mapping[str, str]) -> tuple[Compiler, Plan]:
    """The compiler and what it shall build on this machine.

    Raises:
        LeftOut: nothing; or, where DDFAST_CUDA=1 asks for the module, less than a variable names.
    """
    if flag(environment, "DDFAST_NO_CUDA"):
        raise LeftOut("DDFAST_NO_CUDA=1 was set; without it `pip install .` builds the module")
    nvcc = Compiler(environment)
    found = plan(wish(environment, lambda: gpus(environment)), functools.cache(nvcc.knows), str(nvcc))
    if found.unmet and flag(environment, "DDFAST_CUDA"):
        raise LeftOut(found.left_out)
    if refusal := nvcc.refusal(found.architectures[0].split("-")[0]):
        raise LeftOut(refusal)
    return nvcc, found


def plan(wanted: Wish, knows: Callable[[str], bool], compiler: str) -> Plan:
    """What of a wish can be built.

    Where the compiler does not know a kind, the same without its letter is built (sm_90 for sm_90a), else PTX of the
    newest before it, which a driver translates.

    Args:
        knows: whether the compiler knows a kind ("90a").
        compiler: its name, for the line.

    Raises:
        LeftOut: nothing remains.
    """
    built: dict[str, None] = {}  # an ordered set
    unknown: dict[str, str] = {}
    too_old: dict[str, None] = {}
    for architecture in wanted.architectures:
        kind, form = architecture.split("-")
        number = kind.rstrip("af")
        older = [other.rstrip("af") for other in reversed(KINDS) if int(other.rstrip("af")) < int(number)]
        if int(number) < LEAST:
            too_old[f"sm_{kind}"] = None
        elif knows(kind):
            built[architecture] = None
        elif kind != number and knows(number):
            unknown[f"sm_{kind}"] = f"sm_{number}"
            built[f"{number}-{form}"] = None
        else:
            newest = next(filter(knows, older), None)
            unknown[f"sm_{kind}"] = f"PTX of sm_{newest}" if newest else ""
            if newest:
                built[f"{newest}-virtual"] = None
    by = f" ({wanted.by})" if wanted.by else ""
    lines = []
    if wanted.unreadable:
        lines.append(f"{', '.join(wanted.unreadable)}{by} is no architecture that ddfast knows, as 9.0 or 90 are")
    if too_old:
        lines.append(f"{', '.join(too_old)}{by}: the kernels need compute capability {LEAST / 10} or more")
    if unknown:
        stand_ins = ", ".join(dict.fromkeys(filter(None, unknown.values())))
        lines.append(
            f"{', '.join(unknown)}{by}{f' ({stand_ins} instead)' if stand_ins else ''}: {compiler} does not know it; "
            f"install a newer CUDA toolkit and run `{ELSEWHERE}`"
        )
    elif not built:
        lines.append(f"for a GPU of another machine name its kind, `CUDAARCHS={LEAST} pip install .`")
    if not built:
        raise LeftOut("; ".join(lines))
    named = wanted.by not in ("", OWN_GPU)
    return Plan(tuple(built), "; ".join(lines), named and bool(unknown or wanted.unreadable))


def wish(environment: Mapping[str, str], gpus: Callable[[], Sequence[int]]) -> Wish:
    """What to build for: CMAKE_ARGS, CUDAARCHS or TORCH_CUDA_ARCH_LIST name it, else the machine's GPUs, else `KINDS`.

    Args:
        environment: as os.environ.
        gpus: compute capabilities times 10; called where they decide.
    """
    for by, value, parse in (
        ("CMAKE_ARGS", cmake_definitions(environment).get("CMAKE_CUDA_ARCHITECTURES"), _of_cmake),
        ("CUDAARCHS", environment.get("CUDAARCHS"), _of_cmake),
        ("TORCH_CUDA_ARCH_LIST", environment.get("TORCH_CUDA_ARCH_LIST"), _of_torch),
    ):
        parsed = {entry: parse(entry) for entry in re.split(r"[;,\s]+", value or "") if entry}
        if not parsed:
            continue
        if parsed.keys() & {"all", "all-major"}:
            return _every_kind()
        if "native" in parsed:
            break
        unreadable = tuple(entry for entry, found in parsed.items() if not found)
        return Wish(tuple(dict.fromkeys(one for found in parsed.values() for one in found)), by, unreadable)
    kinds = sorted(set(gpus()))
    return Wish(tuple(f"{_kind(gpu)}-real" for gpu in kinds), OWN_GPU) if kinds else _every_kind()


def _every_kind() -> Wish:
    """`KINDS`, and PTX of the newest for those to come."""
    return Wish((*(f"{kind}-real" for kind in KINDS), f"{KINDS[-1]}-virtual"))


def _kind(number: int) -> str:
    """As `KINDS` has it: Hopper is 90a."""
    return next((kind for kind in KINDS if kind.rstrip("af") == str(number)), str(number))


def _of_cmake(entry: str) -> list[str]:
    """Of 90, 90a-real, 90-virtual; empty: it is none."""
    found = re.fullmatch(r"(\d{2,3}[af]?)(-real|-virtual)?", entry)
    return [f"{found[1]}{form}" for form in ([found[2]] if found[2] else ["-real", "-virtual"])] if found else []


def _of_torch(entry: str) -> list[str]:
    """Of 9.0, 9.0a+PTX, Hopper; empty: it is none."""
    if entry in NAMES:
        return [one for version in NAMES[entry].split(";") for one in _of_torch(version)]
    found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
    return [f"{found[1]}{found[2]}{form}" for form in ("-real", "-virtual")[: 2 if found[3] else 1]] if found else []


def words(environment: Mapping[str, str], name: str) -> list[str]:
    """A variable's value (CMAKE_ARGS) as a shell would split it."""
    value = environment.get(name, "")
    try:
        return shlex.split(value)
    except ValueError as error:
        raise SystemExit(f"ddfast: {name} is {value!r}: {error}") from error


def cmake_definitions(environment: Mapping[str, str]) -> dict[str, str]:
    """Name and value of every -D in CMAKE_ARGS."""
    found = (re.fullmatch(r"-D(\w+)(?::\w+)?=(.*)", one) for one in words(environment, "CMAKE_ARGS"))
    return {one[1]: one[2] for one in found if one}


class Compiler:
    """nvcc with the settings that it has under CMake.

    Raises:
        LeftOut: there is none.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        defined = cmake_definitions(environment)
        named = defined.get("CMAKE_CUDA_COMPILER") or environment.get("CUDACXX")
        homes = [environment[name] for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
        if named:
            path = shutil.which(named, path=environment.get("PATH"))
        else:
            folders = [*(os.path.join(home, "bin") for home in homes), *environment.get("PATH", "").split(os.pathsep)]
            path = shutil.which("nvcc", path=os.pathsep.join([*folders, os.path.join(TOOLKIT, "bin")]))
        if path is None:
            raise LeftOut(
                f"no nvcc, CUDA's compiler, was found{f' as {named}' if named else ''}; for a GPU of NVIDIA's install "
                f"the CUDA toolkit and run `{ELSEWHERE}`"
            )
        self.path = path
        self._environment = dict(environment)
        host = defined.get("CMAKE_CUDA_HOST_COMPILER") or environment.get("CUDAHOSTCXX")
        flags = words(defined, "CMAKE_CUDA_FLAGS") or words(environment, "CUDAFLAGS")
        self._options = [*flags, *([f"-ccbin={host}"] if host else [])]
        _, self.version = output_of([path, "--version"], self._environment)
        """What the compiler says of itself."""

    def __str__(self) -> str:
        release = re.search(r"release (\d+\.\d+)", self.version)
        return f"nvcc {release[1]} ({self.path})" if release else f"nvcc ({self.path})"

    def knows(self, kind: str) -> bool:
        """By a compilation without doing it: `--list-gpu-code` has no 90a, and not every version has that option."""
        return self._compile(kind, "--dryrun")[0]

    def refusal(self, kind: str) -> str:
        """A line on why it cannot compile an empty file, and what to do; empty: it can."""
        compiles, output = self._compile(kind)
        if compiles:
            return ""
        if newest := re.search(r"(gcc|clang) versions? (?:later than|must be less than) (\d+)", output):
            version = int(newest[2]) - (newest[1] == "clang")
            host = f"g++-{version}" if newest[1] == "gcc" else f"clang++-{version}"
            return (
                f"{self} takes no {newest[1]} newer than {version}; install that and run "
                f"`CUDAHOSTCXX={host} pip install .`, or a newer CUDA toolkit and run `{ELSEWHERE}`"
            )
        said = [line.strip() for line in output.splitlines() if re.search("error|fatal", line)]
        return (
            f"{self} cannot compile an empty file ({said[0] if said else 'without a word'}); mend it, or install "
            f"another CUDA toolkit and run `{ELSEWHERE}`"
        )

    def _compile(self, kind: str, *options: str) -> tuple[bool, str]:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "empty.cu")
            source.touch()
            target = f"-gencode=arch=compute_{kind},code=sm_{kind}"
            command = [self.path, *self._options, *options, target, "-c", str(source), "-o", f"{source}.o"]
            status, output = output_of(command, self._environment)
            return status == 0, output


def gpus(environment: Mapping[str, str]) -> list[int]:
    """Compute capabilities, times 10, of the machine's GPUs, as nvidia-smi has them; empty: it has none."""
    path = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if path is None:
        return []
    status, output = output_of([path, "--query-gpu=compute_cap", "--format=csv,noheader"], environment)
    return (
        [10 * int(major) + int(minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", output, re.M)]
        if not status
        else []
    )


def output_of(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Exit status and output; what cannot be started, or hangs, has failed."""
    try:
        done = subprocess.run(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=120,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, f"error: {error}"
    return done.returncode, done.stdout


def jobs(environment: Mapping[str, str], cpus: int, memory: int | None) -> int:
    """How many compilers may run at once.

    Args:
        environment: MAX_JOBS says it, else CMAKE_BUILD_PARALLEL_LEVEL.
        cpus, memory: as `resources` has them.
    """
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        value = environment.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return max(1, min(cpus, cpus if memory is None else memory // MEMORY_PER_COMPILER))


def resources(root: Path = Path("/")) -> tuple[int, int | None]:
    """CPUs that this process may use and free bytes (None: unknown), under the limits of its control groups.

    Args:
        root: where /proc and /sys are.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"), re.M)
    memory = [1024 * int(available[1])] if available else []
    for folder in _control_groups(root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            memory += [int(word) for word in _text(folder / name).split() if word.isdecimal()]
        names = ("cpu.max",) if (folder / "cpu.max").exists() else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        quota = [int(word) for name in names for word in _text(folder / name).split() if word.isdecimal()]
        if len(quota) == 2:  # microseconds of CPUs in so many of time; no limit is "max" or -1
            cpus = min(cpus, max(1, math.ceil(quota[0] / quota[1])))
    return cpus, min(memory, default=None)


def _control_groups(root: Path) -> Iterator[Path]:
    """Folders of this process's groups and of those around them, of version 2 and 1."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        top = root / "sys/fs/cgroup" / controllers
        own = top / path.lstrip("/")
        yield from (own, *(parent for parent in own.parents if parent == top or top in parent.parents))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

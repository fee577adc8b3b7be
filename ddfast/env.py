"""Every environment variable that ddfast reads at run time, in one place; `ddfast doctor` lists them.

(What `setup.py` and `setup_cuda.py` read at build time is in README.md.)
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ddfast.errors import DDFastError

VARIABLES = {
    "DDFAST_CACHE": "folder of trained tokenizers, teachers and classifiers (default: ~/.cache/ddfast)",
    "DDFAST_BACKEND": "backends: 'cuda,triton' is preferred for all ops; 'noise=cpu' or 'noise=cpu:cuda' must run",
    "DDFAST_VERIFY": "0: kernels run on a GPU though nothing has shown that they are right there (default: 1)",
    "DDFAST_ISA": "instruction set of the CPU kernels: avx512, avx2, neon or baseline (default: the best one here)",
    "TRITON_INTERPRET": "1: Triton kernels run in its interpreter, on CPU tensors too (for tests; never by itself)",
    "CC": "C compiler with which Triton builds the launches of its kernels (default: gcc, else clang)",
    "TRITON_PTXAS_PATH": "assembler that Triton takes (default: the one that it brings)",
    "RANK": "number of this process, set by torchrun; 0 prints and writes (default: 0)",
    "WORLD_SIZE": "how many processes share the work, set by torchrun (default: 1)",
    "LOCAL_RANK": "number among those on this machine, set by torchrun: which GPU --device cuda is (default: 0)",
    "LOCAL_WORLD_SIZE": "how many share this machine's memory, and a network's shards, set by torchrun (default: 1)",
    "TORCHELASTIC_RESTART_COUNT": "how often torchrun has started the processes again, set by it (default: 0)",
}


def settings() -> dict[str, str | None]:
    """Name and current value (None: unset) of every variable in `VARIABLES`."""
    return {name: os.environ.get(name) for name in VARIABLES}


def cache_dir() -> Path:
    """Folder that holds trained teachers between runs; created by whoever writes to it.

    Without a home (a container whose user has no entry in passwd) it is among the temporary files.

    Raises:
        DDFastError: DDFAST_CACHE begins with the home of somebody who has none.
    """
    value = os.environ.get("DDFAST_CACHE")
    try:
        return Path(value or "~/.cache/ddfast").expanduser()
    except RuntimeError as error:
        if value:
            raise DDFastError(f"DDFAST_CACHE is {value!r}: {error}") from error
        user = os.getuid() if hasattr(os, "getuid") else "cache"
        return Path(tempfile.gettempdir()) / f"ddfast-{user}"


def backend_setting() -> str:
    """`DDFAST_BACKEND` as it is; empty: unset."""
    return os.environ.get("DDFAST_BACKEND", "")


def backend_overrides() -> dict[str, tuple[str, ...]]:
    """`DDFAST_BACKEND` as {op: backends in their order}; the key "*" stands for every op."""
    return _backend_overrides(backend_setting())


@functools.lru_cache(maxsize=8)
def _backend_overrides(value: str) -> dict[str, tuple[str, ...]]:
    overrides: dict[str, tuple[str, ...]] = {}
    for item in filter(None, map(str.strip, value.split(","))):
        op, separator, backends = item.partition("=")
        if separator:
            overrides[op.strip()] = tuple(name.strip() for name in backends.split(":"))
        else:
            overrides["*"] = (*overrides.get("*", ()), item)
    return overrides


def verifies() -> bool:
    """Whether a kernel has to be shown right on a GPU before it runs there by itself (`DDFAST_VERIFY`)."""
    return os.environ.get("DDFAST_VERIFY", "1").lower() not in ("0", "false", "no", "off")


def of_a_verifier() -> dict[str, str]:
    """The environment of a process that verifies kernels: no rank of torchrun's, no wish for a backend.

    It finds the modules that this process finds, those of the working directory ('') only if this one does.
    """
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "DDFAST_BACKEND")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    modules = (path or os.getcwd() for path in sys.path if isinstance(path, str))
    return kept | {"PYTHONPATH": os.pathsep.join(modules), "DDFAST_VERIFY": "0"}


def isa() -> str | None:
    """`DDFAST_ISA`, or None to let the native module choose."""
    return os.environ.get("DDFAST_ISA") or None


def triton_interpreted() -> bool:
    """Whether Triton's own switch for its interpreter is on."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def c_compiler() -> str | None:
    """Path of the C compiler that Triton would take, or None."""
    given = os.environ.get("CC")
    return shutil.which(given) if given is not None else shutil.which("gcc") or shutil.which("clang")


def triton_assembler() -> str | None:
    """Path of the assembler that Triton is told to take, or None."""
    return os.environ.get("TRITON_PTXAS_PATH") or None


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes (torchrun's convention)."""
    return _number("RANK", 0), _number("WORLD_SIZE", 1)


def local_rank_and_world_size() -> tuple[int, int]:
    """This process's rank among those on this machine, and their number (torchrun's convention)."""
    return _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)


def restarts() -> int:
    """How often torchrun has started this job again."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def check_one_process(what: str, *, several: Sequence[str]) -> None:
    """Raise where torchrun has started several processes for `what`, which is written for one.

    Args:
        what: as the message names it.
        several: the commands that several processes may run.

    Raises:
        DDFastError: always then, before anything is written.
    """
    _, world_size = rank_and_world_size()
    if world_size > 1:
        raise DDFastError(
            f"{what} runs in one process, and torchrun started {world_size} (WORLD_SIZE): start it without torchrun; "
            f"only {', '.join(several)} run in several"
        )


def _number(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise DDFastError(f"the environment variable {name} is {value!r}, expected a number as torchrun sets it")
    return int(value)


def package_version(name: str) -> str:
    """Of an installed package, by its name on PyPI, or "not installed"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

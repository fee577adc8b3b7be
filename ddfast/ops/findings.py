"""What was found out about the kernels on this machine's GPUs: which are right, and which order is fastest.

One JSON file in ddfast's cache folder, for all GPUs and versions that it has met: what was found with one GPU, driver,
PyTorch or kernel says nothing of another. A file that cannot be read or written is done without, after one warning.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddfast import env, messages
from ddfast.errors import DDFastError, first_line
from ddfast.files import expect, parse_json, write_atomically
from ddfast.ops import native

FILE = "kernels.json"
_FORMAT = 1
_KEPT = 32
"""GPUs and versions that the file remembers; the one not written for longest makes room."""


class Check(NamedTuple):
    """A kernel's results for one dtype and dimension (of codes or a head; 0: any), against the reference."""

    op: str
    backend: str
    dtype: torch.dtype
    dim: int

    @property
    def name(self) -> str:
        """As in the file."""
        return f"{self.op} {self.backend} {_short(self.dtype)} {self.dim}"


class Verdict(NamedTuple):
    """Whether a kernel may run by itself, and what to tell of it.

    final: that will be so next time too, as long as this process runs.
    kept: also for other processes, in the file.
    """

    passed: bool
    text: str
    final: bool = True
    kept: bool = True


class Order(NamedTuple):
    """Backends from the fastest on, and where that comes from."""

    order: tuple[str, ...]
    reason: str


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def path() -> Path:
    """The file."""
    return env.cache_dir() / FILE


def index_of(device: torch.device) -> int:
    """The GPU's number; that of the current one where the device names none."""
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def identity(index: int) -> dict[str, Any]:
    """All that a finding depends on: the GPU, its driver, versions, and the kernels themselves."""
    properties = torch.cuda.get_device_properties(index)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": env.package_version("triton"),
        "ddfast": env.package_version("ddfast"),
        "kernels": kernels_hash(),
    }


@functools.cache
def kernels_hash() -> str:
    """Sixteen hex digits of the Triton sources, of the CUDA module and of the ops that call them."""
    digest = hashlib.sha256()
    folders = [Path(__file__).parent]
    found = importlib.util.find_spec("ddfast_kernels")
    if found is not None and found.origin:
        folders.append(Path(found.origin).parent)
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    module = getattr(native.cuda, "__file__", None)
    if module:
        files.append(Path(module))
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _driver() -> str:
    """The driver's version as Linux tells it, else the CUDA version that it brings."""
    with contextlib.suppress(OSError):
        words = Path("/proc/driver/nvidia/version").read_text().split("\n")[0].split()
        numbers = [word for word in words if word[:1].isdigit() and "." in word]
        if numbers:
            return numbers[0]
    version = getattr(native.cuda, "driver_version", None)
    return str(version()) if callable(version) else "unknown"


def machine_key(index: int) -> str:
    """What the file calls this GPU with these versions."""
    return hashlib.sha256(json.dumps(identity(index), sort_keys=True).encode()).hexdigest()[:16]


_read: dict[tuple[Path, str], dict[str, Any]] = {}
"""What the file said when it was last read, and what was found since, by file and machine."""


def of(device: torch.device, *, again: bool = False) -> dict[str, Any]:
    """{"verdicts": {check: [passed, text]}, "orders": {sizes: {...}}} of a GPU; read once, or `again`."""
    index = index_of(device)
    key = (path(), machine_key(index))
    if again or key not in _read:
        kept = _read.get(key, {"verdicts": {}, "orders": {}})
        saved = _load(path()).get(key[1], {})
        _read[key] = {table: {**kept[table], **saved.get(table, {})} for table in kept}
    return _read[key]


def add(device: torch.device, table: str, found: Mapping[str, Any]) -> None:
    """Remember findings, of the table "verdicts" or "orders", here and in the file, beside what others wrote there."""
    index = index_of(device)
    of(device)[table].update(found)
    try:
        machines = _load(path(), quiet=True)
        mine = machines.pop(machine_key(index), {"verdicts": {}, "orders": {}})
        mine["identity"] = identity(index)
        mine[table] = {**mine.get(table, {}), **found}
        machines[machine_key(index)] = mine
        recent = dict(list(machines.items())[-_KEPT:])
        write_atomically(path(), json.dumps({"format": _FORMAT, "machines": recent}, indent=1) + "\n")
    except DDFastError as error:
        messages.warn_once(f"{error}: what is found about this GPU's kernels is found anew by every process")


def orders_on_file(device: torch.device) -> dict[str, Any]:
    """What `ddfast tune` found for a GPU and the file has."""
    return dict(_load(path(), quiet=True).get(machine_key(index_of(device)), {}).get("orders", {}))


def forget_orders(device: torch.device) -> int:
    """Remove what `ddfast tune` found for a GPU, here and in the file; its verdicts stay. Returns how many there were.

    Raises:
        DDFastError: the file cannot be written.
    """
    with locked():
        machines = _load(path(), quiet=True)
        orders = machines.get(machine_key(index_of(device)), {}).pop("orders", {})
        if orders:
            write_atomically(path(), json.dumps({"format": _FORMAT, "machines": machines}, indent=1) + "\n")
    of(device)["orders"].clear()
    return len(orders)


def _load(file: Path, *, quiet: bool = False) -> dict[str, Any]:
    """The file's machines; nothing where it is missing, damaged or of another format."""
    try:
        content = expect(parse_json(file.read_bytes()), dict[str, Any])
        if content.get("format") != _FORMAT:
            return {}
        machines = expect(content.get("machines"), dict[str, dict[str, Any]], "machines")
        for machine in machines.values():
            expect(machine.get("verdicts", {}), dict[str, tuple[bool, str]], "verdicts")
            for timed in expect(machine.get("orders", {}), dict[str, dict[str, Any]], "orders").values():
                for name, kind in _TIMED.items():
                    expect(timed.get(name), kind, name)
        return machines
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        if not quiet:
            messages.warn_once(f"{file} cannot be used ({first_line(error)}): kernels are verified anew")
        return {}


_TIMED = {"order": list[str], "reason": str, "rows": int, "size": int}
"""What an entry of the orders has."""


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Keep other processes out, where the cache folder allows that: one of them verifies, the others read."""
    try:
        import fcntl

        lock = path().with_suffix(".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except (ImportError, OSError):
        yield
        return
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def order(device: torch.device, op: str, dtype: torch.dtype, dim: int, rows: int, size: int) -> Order | None:
    """What `ddfast tune` found for the nearest sizes; None where it timed nothing like it on this GPU."""
    kind = f"{op} {_short(dtype)} {dim} "
    timed = [entry for name, entry in of(device)["orders"].items() if name.startswith(kind)]
    if not timed:
        return None

    def distance(entry: Mapping[str, Any]) -> float:
        sizes = ((entry["rows"], rows), (entry["size"], size))
        return sum(abs(math.log(max(there, 1) / max(here, 1))) for there, here in sizes if there)

    nearest = min(timed, key=distance)
    return Order(tuple(nearest["order"]), nearest["reason"])

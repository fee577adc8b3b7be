"""What a recorded run says of its machine: versions and the command, no host name.

Without pytest-benchmark, benchmarks that measure by themselves still run: a stand-in takes what they found.
"""

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_check import fingerprint

from ddfast.ops import native

_PACKAGES = ("ddfast", "torch", "triton", "numpy", "faiss-cpu", "vector-quantize-pytorch")


def about_this_machine() -> dict[str, Any]:
    """Versions, threads, GPU and command."""
    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "cpu_kernels": native.cpu_reason,
        "command": shlex.join(["pytest", *sys.argv[1:]]),
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    for private in ("node", "release", "python_build"):
        machine_info.pop(private, None)
    machine_info.update(about_this_machine())


class Measured:
    """In pytest-benchmark's place: holds what a benchmark has found out by itself."""

    def __init__(self, name: str) -> None:
        self.name, self.extra_info = name, dict[str, Any]()

    def pedantic(self, call: Any, **_: Any) -> Any:
        """Call it once."""
        return call()


class InItsPlace:
    """What stands in for pytest-benchmark where that is not there."""

    @pytest.fixture
    def benchmark(self, request) -> Measured:
        return Measured(request.node.name)


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(InItsPlace())


_passed = pytest.StashKey[bool]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call":
        item.stash[_passed] = report.passed


@pytest.fixture(autouse=True)
def kept(request) -> Iterator[None]:
    """With --results FILE, what a benchmark found out is in that file as soon as it ends.

    With --resume, it does not run where the file has what it found out and these sources passed it.
    """
    path = request.config.getoption("--results")
    results = json.loads(path.read_text()) if path is not None and path.exists() else {}
    if request.config.getoption("--resume"):
        for benchmark in results.get("benchmarks", []):
            if benchmark["name"] == request.node.name and benchmark.get("sources") == fingerprint():
                pytest.skip(f"measured with these sources already: {path}")
    yield
    found = getattr(request.node.funcargs.get("benchmark"), "extra_info", None)
    if path is None or not found:
        return
    results = json.loads(path.read_text()) if path.exists() else {"steps": {}}
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    machine = about_this_machine()
    entry = {"name": request.node.name, "extra_info": dict(found), "command": machine.pop("command")}
    entry["commit"] = done.stdout.strip() or "unknown"
    entry["sources"] = fingerprint() if request.node.stash.get(_passed, False) else None  # None: measured, but failed
    others = [benchmark for benchmark in results.get("benchmarks", []) if benchmark["name"] != entry["name"]]
    results["machine_info"] = machine | {"cpu": {}, "processor": platform.machine(), "command": "make gpu-check"}
    results["commit_info"] = {"id": entry["commit"]}
    results["benchmarks"] = [*others, entry]
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(results, indent=1, default=str) + "\n")
    temporary.replace(path)


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, default=None, metavar="FILE", help="add what is measured to a JSON file")
    parser.addoption("--resume", action="store_true", help="leave out what these sources measured into it already")
    parser.addoption(
        "--peer-path",
        action="append",
        default=[],
        metavar="FAMILY=CHECKOUT",
        help="time the official code too: var=..., llamagen=... (checkouts of the official repositories)",
    )


@pytest.fixture
def peer_paths(request) -> dict[str, Path]:
    """Checkouts of official repositories by family, as given by --peer-path."""
    paths = {}
    for item in request.config.getoption("--peer-path"):
        family, separator, path = item.partition("=")
        if not separator or not Path(path).is_dir():
            raise pytest.UsageError(f"--peer-path: got {item!r}, expected var=FOLDER or llamagen=FOLDER")
        paths[family] = Path(path)
    return paths

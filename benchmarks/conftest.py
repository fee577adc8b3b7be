"""What a recorded run says of its machine: versions and the command, no host name."""

import importlib.metadata
import shlex
import sys
from pathlib import Path

import pytest
import torch

from ddfast.ops import native

_PACKAGES = ("ddfast", "torch", "triton", "numpy", "faiss-cpu", "vector-quantize-pytorch")


def pytest_benchmark_update_machine_info(config, machine_info):
    for private in ("node", "release", "python_build"):
        machine_info.pop(private, None)
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info["cpu_kernels"] = native.cpu_reason
    machine_info["command"] = shlex.join(["pytest", *sys.argv[1:]])
    for name in _PACKAGES:
        try:
            machine_info[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            machine_info[name] = None


def pytest_addoption(parser):
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

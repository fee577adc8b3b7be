"""What a recorded run says of its machine: versions and the command, no host name."""

import importlib.metadata
import shlex
import sys

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

"""Every op's way to its Triton kernels on a GPU, up to the device."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddfast.ops import dispatch


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_every_op_launches():
    """A compile error here is one that only a launch's own arguments bring about, such as a size of 1."""
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(here.parent / "ops")}
    command = [sys.executable, "-W", "ignore", str(here / "launch_kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert all(int(line[-1]) > 0 for line in lines)
    assert {line[0] for line in lines} == {op for op, backends in dispatch.KERNELS.items() if "triton" in backends}

"""Every op's way to its Triton kernels on a GPU, up to the device."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddfast.ops import dispatch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def launched(*arguments: str) -> list[str]:
    """The lines that launch_kernels.py prints."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent / "ops"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", str(here / "launch_kernels.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.full
@needs_triton
def test_every_op_launches():
    """A compile error here is one that only a launch's own arguments bring about, such as a size of 1."""
    lines = [line.split() for line in launched()]
    assert all(int(line[-1]) > 0 for line in lines)
    assert {line[0] for line in lines} == {op for op, backends in dispatch.KERNELS.items() if "triton" in backends}


@needs_triton
def test_var_compiles_few_kernels():
    """One of each (20 once): no size of a scale or a batch makes another, nor a setting written as a whole number."""
    first, *later = json.loads(launched("decoding")[-1])
    assert first == {"filter_logits_kernel": 1, "flow_sample_kernel": 1, "activate_kernel": 1}
    assert later == [{}, {}]

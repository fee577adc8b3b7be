"""The bindings by themselves (native_bindings.py): in a process of its own, which a finding may end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sanitized

pytest.importorskip("ddfast_native")
HERE = Path(__file__).parent


def passes(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=sanitized.ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]


def test_bindings_refuse_or_come_back() -> None:
    passes([str(HERE / "native_bindings.py"), "--cases", "150"], {})


@pytest.fixture(scope="module")
def under_sanitizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if sanitized.missing():
        pytest.skip(f"no build under sanitizers: {sanitized.missing()}")
    folder = tmp_path_factory.mktemp("sanitized")
    sanitized.build(folder)
    return sanitized.environment(folder)


@pytest.mark.full
def test_bindings_under_sanitizers(under_sanitizers: dict[str, str]) -> None:
    passes([str(HERE / "native_bindings.py"), "--cases", "1000", "--seed", "1000"], under_sanitizers)


@pytest.mark.full
@pytest.mark.parametrize("tests", ["tests/native", "tests/fuzz/test_ops.py"])
def test_tests_under_sanitizers(under_sanitizers: dict[str, str], tests: str) -> None:
    """Those of the kernels and of the ops, in this machine's instruction sets."""
    options = ["-p", "no:cacheprovider", "-m", "not full and not slow", "--ignore=tests/native/test_packaging.py"]
    passes(["-m", "pytest", tests, *options], under_sanitizers)


@pytest.mark.full
def test_a_read_behind_an_array_ends_a_sanitized_process(under_sanitizers: dict[str, str]) -> None:
    """So that the tests above can fail: seven floats where eight are said to be.

    Not in AVX-512, whose masked reads g++ does not look at: for those arrays end at a page's end without sanitizers.
    """
    code = (
        "import numpy as np, ddfast_native as n\n"
        "n.set_isa('baseline')\n"
        "x, out = np.zeros(7, np.float32), np.zeros(8, np.float32)\n"
        "n.activate(x.ctypes.data, 8, 0, 0, out.ctypes.data, 0, 1, 8, True, 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | under_sanitizers, capture_output=True, text=True
    )
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr

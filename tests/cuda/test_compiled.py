"""What nvcc makes of the kernels: every file compiles, and the hot ones keep to their registers."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def report(source: Path, architectures: list[int], out: Path) -> str:
    """The assembler's words on every kernel of a file."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    options = ["-std=c++17", "-O3", "-fmad=false", "--threads=0", "-Xptxas=-v", "-c", "-o", str(out)]
    done = subprocess.run([NVCC, *options, *targets, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def hot_kernels(source: Path) -> set[str]:
    """Names of the kernels whose line says `// hot`."""
    return set(re.findall(r"\b(\w+_kernel)\(.*\{  // hot$", source.read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", sorted(path.name for path in KERNELS.glob("*.cu")))
def test_hot_kernels_neither_spill_nor_use_a_stack(name, tmp_path):
    source = KERNELS / name
    text = report(source, [90], tmp_path / "object.o")
    hot = hot_kernels(source)
    assert hot or name == "noise.cu"
    entries = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads",
        text,
        re.DOTALL,
    )
    assert entries
    for kernel in hot:
        assert any(kernel in symbol for symbol, *_ in entries), kernel
    for symbol, *sizes in entries:
        if any(kernel in symbol for kernel in hot):
            assert sizes == ["0", "0", "0"], f"{symbol}: stack, spill stores, spill loads: {sizes}"

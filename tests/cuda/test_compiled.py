"""What nvcc makes of the kernels: the hot ones keep to their registers, on every target that is built."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sass import cuobjdump

from ddfast.ops import native

KERNELS = Path(__file__).parents[2] / "kernels"
SOURCES = sorted(path.name for path in KERNELS.glob("*.cu"))


def hot_kernels(source: Path) -> set[str]:
    """Names of the kernels whose line says `// hot`."""
    return set(re.findall(r"\b(\w+_kernel)\(.*\{  // hot$", source.read_text(), re.MULTILINE))


def resource_usage(module: str) -> Iterator[tuple[str, str, dict[str, int]]]:
    """(architecture, mangled name, usage) of every kernel of the module."""
    done = subprocess.run([cuobjdump(), "-res-usage", module], capture_output=True, text=True, check=True)
    architecture = name = ""
    for line in (done.stdout + done.stderr).splitlines():
        if found := re.search(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.search(r"Function (\w+):", line):
            name = found[1]
        elif "REG:" in line:
            yield architecture, name, {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}


def test_every_op_marks_its_kernel_hot():
    assert {name: len(hot_kernels(KERNELS / name)) for name in SOURCES} == {
        "codebook_posterior.cu": 1, "draw_codes.cu": 1, "filter_logits.cu": 1, "flow_sample.cu": 1,
        "nearest_code.cu": 1, "noise.cu": 0,
    }  # fmt: skip


def test_hot_kernels_of_the_built_module_neither_spill_nor_use_a_stack():
    if not hasattr(native.cuda, "sample_codes"):
        pytest.skip(f"{native.cuda_reason}: no module with these kernels")
    if cuobjdump() is None:
        pytest.skip("no cuobjdump")
    usage = list(resource_usage(native.cuda.__file__))
    built = [target for target in native.cuda.architectures.split() if not target.endswith("-virtual")]
    targets = {f"sm_{target.split('-')[0]}" for target in built}
    for kernel in set().union(*(hot_kernels(KERNELS / name) for name in SOURCES)):
        mine = [entry for entry in usage if kernel in entry[1]]
        assert {architecture for architecture, *_ in mine} == targets
        assert not [entry for entry in mine if entry[2]["STACK"] or entry[2]["LOCAL"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_nvcc_reports_no_spills(name, tmp_path):
    """The same from the sources alone, for sm_80 and sm_90a: about a minute of one core."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")]
    options = ["-std=c++17", "-O3", "-fmad=false", "--threads=0", "-Xptxas=-v", "-c", "-o", str(tmp_path / "object.o")]
    done = subprocess.run([nvcc, *options, *targets, str(KERNELS / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    entries = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        done.stdout + done.stderr,
        re.DOTALL,
    )
    assert {architecture for _, architecture, *_ in entries} == {"sm_80", "sm_90a"}
    for kernel in hot_kernels(KERNELS / name):
        mine = [entry for entry in entries if kernel in entry[0]]
        assert mine
        assert not [entry for entry in mine if entry[2:] != ("0", "0", "0")]

"""What native says of GPUs that are not here: PyTorch, the compiled module and the compilers are stand-ins."""

from types import SimpleNamespace

import pytest
import torch

from ddfast import diagnosis
from ddfast.errors import DDFastError
from ddfast.ops import native
from ddfast.runs import check_device

DESCRIPTION = "loading the kernels: {}, as CUDA describes it"


@pytest.fixture(autouse=True)
def forget():
    """Before and after, for a state is remembered."""

    def clear():
        for function in (native._cuda_state, native._triton_state):
            function.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture
def machine(monkeypatch):
    """Two GPUs, sm_90 and sm_75, of which the second is current; a driver and a module that suit the first."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    capabilities = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_arch_list", list)
    machine = SimpleNamespace(errors={}, capabilities=capabilities, asked=[])

    def check_device(device):
        machine.asked.append(device)
        if device in machine.errors:
            raise RuntimeError(DESCRIPTION.format(machine.errors[device]))

    machine.module = SimpleNamespace(
        check_device=check_device, runtime_version=13000, driver_version=lambda: 12040, architectures="80-real 90a-real"
    )
    monkeypatch.setattr(native, "cuda", machine.module)
    monkeypatch.setattr(native, "cuda_reason", "ddfast_cuda 1.0")
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: name)
    return machine


def test_every_gpu_has_its_own_state(machine):
    for _ in range(3):
        assert native.cuda_state(0) == (True, "ddfast_cuda 1.0")
        assert native.cuda_state(1) == native.cuda_state()
    assert machine.asked == [0]  # once; of the other one there is nothing to ask
    usable, line = native.cuda_state()
    assert not usable
    assert line == "the CUDA kernels need a GPU of compute capability 8.0 or more, this one has 7.5"
    assert native.triton_state(0) == native.triton_state(1) == native.triton_state() == (True, "ddfast_kernels")


def test_triton_begins_with_volta(machine):
    machine.capabilities[1] = (6, 1)
    line = "the Triton kernels need a GPU of compute capability 7.0 or more, this one has 6.1"
    assert native.triton_state(1) == (False, line)
    assert not native.cuda_state(1)[0]


def test_doctor_says_where_bfloat16_is_emulated(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ("H100", "T4")[index])
    hopper, turing = (diagnosis._gpu(index) for index in (0, 1))
    assert hopper[0] == "GPU 0: H100, sm_90" and turing[0] == "GPU 1: T4, sm_75"
    assert not any("bfloat16" in line for line in hopper) and "bfloat16" in turing[-1]


@pytest.mark.parametrize(
    ("says", "usable"),
    [
        ("echo \"Value 'sm_75' is not defined for option 'gpu-name'\" >&2; exit 255", False),
        ("echo 'Missing .version directive' >&2; exit 255", True),
        ("exit 1", True),
        (None, True),
    ],
)
def test_tritons_assembler_is_asked_about_old_gpus_alone(machine, monkeypatch, tmp_path, says, usable):
    """One that is not there, or says something else, is no obstacle: kernels are verified anyway."""
    ptxas = tmp_path / "ptxas"
    if says is not None:
        ptxas.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\n{says}\n')
        ptxas.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(ptxas))
    without = "this Triton has no assembler for sm_75, an older one may: the reference runs"
    assert native.triton_state(1) == ((True, "ddfast_kernels") if usable else (False, without))
    assert native.triton_state(0)[0]
    if says is not None:
        assert (tmp_path / "asked").read_text().splitlines() == ["--gpu-name=sm_75 /dev/null -o /dev/null"]


@pytest.mark.parametrize(
    ("codes", "capability", "runs"),
    [
        ([], (7, 0), True),
        (["sm_70", "sm_80"], (7, 5), True),
        (["sm_75", "sm_80", "compute_120"], (7, 0), False),
        (["sm_80", "sm_90a"], (8, 9), True),
        (["sm_80", "sm_90"], (12, 0), False),
        (["sm_90", "compute_90"], (12, 0), True),
    ],
    ids=str,
)
def test_a_pytorch_without_code_for_the_gpu(machine, monkeypatch, codes, capability, runs):
    """Then not even the references run there: every state says so, and commands do before they begin."""
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: codes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    machine.capabilities[0] = capability
    if runs:
        check_device("cuda:0")
        return
    words = f"has no code for this GPU, sm_{capability[0]}{capability[1]}, only for {', '.join(codes)}: install"
    for usable, line in (native.cuda_state(0), native.triton_state(0)):
        assert not usable and words in line
    with pytest.raises(DDFastError, match=r"--device cuda:0: PyTorch .*; or use --device cpu"):
        check_device("cuda:0")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("cudaErrorInsufficientDriver", "ddfast_cuda is built with CUDA 13.0, the driver is of 12.4: update the "
         "driver, or `pip install .` with the nvcc of a CUDA 12"),
        ("cudaErrorUnsupportedPtxVersion", "the GPU's driver cannot translate the code of ddfast_cuda: update the "
         "driver, or run `CUDAARCHS=native pip install .`"),
        ("cudaErrorNoKernelImageForDevice", "ddfast_cuda has no code for sm_110, it is built for 80-real 90a-real: run "
         "`CUDAARCHS=native pip install .`"),
        ("cudaErrorUnknown", "ddfast_cuda: loading the kernels: cudaErrorUnknown, as CUDA describes it"),
    ],
)  # fmt: skip
def test_what_to_do(machine, error, line):
    machine.capabilities[0] = (11, 0)
    machine.errors[0] = error
    assert native.cuda_state(0) == (False, line)
    assert native.triton_state(0)[0]  # which brings no runtime of its own


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (torch.version, {"cuda": None, "hip": "6.4"}, "built for ROCm"),
        (torch.version, {"cuda": None}, "built without CUDA"),
        (torch.cuda, {"is_available": lambda: False}, "sees no GPU"),
    ],
)
def test_pytorch_without_a_gpu(machine, monkeypatch, where, value, words):
    for name, stand_in in value.items():
        monkeypatch.setattr(where, name, stand_in)
    for usable, line in (native.cuda_state(), native.triton_state(0)):
        assert not usable
        assert words in line
    assert not machine.asked


def test_the_current_gpu_is_not_looked_for_where_nothing_uses_one(machine, monkeypatch):
    """PyTorch would start CUDA for it, which a forked process must not."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", pytest.fail)
    assert native.cuda_state() == native.cuda_state(0)


def test_no_module(machine, monkeypatch):
    monkeypatch.setattr(native, "cuda", None)
    monkeypatch.setattr(native, "cuda_reason", "ddfast_cuda is not installed")
    assert native.cuda_state(0) == (False, "ddfast_cuda is not installed")


def test_triton_needs_a_compiler_and_headers(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert native.triton_state(0) == (
        False, "Triton finds no C compiler; install gcc (Debian, Ubuntu: apt-get install gcc) or set CC"
    )  # fmt: skip
    (tmp_path / "mine").touch(0o755)
    for name in ("gcc", "clang", "CC"):
        native._triton_state.cache_clear()
        if name == "CC":
            monkeypatch.setenv("CC", str(tmp_path / "mine"))
        else:
            (tmp_path / name).touch(0o755)
        assert native.triton_state(0)[0]
        (tmp_path / name).unlink(missing_ok=True)
    native._triton_state.cache_clear()
    monkeypatch.setattr(native.sysconfig, "get_path", lambda *_: str(tmp_path))
    assert native.triton_state(0)[1].startswith("Triton finds no Python.h; install")


def test_triton_is_not_installed(machine, monkeypatch):
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: name if name == "triton" else None)
    assert native.triton_state(0) == (False, "ddfast_kernels is not installed; run `pip install .`")

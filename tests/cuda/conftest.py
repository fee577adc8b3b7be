"""The CUDA kernels, compiled by g++ for the emulator and called over PyTorch tensors of the CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddfast.ops.flow_sample import SOLVERS
from ddfast.ops.geometry import codebook_geometry
from ddfast.ops.native import DTYPE_CODES

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = 227 << 10  # bytes of shared memory that a block of an H100 or H200 may have


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class FlowArguments(ctypes.Structure):
    """As in kernels/flow_sample.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("logits", "uncond", "cfg_scale", "noise", "codebook", "geometry")],
        *[(name, ctypes.c_void_p) for name in ("codes", "evaluations", "scratch")],
        *[(name, ctypes.c_int64) for name in ("stride", "uncond_stride", "rows", "num_codes", "dim", "top_k")],
        ("top_p", ctypes.c_double),
        *[(name, ctypes.c_float) for name in ("temperature", "sigma_min")],
        *[(name, ctypes.c_int32) for name in ("dtype", "steps", "solver", "early_exit")],
    ]


class Emulator:
    """The library, with one method per launch; a failed launch raises with the emulator's words."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_error.restype = ctypes.c_char_p
        self.configure()

    def configure(self, seed: int = 0, shared_limit: int = SHARED_LIMIT, clusters: bool = True) -> None:
        """The order in which threads run (0: ascending, else drawn), and what the device reports about itself."""
        self.library.emulator_configure(ctypes.c_uint64(seed), shared_limit, clusters)

    def check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"status {status}: {self.library.emulator_error().decode()}")

    def sample_codes(
        self, logits: Tensor, noise: Tensor, codebook: Tensor, *, uncond: Tensor | None = None,
        cfg_scale: Tensor | None = None, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
        steps: int = 20, solver: str = "dpm3m", early_exit: bool = True, cluster: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Codes and evaluations of rows of logits; with the defaults, of rows of log-probabilities (flow_sample)."""
        rows, num_codes = logits.shape
        dim = codebook.shape[1]
        geometry = codebook_geometry(codebook)
        codes, evaluations = torch.full((rows,), -7), torch.full((rows,), -7, dtype=torch.int32)
        size = ctypes.c_int64()
        counts = [ctypes.c_int64(value) for value in (rows, num_codes, dim, top_k)]
        self.check(self.library.flow_scratch_emulated(*counts, cluster, ctypes.byref(size)))
        scratch = torch.full((size.value,), 255, dtype=torch.uint8)
        arguments = FlowArguments(
            address(logits), address(uncond), address(cfg_scale), address(noise), address(codebook),
            address(geometry.packed), address(codes), address(evaluations), address(scratch) if size.value else None,
            logits.stride(0), 0 if uncond is None else uncond.stride(0), rows, num_codes, dim, top_k, top_p,
            temperature, geometry.sigma_min, DTYPE_CODES[logits.dtype], steps, SOLVERS[solver], early_exit,
        )  # fmt: skip
        self.check(self.library.flow_sample_emulated(ctypes.byref(arguments), cluster))
        return codes, evaluations

    def flow_cluster(self, num_codes: int, dim: int, top_k: int) -> int:
        """Blocks per row that the launch chooses."""
        out = ctypes.c_int()
        counts = [ctypes.c_int64(value) for value in (num_codes, dim, top_k)]
        self.check(self.library.flow_cluster_emulated(*counts, ctypes.byref(out)))
        return out.value


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulated kernels with")
    path = tmp_path_factory.mktemp("emulator") / "emulated.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-DDDFAST_EMULATE", "-U_FORTIFY_SOURCE"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    include = [f"-I{ROOT / 'tests' / 'cuda'}", f"-I{ROOT / 'kernels'}"]
    source = str(ROOT / "tests" / "cuda" / "emulated.cpp")
    subprocess.run(["g++", *flags, *warnings, *include, "-o", str(path), source], check=True)
    return Emulator(path)


@pytest.fixture
def emulator(library: Emulator) -> Emulator:
    library.configure()
    return library

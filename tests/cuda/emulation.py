"""The emulated CUDA kernels, called over PyTorch tensors of the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast.ops.flow_sample import SOLVERS
from ddfast.ops.geometry import codebook_geometry
from ddfast.ops.native import DTYPE_CODES

SHARED_LIMIT = 227 << 10  # bytes of shared memory that a block of an H100 or H200 may have


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class FilterArguments(ctypes.Structure):
    """As in kernels/filter_logits.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("logits", "uncond", "cfg_scale")],
        *[(name, ctypes.c_int64) for name in ("stride", "uncond_stride", "rows", "num_codes", "top_k")],
        ("top_p", ctypes.c_double),
        ("temperature", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    ]


class FlowArguments(ctypes.Structure):
    """As in kernels/flow_sample.h."""

    _fields_ = [
        ("filter", FilterArguments),
        *[(name, ctypes.c_void_p) for name in ("noise", "codebook", "geometry", "codes", "evaluations", "scratch")],
        ("dim", ctypes.c_int64),
        ("sigma_min", ctypes.c_float),
        *[(name, ctypes.c_int32) for name in ("steps", "solver", "early_exit")],
    ]


class DrawArguments(ctypes.Structure):
    """As in kernels/draw_codes.h."""

    _fields_ = [
        ("filter", FilterArguments),
        *[(name, ctypes.c_void_p) for name in ("uniform", "codes", "scratch")],
    ]


def filter_arguments(
    logits: Tensor, uncond: Tensor | None = None, cfg_scale: Tensor | None = None, temperature: float = 1.0,
    top_k: int = 0, top_p: float = 1.0,
) -> FilterArguments:  # fmt: skip
    return FilterArguments(
        address(logits), address(uncond), address(cfg_scale), logits.stride(0),
        0 if uncond is None else uncond.stride(0), *logits.shape, top_k, top_p, temperature, DTYPE_CODES[logits.dtype],
    )  # fmt: skip


class PosteriorArguments(ctypes.Structure):
    """As in kernels/codebook_posterior.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "t", "log_probs", "codebook", "x0", "log_norm", "grad", "dx")],
        *[(name, ctypes.c_int64) for name in ("stride", "rows", "period", "num_codes", "dim")],
        ("dtype", ctypes.c_int32),
    ]


class NearestArguments(ctypes.Structure):
    """As in kernels/nearest_code.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "codebook", "codes")],
        *[(name, ctypes.c_int64) for name in ("rows", "num_codes", "dim")],
        ("cosine", ctypes.c_int32),
    ]


class NoiseArguments(ctypes.Structure):
    """As in kernels/noise.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("index", "out")],
        ("seed", ctypes.c_uint64),
        *[(name, ctypes.c_int64) for name in ("count", "per_sample")],
    ]


def guided_rows(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [6, 999] and their guidance, rows of wider tensors."""
    generator = torch.Generator().manual_seed(4)
    wide, uncond_wide = (2 * torch.randn(6, 1100, generator=generator) for _ in range(2))
    logits, uncond = wide.to(dtype)[:, 50:1049], uncond_wide.to(dtype)[:, :999]
    return logits, {"uncond": uncond, "cfg_scale": torch.linspace(1, 4, 6)}


class Emulator:
    """The library, with one method per launch; a failed launch raises with the emulator's words."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_error.restype = ctypes.c_char_p
        self.drawn = 0  # the order of threads where a test asks for none
        self.configure()

    def configure(
        self, seed: int | None = None, shared_limit: int = SHARED_LIMIT, clusters: bool = True,
        multiprocessors: int = 132, front: bool = False,
    ) -> None:  # fmt: skip
        """The order in which threads run (0: ascending, else drawn; None: `drawn`), what the device reports about
        itself, and on which side of a tensor an access beyond it is an error."""
        seed = self.drawn if seed is None else seed
        self.library.emulator_configure(ctypes.c_uint64(seed), shared_limit, clusters, multiprocessors, front)

    def check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"status {status}: {self.library.emulator_error().decode()}")

    def sample_codes(
        self, logits: Tensor, noise: Tensor, codebook: Tensor, *, top_k: int = 0, top_p: float = 1.0, steps: int = 20,
        solver: str = "dpm3m", early_exit: bool = True, cluster: int = 0, **filtering: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Codes and evaluations of rows of logits; without a filter, of rows of log-probabilities (flow_sample)."""
        rows, num_codes = logits.shape
        dim = codebook.shape[1]
        geometry = codebook_geometry(codebook)
        codes, evaluations = torch.full((rows,), -7), torch.full((rows,), -7, dtype=torch.int32)
        size = self.flow_scratch(rows, num_codes, dim, top_k, top_p, cluster)
        scratch = torch.full((size,), 255, dtype=torch.uint8)
        arguments = FlowArguments(
            filter_arguments(logits, top_k=top_k, top_p=top_p, **filtering), address(noise), address(codebook),
            address(geometry.packed), address(codes), address(evaluations), address(scratch) if size else None,
            dim, geometry.sigma_min, steps, SOLVERS[solver], early_exit,
        )  # fmt: skip
        self.check(self.library.flow_sample_emulated(ctypes.byref(arguments), cluster))
        return codes, evaluations

    def filter_logits(self, logits: Tensor, cluster: int = 0, **filtering: Any) -> Tensor:
        """float32 [rows, V]: log-probabilities."""
        out = torch.full(logits.shape, 7e7)
        size = self.filter_scratch(*logits.shape, cluster)
        scratch = torch.full((size,), 255, dtype=torch.uint8)
        pointers = [ctypes.c_void_p(address(tensor)) for tensor in (out, scratch if size else None)]
        arguments = filter_arguments(logits, **filtering)
        self.check(self.library.filter_emulated(ctypes.byref(arguments), *pointers, cluster))
        return out

    def draw_codes(self, logits: Tensor, uniform: Tensor, cluster: int = 0, **filtering: Any) -> Tensor:
        """int64 [rows]."""
        codes = torch.full((len(logits),), -7)
        scratch = torch.full((self.draw_scratch(*logits.shape, cluster),), 255, dtype=torch.uint8)
        arguments = DrawArguments(
            filter_arguments(logits, **filtering), address(uniform), address(codes),
            address(scratch) if len(scratch) else None,
        )  # fmt: skip
        self.check(self.library.draw_emulated(ctypes.byref(arguments), cluster))
        return codes

    def draw_scratch(self, rows: int, num_codes: int, cluster: int = 0) -> int:
        """Bytes that draw_codes asks for."""
        size = ctypes.c_int64()
        counts = [ctypes.c_int64(value) for value in (rows, num_codes)]
        self.check(self.library.draw_scratch_emulated(*counts, cluster, ctypes.byref(size)))
        return size.value

    def draw_cluster(self, num_codes: int) -> int:
        """Blocks per row."""
        return self.library.draw_cluster_emulated(ctypes.c_int64(num_codes))

    def flow_scratch(
        self, rows: int, num_codes: int, dim: int, top_k: int = 0, top_p: float = 1.0, cluster: int = 0
    ) -> int:
        """Bytes that sample_codes asks for."""
        size = ctypes.c_int64()
        counts = [ctypes.c_int64(value) for value in (rows, num_codes, dim, top_k)]
        self.check(self.library.flow_scratch_emulated(*counts, ctypes.c_double(top_p), cluster, ctypes.byref(size)))
        return size.value

    def filter_scratch(self, rows: int, num_codes: int, cluster: int = 0) -> int:
        """Bytes that filter_logits asks for."""
        size = ctypes.c_int64()
        counts = [ctypes.c_int64(value) for value in (rows, num_codes)]
        self.check(self.library.filter_scratch_emulated(*counts, cluster, ctypes.byref(size)))
        return size.value

    def flow_plan(self, num_codes: int, dim: int, top_k: int = 0, top_p: float = 1.0) -> tuple[int, int]:
        """Codes that a row may keep for a narrow block, -1 without these; wide blocks per row, 0 without these."""
        out = (ctypes.c_int64 * 2)()
        counts = [ctypes.c_int64(value) for value in (num_codes, dim, top_k)]
        self.library.flow_plan_emulated(*counts, ctypes.c_double(top_p), out)
        return out[0], out[1]

    def posterior(
        self, x: Tensor, t: Tensor, log_probs: Tensor, codebook: Tensor, grad: Tensor | None = None,
        forward: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(x0_hat, log_norm); with `grad` and these two, (dx, log_norm)."""
        x0, log_norm = forward or (torch.full_like(x, 7e7), torch.full((len(x),), 7e7))
        dx = torch.full_like(x, 7e7)
        arguments = PosteriorArguments(
            *map(address, (x, t, log_probs, codebook, x0, log_norm, grad, dx)), log_probs.stride(0), len(x),
            len(log_probs), *codebook.shape, DTYPE_CODES[log_probs.dtype],
        )  # fmt: skip
        self.check(self.library.posterior_emulated(ctypes.byref(arguments), grad is not None))
        return (x0 if grad is None else dx), log_norm

    def nearest_code(self, x: Tensor, codebook: Tensor, cosine: bool = False, cluster: int = 0) -> Tensor:
        """Codes; for the cosine, of a normalised codebook."""
        codes = torch.full((len(x),), -7)
        arguments = NearestArguments(*map(address, (x, codebook, codes)), len(x), *codebook.shape, cosine)
        self.check(self.library.nearest_emulated(ctypes.byref(arguments), cluster))
        return codes

    def noise(self, seed: int, index: Tensor, per_sample: int) -> Tensor:
        """float32 [len(index), per_sample]."""
        out = torch.full((len(index), per_sample), 7e7)
        arguments = NoiseArguments(address(index), address(out), seed, len(index), per_sample)
        self.check(self.library.noise_emulated(ctypes.byref(arguments)))
        return out

    def nearest_scores(self, x: Tensor, codebook: Tensor, cosine: bool = False) -> Tensor:
        """float32 [rows, V]: what nearest_code compares, in the order of operations that defines it."""
        out = torch.empty(len(x), len(codebook))
        num_codes, dim = map(ctypes.c_int64, codebook.shape)
        for row, target in zip(x, out, strict=True):
            self.library.nearest_scores(
                *map(ctypes.c_void_p, (address(row), address(codebook))), num_codes, dim, cosine,
                ctypes.c_void_p(address(target)),
            )  # fmt: skip
        return out

"""ddfast_native over numpy arrays: thin wrappers that turn arrays into addresses."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

native = pytest.importorskip("ddfast_native")

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2


def address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def to_dtype(array: np.ndarray, dtype: int) -> tuple[np.ndarray, np.ndarray]:
    """(bits as the kernels read them, the values those bits stand for in float32)."""
    array = np.ascontiguousarray(array, dtype=np.float32)
    if dtype == FLOAT16:
        half = array.astype(np.float16)
        return half, half.astype(np.float32)
    if dtype == BFLOAT16:
        bits = (array.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).reshape(array.shape)
    return array, array


def from_dtype(bits: np.ndarray, dtype: int) -> np.ndarray:
    """The float32 values of bits as the kernels write them."""
    return (bits.astype(np.uint32) << 16).view(np.float32) if dtype == BFLOAT16 else bits.astype(np.float32)


def noise(seed: int, index: np.ndarray, per_sample: int, threads: int = 1) -> np.ndarray:
    out = np.full((len(index), per_sample), np.nan, np.float32)
    native.noise(seed, address(index), len(index), per_sample, address(out), threads)
    return out


def nearest_code(x: np.ndarray, codebook: np.ndarray, cosine: bool = False, threads: int = 1) -> np.ndarray:
    codes = np.full(len(x), -1, np.int64)
    native.nearest_code(address(x), address(codebook), address(codes), len(x), *codebook.shape, cosine, threads)
    return codes


def filter_logits(
    logits: np.ndarray,
    *,
    dtype: int = FLOAT32,
    uncond: np.ndarray | None = None,
    cfg_scale: np.ndarray | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    threads: int = 1,
) -> tuple[np.ndarray, int]:
    rows, num_codes = logits.shape
    out = np.full((rows, num_codes), np.nan, np.float32)
    status = native.filter_logits(
        address(logits), dtype, logits.strides[0] // logits.itemsize,
        address(uncond), 0 if uncond is None else uncond.strides[0] // uncond.itemsize, address(cfg_scale),
        temperature, top_k, top_p, address(out), rows, num_codes, threads,
    )  # fmt: skip
    return out, status


def draw_codes(
    logits: np.ndarray,
    uniform: np.ndarray,
    *,
    dtype: int = FLOAT32,
    uncond: np.ndarray | None = None,
    cfg_scale: np.ndarray | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    threads: int = 1,
) -> tuple[np.ndarray, int]:
    rows, num_codes = logits.shape
    codes = np.full(rows, -1, np.int64)
    status = native.draw_codes(
        address(logits), dtype, logits.strides[0] // logits.itemsize,
        address(uncond), 0 if uncond is None else uncond.strides[0] // uncond.itemsize, address(cfg_scale),
        temperature, top_k, top_p, address(uniform), address(codes), rows, num_codes, threads,
    )  # fmt: skip
    return codes, status


def decode_attention(
    qkv: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int, *, dtype: int = FLOAT32,
    rope: np.ndarray | None = None, first: np.ndarray | None = None, scale: float = 1.0, threads: int = 1,
) -> np.ndarray:  # fmt: skip
    """The result's bits; `keys` and `values` are written."""
    rows, kv_heads, length, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    out, here = np.zeros((rows, heads * dim), qkv.dtype), np.array([position])
    native.decode_attention(
        address(qkv), dtype, qkv.strides[0] // qkv.itemsize, address(keys), address(values), address(here),
        address(rope), address(first), address(out), rows, heads, kv_heads, length, dim, scale, threads,
    )  # fmt: skip
    return out


def activate(
    x: np.ndarray, times: np.ndarray | None = None, *, dtype: int = FLOAT32, gelu: bool = True, threads: int = 1
) -> np.ndarray:
    """The result's bits."""
    out = np.zeros_like(x)
    native.activate(address(x), x.size, address(times), x.size, address(out), dtype, 1, x.size, gelu, threads)
    return out


def posterior_forward(
    x: np.ndarray, t: np.ndarray, log_probs: np.ndarray, codebook: np.ndarray, dtype: int = FLOAT32, threads: int = 1
) -> tuple[np.ndarray, np.ndarray, int]:
    x0, lse = np.full_like(x, np.nan), np.full(len(x), np.nan, np.float32)
    status = native.codebook_posterior_forward(
        address(x), address(t), address(log_probs), dtype, log_probs.shape[1], address(codebook),
        address(x0), address(lse), len(x), *codebook.shape, threads,
    )  # fmt: skip
    return x0, lse, status


def posterior_backward(
    grad: np.ndarray, x: np.ndarray, t: np.ndarray, log_probs: np.ndarray, codebook: np.ndarray,
    x0: np.ndarray, lse: np.ndarray, dtype: int = FLOAT32, threads: int = 1,
) -> np.ndarray:  # fmt: skip
    dx = np.full_like(x, np.nan)
    native.codebook_posterior_backward(
        address(grad), address(x), address(t), address(log_probs), dtype, log_probs.shape[1], address(codebook),
        address(x0), address(lse), address(dx), len(x), *codebook.shape, threads,
    )  # fmt: skip
    return dx


SOLVERS = {"euler": 1, "dpm2m": 2, "dpm3m": 3, "heun": 4}


def geometry(codebook: np.ndarray) -> np.ndarray:
    """Nearest-neighbour distance of every code, then twice the radius about the mean."""
    codes = codebook.astype(np.float64)
    square = (codes**2).sum(1)
    distance = np.sqrt(np.maximum(square[:, None] + square - 2 * codes @ codes.T, 0))
    np.fill_diagonal(distance, np.inf)
    diameter = 2 * np.linalg.norm(codes - codes.mean(0), axis=1).max()
    return np.append(distance.min(1), diameter).astype(np.float32)


def flow_arguments(
    noise: np.ndarray, codebook: np.ndarray, shape: np.ndarray, steps: int, solver: str, sigma_min: float,
    early_exit: bool, threads: int, codes: np.ndarray, evaluations: np.ndarray,
) -> tuple[Any, ...]:  # fmt: skip
    return (
        address(noise), address(codebook), address(shape), address(codes), address(evaluations),
        len(noise), *codebook.shape, steps, SOLVERS[solver], sigma_min, early_exit, threads,
    )  # fmt: skip


def flow_sample(
    log_probs: np.ndarray, noise: np.ndarray, codebook: np.ndarray, shape: np.ndarray, *, dtype: int = FLOAT32,
    steps: int = 20, solver: str = "dpm3m", sigma_min: float = 0.05, early_exit: bool = True, threads: int = 1,
) -> tuple[np.ndarray, np.ndarray, int]:  # fmt: skip
    codes, evaluations = np.full(len(noise), -1, np.int64), np.full(len(noise), -1, np.int32)
    tail = flow_arguments(noise, codebook, shape, steps, solver, sigma_min, early_exit, threads, codes, evaluations)
    status = native.flow_sample(address(log_probs), dtype, log_probs.strides[0] // log_probs.itemsize, *tail)
    return codes, evaluations, status


def sample_codes(
    logits: np.ndarray, noise: np.ndarray, codebook: np.ndarray, shape: np.ndarray, *,
    uncond: np.ndarray | None = None, cfg_scale: np.ndarray | None = None, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, steps: int = 20, solver: str = "dpm3m", sigma_min: float = 0.05, threads: int = 1,
) -> tuple[np.ndarray, np.ndarray, int]:  # fmt: skip
    codes, evaluations = np.full(len(noise), -1, np.int64), np.full(len(noise), -1, np.int32)
    tail = flow_arguments(noise, codebook, shape, steps, solver, sigma_min, True, threads, codes, evaluations)
    status = native.sample_codes(
        address(logits), FLOAT32, logits.shape[1], address(uncond), logits.shape[1], address(cfg_scale),
        temperature, top_k, top_p, *tail,
    )  # fmt: skip
    return codes, evaluations, status


@pytest.fixture(params=native.isa_available())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction-set variant of this machine."""
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture(scope="session")
def kernels() -> Any:
    return SimpleNamespace(
        noise=noise,
        nearest_code=nearest_code,
        filter_logits=filter_logits,
        draw_codes=draw_codes,
        decode_attention=decode_attention,
        activate=activate,
        posterior_forward=posterior_forward,
        posterior_backward=posterior_backward,
        to_dtype=to_dtype,
        from_dtype=from_dtype,
        geometry=geometry,
        flow_sample=flow_sample,
        sample_codes=sample_codes,
    )

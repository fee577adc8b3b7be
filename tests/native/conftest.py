"""ddfast_native over numpy arrays: thin wrappers that turn arrays into addresses.

The same functions of 64-bit ARM run in an emulator, where there is one: with all tests that ask for `isa` or `noises`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import aarch64
import numpy as np
import pytest

native = pytest.importorskip("ddfast_native")

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2


_emulated: aarch64.Machine | None = None  # where the kernels are called, if not in this process


def call(name: str, *arguments: Any) -> Any:
    """A function of ddfast_native's, arrays for their addresses, by the machine that the fixtures have chosen."""
    if _emulated is not None:
        return _emulated.call(name, *arguments)
    return getattr(native, name)(*map(_address, arguments))


def _address(argument: Any) -> Any:
    return 0 if argument is None else argument.ctypes.data if isinstance(argument, np.ndarray) else argument


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
    call("noise", seed, index, len(index), per_sample, out, threads)
    return out


def nearest_code(x: np.ndarray, codebook: np.ndarray, cosine: bool = False, threads: int = 1) -> np.ndarray:
    codes = np.full(len(x), -1, np.int64)
    call("nearest_code", x, codebook, codes, len(x), *codebook.shape, cosine, threads)
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
    status = call(
        "filter_logits", logits, dtype, logits.strides[0] // logits.itemsize,
        uncond, 0 if uncond is None else uncond.strides[0] // uncond.itemsize, cfg_scale,
        temperature, top_k, top_p, out, rows, num_codes, threads,
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
    status = call(
        "draw_codes", logits, dtype, logits.strides[0] // logits.itemsize,
        uncond, 0 if uncond is None else uncond.strides[0] // uncond.itemsize, cfg_scale,
        temperature, top_k, top_p, uniform, codes, rows, num_codes, threads,
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
    call(
        "decode_attention", qkv, dtype, qkv.strides[0] // qkv.itemsize, keys, values, here,
        rope, first, out, rows, heads, kv_heads, length, dim, scale, threads,
    )  # fmt: skip
    return out


def activate(
    x: np.ndarray, times: np.ndarray | None = None, *, dtype: int = FLOAT32, gelu: bool = True, threads: int = 1
) -> np.ndarray:
    """The result's bits."""
    out = np.zeros_like(x)
    call("activate", x, x.size, times, x.size, out, dtype, 1, x.size, gelu, threads)
    return out


def posterior_forward(
    x: np.ndarray, t: np.ndarray, log_probs: np.ndarray, codebook: np.ndarray, dtype: int = FLOAT32, threads: int = 1
) -> tuple[np.ndarray, np.ndarray, int]:
    x0, lse = np.full_like(x, np.nan), np.full(len(x), np.nan, np.float32)
    status = call(
        "codebook_posterior_forward", x, t, log_probs, dtype, log_probs.shape[1], codebook,
        x0, lse, len(x), *codebook.shape, threads,
    )  # fmt: skip
    return x0, lse, status


def posterior_backward(
    grad: np.ndarray, x: np.ndarray, t: np.ndarray, log_probs: np.ndarray, codebook: np.ndarray,
    x0: np.ndarray, lse: np.ndarray, dtype: int = FLOAT32, threads: int = 1,
) -> np.ndarray:  # fmt: skip
    dx = np.full_like(x, np.nan)
    call(
        "codebook_posterior_backward", grad, x, t, log_probs, dtype, log_probs.shape[1], codebook,
        x0, lse, dx, len(x), *codebook.shape, threads,
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
        noise, codebook, shape, codes, evaluations,
        len(noise), *codebook.shape, steps, SOLVERS[solver], sigma_min, early_exit, threads,
    )  # fmt: skip


def flow_sample(
    log_probs: np.ndarray, noise: np.ndarray, codebook: np.ndarray, shape: np.ndarray, *, dtype: int = FLOAT32,
    steps: int = 20, solver: str = "dpm3m", sigma_min: float = 0.05, early_exit: bool = True, threads: int = 1,
) -> tuple[np.ndarray, np.ndarray, int]:  # fmt: skip
    codes, evaluations = np.full(len(noise), -1, np.int64), np.full(len(noise), -1, np.int32)
    tail = flow_arguments(noise, codebook, shape, steps, solver, sigma_min, early_exit, threads, codes, evaluations)
    status = call("flow_sample", log_probs, dtype, log_probs.strides[0] // log_probs.itemsize, *tail)
    return codes, evaluations, status


def sample_codes(
    logits: np.ndarray, noise: np.ndarray, codebook: np.ndarray, shape: np.ndarray, *,
    uncond: np.ndarray | None = None, cfg_scale: np.ndarray | None = None, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, steps: int = 20, solver: str = "dpm3m", sigma_min: float = 0.05, threads: int = 1,
) -> tuple[np.ndarray, np.ndarray, int]:  # fmt: skip
    codes, evaluations = np.full(len(noise), -1, np.int64), np.full(len(noise), -1, np.int32)
    tail = flow_arguments(noise, codebook, shape, steps, solver, sigma_min, True, threads, codes, evaluations)
    status = call(
        "sample_codes", logits, FLOAT32, logits.shape[1], uncond, logits.shape[1], cfg_scale,
        temperature, top_k, top_p, *tail,
    )  # fmt: skip
    return codes, evaluations, status


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], aarch64.Machine]]:
    """The emulated machine of an instruction set, built and started when it is first wanted."""
    started: dict[str, aarch64.Machine] = {}

    def machine(isa: str) -> aarch64.Machine:
        if isa not in started:
            if aarch64.missing():
                pytest.skip(f"64-bit ARM: {aarch64.missing()}")
            folder = tmp_path_factory.getbasetemp()
            if "PYTEST_XDIST_WORKER" in os.environ:
                folder = folder.parent  # which the processes of this run share: one of them compiles
            with (folder / "aarch64.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                started[isa] = aarch64.Machine(aarch64.build(folder / "aarch64"), isa)
        return started[isa]

    yield machine
    for one in started.values():
        one.close()


@contextmanager
def emulated(machine: aarch64.Machine) -> Iterator[None]:
    global _emulated
    _emulated = machine
    try:
        yield
    finally:
        _emulated = None


EMULATED = [] if aarch64.NATIVE else [pytest.param(f"aarch64 {isa}", marks=pytest.mark.full) for isa in aarch64.ISAS]
"""What tests run on beside this machine, in minutes: an emulator does floating-point numbers bit by bit."""


@pytest.fixture(params=[*native.isa_available(), *EMULATED])
def isa(request: pytest.FixtureRequest, machines: Callable[[str], aarch64.Machine]) -> Iterator[str]:
    """Runs the test once per instruction-set variant of this machine, and of 64-bit ARM."""
    _, of_arm, name = request.param.rpartition(" ")
    if of_arm:
        with emulated(machines(name)):
            yield request.param
        return
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture(params=["here", *EMULATED[:1]])
def noises(request: pytest.FixtureRequest, machines: Callable[[str], aarch64.Machine]) -> Iterator[None]:
    """Of the noise, which is compiled once for all instruction sets of a machine, once per machine."""
    if request.param == "here":
        yield
    else:
        with emulated(machines("neon")):
            yield


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

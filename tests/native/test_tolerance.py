"""Every op on every instruction set, 64-bit ARM's in an emulator, beside the shipped reference in float64.

`pytest -s -m "full or not full" tests/native/test_tolerance.py` prints the largest errors (docs/cpu-kernels.md).
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ddfast.ops.activate import activate_reference
from ddfast.ops.codebook_posterior import codebook_posterior_reference
from ddfast.ops.decode_attention import decode_attention_reference
from ddfast.ops.draw_codes import draw_codes_reference
from ddfast.ops.filter_logits import filter_logits_reference
from ddfast.ops.flow_sample import flow_sample_reference
from ddfast.ops.nearest_code import nearest_code_reference
from ddfast.ops.noise import noise_reference
from ddfast.ops.tolerance import TOLERANCE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, CODES, DIM = 12, 4096, 32
FILTER = {"top_k": 900, "top_p": 0.95}
UNIT = {"activate", "decode_attention"}
"""Ops whose tolerance is of results up to 1, and relative beyond."""


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def exact(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).double()


def unit_codes(dim: int = DIM) -> np.ndarray:
    codes = normal(1, CODES, dim)
    return codes / np.linalg.norm(codes, axis=1, keepdims=True)


def filter_logits(kernels, dtype: int) -> tuple[np.ndarray, Tensor]:
    bits, logits = kernels.to_dtype(3 * normal(0, ROWS, CODES), dtype)
    got, status = kernels.filter_logits(bits, dtype=dtype, **FILTER)
    wanted = filter_logits_reference(exact(logits), **FILTER)
    kept = np.isfinite(got)
    assert status == -1 and np.array_equal(kept, wanted.isfinite().numpy())
    return got[kept], wanted[torch.from_numpy(kept)]


def codebook_posterior(kernels, dtype: int) -> tuple[np.ndarray, Tensor]:
    codebook, t = unit_codes(), np.linspace(0.05, 1, ROWS, dtype=np.float32)
    log_probs = torch.from_numpy(2 * normal(2, ROWS, CODES)).log_softmax(-1).numpy()
    log_probs[::3, 300:] = -np.inf  # rows that take the sparse way
    x = (1 - t)[:, None] * codebook[:ROWS] + t[:, None] * normal(3, ROWS, DIM)
    bits, rows = kernels.to_dtype(log_probs, dtype)
    got, _, status = kernels.posterior_forward(x, t, bits, codebook, dtype)
    assert status == -1
    return got, codebook_posterior_reference(*map(exact, (x, t, rows, codebook)))[0]


def decode_attention(kernels, dtype: int) -> tuple[np.ndarray, Tensor]:
    heads, kv_heads, length, dim, position = 4, 2, 130, 64, 99
    qkv_bits, qkv = kernels.to_dtype(normal(4, ROWS, (heads + 2 * kv_heads) * dim), dtype)
    (keys_bits, keys), (values_bits, values) = (
        kernels.to_dtype(normal(seed, ROWS, kv_heads, length, dim), dtype) for seed in (5, 6)
    )
    angle = normal(7, length, dim // 2)
    rope = np.stack([np.cos(angle), np.sin(angle)], -1)
    got = kernels.decode_attention(qkv_bits, keys_bits, values_bits, position, dtype=dtype, rope=rope, scale=dim**-0.5)
    caches = [exact(keys), exact(values)]
    wanted = decode_attention_reference(exact(qkv), *caches, torch.tensor([position]), exact(rope), None, dim**-0.5)
    return kernels.from_dtype(got, dtype), wanted.reshape(got.shape)


def activate(kernels, dtype: int) -> tuple[np.ndarray, Tensor]:
    results = []
    for gelu in (True, False):
        (bits, x), (times_bits, times) = (kernels.to_dtype(normal(8 + i, 4099) * s, dtype) for i, s in ((0, 4), (1, 1)))
        got = kernels.from_dtype(kernels.activate(bits, times_bits, dtype=dtype, gelu=gelu), dtype)
        results.append((got, activate_reference(exact(x), exact(times), "gelu" if gelu else "silu")))
    return np.concatenate([got for got, _ in results]), torch.cat([wanted for _, wanted in results])


VALUES = {op.__name__: op for op in (filter_logits, codebook_posterior, decode_attention, activate)}


@pytest.mark.parametrize("dtype", [0, 1, 2])
@pytest.mark.parametrize("op", VALUES)
def test_values(kernels, isa, op, dtype) -> None:
    got, wanted = VALUES[op](kernels, dtype)
    off = np.abs(got - wanted.numpy())
    if op in UNIT:
        off /= np.maximum(1, np.abs(wanted.numpy()))
    tolerance = TOLERANCE[op, DTYPES[dtype]]
    print(f"\n{isa} | {op} | {DTYPES[dtype]} | {off.max():.1e} | of {tolerance:g}")
    assert off.max() <= tolerance


def nearest_code(kernels) -> tuple[np.ndarray, Tensor]:
    x, codebook = normal(10, 200, DIM), unit_codes()
    return kernels.nearest_code(x, codebook), nearest_code_reference(exact(x), exact(codebook))


def flow(kernels, op: str) -> tuple[np.ndarray, Tensor]:
    logits, noise, codebook = 2 * normal(11, 100, 1024), normal(12, 100, 8), unit_codes(8)[:1024]
    shape = kernels.geometry(codebook)
    sigma_min = float(np.median(shape[:-1])) / 8  # as the reference has it
    options = FILTER if op == "sample_codes" else {}
    log_probs = filter_logits_reference(exact(logits), **options)
    if op == "sample_codes":
        got = kernels.sample_codes(logits, noise, codebook, shape, sigma_min=sigma_min, **options)
    else:
        got = kernels.flow_sample(log_probs.float().numpy(), noise, codebook, shape, sigma_min=sigma_min)
    assert got[2] == -1
    return got[0], flow_sample_reference(log_probs, exact(noise), exact(codebook), 20, "dpm3m")


def draw_codes(kernels) -> tuple[np.ndarray, Tensor]:
    logits = 3 * normal(13, 100, CODES)
    uniform = np.random.default_rng(14).random(100, dtype=np.float32)
    got, status = kernels.draw_codes(logits, uniform, **FILTER)
    assert status == -1
    return got, draw_codes_reference(filter_logits_reference(exact(logits), **FILTER), torch.from_numpy(uniform))


DECIDED = {
    "nearest_code": nearest_code,
    "flow_sample": lambda kernels: flow(kernels, "flow_sample"),
    "sample_codes": lambda kernels: flow(kernels, "sample_codes"),
    "draw_codes": draw_codes,
}


@pytest.mark.parametrize("op", DECIDED)
def test_codes(kernels, isa, op) -> None:
    """One in a hundred may lie within rounding of a boundary; of the nearest code, which float64 decides, none."""
    got, wanted = DECIDED[op](kernels)
    different = int((got != wanted.numpy()).sum())
    print(f"\n{isa} | {op} | codes | {different} | of {len(got)}")
    assert different <= (0 if op == "nearest_code" else math.ceil(len(got) / 100))


def test_noise_is_the_same_bit_for_bit(kernels, noises) -> None:
    index = np.array([0, 7, 2**40 + 3])
    wanted = noise_reference(5, torch.from_numpy(index), (4099,))
    assert np.array_equal(kernels.noise(5, index, 4099), wanted.reshape(3, -1).numpy())

"""noise: counter-based Gaussian noise, the same on every device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from ddfast.errors import first_line
from ddfast.ops import common, native

_MASK = 0xFFFFFFFF


def noise(
    seed: int,
    index: int | Tensor,
    shape: Sequence[int],
    device: torch.device | str | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Standard normal noise of the samples `index` under `seed`: Philox 4x32-10 and a Box-Muller transform.

    Args:
        seed: 0 <= seed < 2^64.
        index: sample number(s), an int or an int64 tensor [...].
        shape: shape of one sample's noise.
        device: where the result lives (default: index's device, "cpu" for an int).
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        float32 [*index.shape, *shape]. A sample's values depend on (seed, index) alone: not on the device, the batch
        or the number of processes, bit for bit.

    Numerics: only + - * / sqrt in float64, which IEEE 754 fixes, then rounded to float32.
    Autograd: none.
    Raises:
        TypeError: `index` is neither an int nor an int64 tensor, or `seed` or a size no integer.
        ValueError: `seed` or `shape` is out of range.

    >>> bool((noise(7, 3, (4,)) == noise(7, torch.tensor([1, 3]), (4,))[1]).all())
    True
    """
    common.check_number("seed", seed, Integral, below=2**64)
    seed = int(seed)  # NumPy's do not wrap as Python's
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: got {seed}, expected 0 <= seed < 2^64")
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape: got {type(shape).__name__}, expected a sequence of sizes")
    for size in shape:
        common.check_number("shape", size, Integral)
    if any(size < 0 for size in shape) or math.prod(shape) >= 2**34:
        raise ValueError(f"shape: got {tuple(shape)}, expected non-negative sizes and fewer than 2^34 elements")
    if device is not None:
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError, ValueError):
            raise ValueError(f"device: got {common.typed(device)}, expected one such as 'cpu'") from None
    if isinstance(index, Tensor):
        common.check_tensor("index", index)
        if index.dtype != torch.int64:
            raise TypeError(f"index: got dtype {index.dtype}, expected int64")
    elif isinstance(index, Integral) and not isinstance(index, bool):
        common.check_number("index", index, Integral)
    else:
        raise TypeError(f"index: got {type(index).__name__}, expected an int or an int64 tensor")
    try:
        if isinstance(index, Tensor):
            index = common.moved("index", index, index.device if device is None else device, torch.int64)
        else:
            index = common.scalar(index, torch.int64, "cpu" if device is None else device)
    except RuntimeError as error:  # a GPU without a driver, say
        raise ValueError(f"device: {device} cannot be used: {first_line(error)}") from error
    signed = seed - 2**64 if seed >= 2**63 else seed  # the bits as a schema's int can hold them
    return _op(signed, index, list(shape), backend)


def noise_reference(seed: int, index: Tensor, shape: Sequence[int]) -> Tensor:
    """The definition, in PyTorch integer and float64 arithmetic; kernels/philox.h states the order of operations."""
    size = math.prod(shape)
    quad = torch.arange((size + 3) // 4, dtype=torch.int64, device=index.device)
    flat = index.reshape(-1, 1)
    words = _philox(
        [quad.expand(len(flat), -1), flat & _MASK, (flat >> 32) & _MASK, torch.zeros_like(flat)],
        [seed & _MASK, (seed >> 32) & _MASK],
    )
    normals = torch.stack([*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])], dim=-1)
    return normals.float().flatten(1)[:, :size].reshape([*index.shape, *shape]).contiguous()


def _philox(counter: list[Tensor], key: list[int]) -> list[Tensor]:
    """Ten rounds of Philox 4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # 32 x 32 bit products: the low 64 bits are right even where int64 wraps, and the mask undoes the signed shift.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) & _MASK ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) & _MASK ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def _box_muller(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals from two 32-bit words, every operation in float64 and in the order of kernels/philox.h."""
    u = (x.double() + 1.0) * 2.0**-32
    mantissa, exponent = torch.frexp(u)  # in [0.5, 1)
    low = mantissa * 2.0 <= 1.4142135623730951
    m = torch.where(low, mantissa * 2.0, mantissa)
    e = (exponent - low.to(exponent.dtype)).double()
    s = (m - 1.0) / (m + 1.0)
    series = _horner(s * s, [1.0 / n for n in range(23, 0, -2)])
    radius = torch.sqrt(-2.0 * (e * 0.6931471805599453 + (2.0 * s) * series))

    quadrant = ((y + 2**29) & _MASK) >> 30
    angle = (((y + 2**29) & _MASK) - (quadrant << 30) - 2**29).double() * (2.0 * math.pi / 2**32)
    q = angle * angle
    sine = angle * _horner(q, [(-1.0) ** (n // 2) / math.factorial(n) for n in range(17, 0, -2)])
    cosine = _horner(q, [(-1.0) ** (n // 2) / math.factorial(n) for n in range(16, -1, -2)])
    odd, upper = (quadrant & 1) == 1, (quadrant & 2) == 2
    first, second = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
    return radius * torch.where(upper, -first, first), radius * torch.where(upper, -second, second)


def _noise(seed: int, index: Tensor, shape: list[int], backend: str) -> Tensor:
    out = _fake(seed, index, shape)
    chosen = common.backend_of("noise", backend, out, size=math.prod(shape))
    if out.numel() == 0:
        return out
    if chosen == "reference":
        return noise_reference(seed, index, shape)
    samples = index.contiguous()
    if chosen == "triton":
        native.triton("noise").noise(seed % 2**64, samples, math.prod(shape), out)
        return out
    arguments = (seed % 2**64, samples.data_ptr(), samples.numel(), math.prod(shape), out.data_ptr())
    if chosen == "cuda":
        assert native.cuda is not None
        native.cuda.noise(*arguments, *common.launch_place(out))
    else:
        assert native.cpu is not None
        native.cpu.noise(*arguments, common.threads())
    return out


def _fake(seed: int, index: Tensor, shape: list[int], *_: object) -> Tensor:
    return index.new_empty([*index.shape, *shape], dtype=torch.float32)


_op = common.define("noise(SymInt seed, Tensor index, SymInt[] shape, str backend) -> Tensor", _noise, _fake)

import math

import numpy as np
import pytest
import torch
from truth import TOLERANCE

from ddfast.ops import decode_attention


def attended(qkv, keys, values, position, rope, first, scale):
    """One row and head at a time, in float64 NumPy: (mixed, keys, values) afterwards."""
    rows, kv_heads, _, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    parts = qkv.reshape(rows, -1, dim)
    keys, values = keys.copy(), values.copy()

    def turned(x):
        if rope is None:
            return x
        pairs = (x[0::2] + 1j * x[1::2]) * (rope[position, :, 0] + 1j * rope[position, :, 1])
        return np.stack((pairs.real, pairs.imag), -1).reshape(-1)

    out = np.zeros((rows, heads, dim))
    for row in range(rows):
        for head in range(kv_heads):
            keys[row, head, position] = turned(parts[row, heads + head])
            values[row, head, position] = parts[row, heads + kv_heads + head]
        for head in range(heads):
            group = head // (heads // kv_heads)
            begin = 0 if first is None else min(first[row], position)
            score = keys[row, group, begin : position + 1] @ turned(parts[row, head]) * scale
            weight = np.exp(score - score.max())
            out[row, head] = weight @ values[row, group, begin : position + 1] / weight.sum()
    return out.reshape(rows, -1), keys, values


def problem(rows, heads, kv_heads, length, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * length + dim)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    angle = torch.rand(length, dim // 2, generator=generator) * 6
    rope = torch.stack((angle.cos(), angle.sin()), -1)
    cache = [normal(rows, kv_heads, length, dim) for _ in range(2)]
    return normal(rows, (heads + 2 * kv_heads) * dim), *cache, rope


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "dim", "position"),
    [(4, 4, 16, 24, 7), (2, 2, 40, 64, 39), (4, 2, 37, 16, 36), (6, 1, 5, 8, 0), (1, 1, 300, 32, 255), (2, 2, 3, 6, 2)],
)
@pytest.mark.parametrize("variant", ["plain", "rope", "rope and padding"])
def test_is_attention(backend, dtype, heads, kv_heads, length, dim, position, variant):
    rows = 3
    qkv, keys, values, rope = problem(rows, heads, kv_heads, length, dim, dtype)
    keys[:, :, position + 1 :] = values[:, :, position + 1 :] = math.nan  # of an older sequence, or never written
    rope = None if variant == "plain" else rope
    first = torch.tensor([0, position // 2, position + 3]) if variant == "rope and padding" else None
    arrays = [None if x is None else x.double().numpy() for x in (qkv, keys, values, rope)]
    expected, new_keys, new_values = attended(
        *arrays[:3], position, arrays[3], None if first is None else first.numpy(), 0.3
    )
    before = keys.clone(), values.clone()
    out = decode_attention(
        qkv, keys, values, torch.tensor([position]), rope=rope, first=first, scale=0.3, backend=backend
    )
    assert out.dtype == dtype
    tolerance = TOLERANCE["decode_attention", dtype]
    assert np.abs(out.double().numpy() - expected).max() < tolerance
    assert np.abs(keys[:, :, position].double().numpy() - new_keys[:, :, position]).max() < 2 * tolerance
    assert np.array_equal(values[:, :, position].double().numpy(), new_values[:, :, position])
    for now, then in ((keys, before[0]), (values, before[1])):  # nothing else is touched
        others = torch.arange(length) != position
        assert torch.equal(now[:, :, others].nan_to_num(), then[:, :, others].nan_to_num())


def test_default_scale_strides_and_empty(backend):
    qkv, keys, values, _ = problem(4, 2, 2, 9, 16)
    wide = torch.cat((qkv, qkv), dim=1)[:, : qkv.shape[1]]
    position = torch.tensor([5])
    copies = keys.clone(), values.clone()
    given = decode_attention(qkv, *copies, position, scale=0.25, backend=backend)
    assert torch.equal(decode_attention(wide, keys, values, position, backend=backend), given)
    assert torch.equal(keys, copies[0])
    assert decode_attention(qkv[:0], keys[:0], values[:0], position, backend=backend).shape == (0, 32)


def test_backends_agree_on_long_caches(backend, interpreted):
    rows, length = (2, 600) if interpreted else (16, 1100)
    qkv, keys, values, rope = problem(rows, 4, 4, length, 64)
    position = torch.tensor([length - 2])
    copies = keys.clone(), values.clone()
    expected = decode_attention(qkv.double(), keys.double(), values.double(), position, rope=rope)
    out = decode_attention(qkv, *copies, position, rope=rope, backend=backend)
    assert (out - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keys": torch.zeros(2, 3, 9, 16).transpose(1, 2)}, "keys: got shape"),
        ({"values": torch.zeros(2, 2, 8, 16)}, "values: got shape"),
        ({"values": torch.zeros(2, 2, 9, 16).half()}, "values: got torch.float16"),
        ({"qkv": torch.zeros(2, 65)}, "qkv: got shape"),
        ({"position": torch.tensor(3)}, "position: got torch.int64"),
        ({"position": torch.tensor([9])}, "position: got 9, expected 0 .. 8"),
        ({"rope": torch.zeros(9, 16)}, "rope: got torch.float32"),
        ({"first": torch.zeros(3, dtype=torch.int64)}, "first: got torch.int64"),
        ({"first": torch.zeros(2, dtype=torch.int32)}, "first: got torch.int32"),
    ],
)
def test_errors(change, words):
    qkv, keys, values, _ = problem(2, 2, 2, 9, 16)
    arguments = {"qkv": qkv, "keys": keys, "values": values, "position": torch.tensor([3]), **change}
    with pytest.raises(ValueError, match=words):
        decode_attention(**arguments)

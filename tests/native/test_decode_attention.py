import numpy as np
import pytest

TOLERANCE = [5e-6, 1e-2, 2e-3]  # of float32, bfloat16, float16


def turned(x: np.ndarray, angles: np.ndarray | None) -> np.ndarray:
    if angles is None:
        return x
    turn = angles[:, 0] + 1j * angles[:, 1]
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * turn
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def exact(qkv, keys, values, position, rope=None, first=None, scale=1.0) -> np.ndarray:
    """In float64; also writes the caches."""
    rows, kv_heads, _, dim = keys.shape
    heads = qkv.astype(np.float64).reshape(rows, qkv.shape[1] // dim, dim)
    query, key, value = np.split(heads, [heads.shape[1] - 2 * kv_heads, heads.shape[1] - kv_heads], axis=1)
    angles = None if rope is None else rope[position].astype(np.float64)
    keys[:, :, position], values[:, :, position] = turned(key, angles), value
    query = turned(query, angles).reshape(rows, kv_heads, query.shape[1] // kv_heads, dim)
    out = np.empty_like(query)
    for row in range(rows):
        begin = 0 if first is None else max(0, min(first[row], position))
        seen = slice(begin, position + 1)
        scores = np.einsum("ghk,glk->ghl", query[row], keys[row, :, seen]) * scale
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        out[row] = np.einsum("ghl,glk->ghk", weight / weight.sum(-1, keepdims=True), values[row, :, seen])
    return out.reshape(rows, heads.shape[1] * dim - 2 * kv_heads * dim)


@pytest.mark.parametrize(
    "rows, heads, kv_heads, length, dim", [(0, 1, 1, 3, 4), (3, 2, 2, 9, 24), (2, 4, 1, 37, 6), (4, 6, 3, 70, 64)]
)
@pytest.mark.parametrize("dtype", [0, 1, 2])
def test_against_float64(kernels, isa, rows, heads, kv_heads, length, dim, dtype) -> None:
    """Step by step; what a cache holds beyond is never read."""
    rng = np.random.default_rng(length)
    bits, caches = [], []
    for _ in range(2):
        cache_bits, cache = kernels.to_dtype(np.full((rows, kv_heads, length, dim), np.nan), dtype)
        bits.append(cache_bits.copy())
        caches.append(cache.astype(np.float64))
    rope = rng.normal(size=(length, dim // 2, 2)).astype(np.float32)
    first = rng.integers(-1, length, rows)
    for position in range(length):
        qkv_bits, qkv = kernels.to_dtype(rng.normal(size=(rows, (heads + 2 * kv_heads) * dim)), dtype)
        settings = {"rope": rope, "first": first, "scale": dim**-0.5}
        got = kernels.decode_attention(qkv_bits, *bits, position, dtype=dtype, **settings)
        expected = exact(qkv, *caches, position, **settings)
        error = np.abs(kernels.from_dtype(got, dtype) - expected)
        assert (error <= TOLERANCE[dtype] * (1 + np.abs(expected))).all()
        for mine, theirs in zip(bits, caches, strict=True):
            stored, wanted = kernels.from_dtype(mine[:, :, position], dtype), theirs[:, :, position]
            assert (np.abs(stored - wanted) <= TOLERANCE[dtype] * (1 + np.abs(wanted))).all()
            theirs[:, :, position] = stored
            assert np.isnan(kernels.from_dtype(mine[:, :, position + 1 :], dtype)).all()


def problem(rows: int = 6, heads: int = 4, length: int = 50, dim: int = 16) -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    cache = rng.normal(size=(2, rows, heads, length, dim)).astype(np.float32)
    return [rng.normal(size=(rows, 3 * heads * dim)).astype(np.float32), *cache]


def test_neither_turned_nor_padded(kernels, isa) -> None:
    qkv, keys, values = problem()
    expected = exact(qkv, keys.astype(np.float64), values.astype(np.float64), 31)
    assert np.abs(kernels.decode_attention(qkv, keys, values, 31) - expected).max() < 1e-5


def test_nan_stays_in_its_row(kernels, isa) -> None:
    qkv, keys, values = problem()
    good = kernels.decode_attention(qkv, keys, values, 31)
    qkv[2, 5], values[4, 1, 7, 3] = np.nan, np.nan
    bad = np.isnan(kernels.decode_attention(qkv, keys, values, 31)).reshape(6, 4, 16)
    assert bad[2, 0].all()  # the query of head 0
    assert bad[4, 1].nonzero()[0].tolist() == [3]
    assert bad.sum() == 16 + 1
    assert np.array_equal(kernels.decode_attention(qkv, keys, values, 31)[[0, 1, 3, 5]], good[[0, 1, 3, 5]])


def test_rows_by_strides_and_any_split(kernels, isa) -> None:
    qkv, keys, values = problem(40)
    one = kernels.decode_attention(qkv, keys, values, 31)
    wide = np.zeros((40, qkv.shape[1] + 5), np.float32)
    wide[:, 3:-2] = qkv
    for threads in (1, 2, 4):
        assert np.array_equal(kernels.decode_attention(wide[:, 3:-2], keys, values, 31, threads=threads), one)
    alone = kernels.decode_attention(qkv[7:8], keys[7:8].copy(), values[7:8].copy(), 31)
    assert np.array_equal(alone, one[7:8])

import math

import numpy as np
import pytest
import torch
from truth import TOLERANCE

from ddfast.ops import append_normed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normalised(x):
    """In float64 NumPy, [R, S, H, K] as [R, H, S, K]."""
    x = x.double().numpy().swapaxes(1, 2)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def problem(rows, length, heads, dim, places, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * length + dim)
    qkv = (3 * torch.randn(rows, length, 3, heads, dim, generator=generator)).to(dtype)
    keys, values = (torch.full((rows, heads, places, dim), math.nan, dtype=dtype) for _ in range(2))
    return qkv, keys, values, torch.linspace(0.1, 100, heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "length", "heads", "dim", "start", "places"),
    [(2, 1, 16, 64, 0, 5), (3, 9, 2, 24, 5, 14), (1, 4, 3, 7, 1, 9), (2, 25, 1, 1, 0, 25), (1, 2, 2, 1500, 3, 6)],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_is_normalised_and_stored(backend, dtype, rows, length, heads, dim, start, places, scaled):
    qkv, keys, values, scale = problem(rows, length, heads, dim, places, dtype)
    qkv[0, 0, :, 0] = 0.0  # as long as nothing
    scale = scale.to(dtype) if scaled else None
    query = append_normed(qkv, keys, values, start, scale=scale, backend=backend)
    sizes = np.ones(heads) if scale is None else scale.double().numpy()
    assert query.dtype == dtype and query.is_contiguous()
    tolerance = TOLERANCE["append_normed", dtype]
    assert np.abs(query.double().numpy() / sizes[:, None, None] - normalised(qkv[:, :, 0])).max() < tolerance
    new = slice(start, start + length)
    assert np.abs(keys[:, :, new].double().numpy() - normalised(qkv[:, :, 1])).max() < tolerance
    assert torch.equal(values[:, :, new], qkv[:, :, 2].transpose(1, 2))
    for cache in (keys, values):  # nothing else is touched
        cache[:, :, new] = math.nan
        assert cache.isnan().all()


def test_is_what_var_does(backend):
    """Of its layer, as the plain path computes it."""
    qkv, keys, values, scale = problem(2, 4, 3, 16, 7)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    query = torch.nn.functional.normalize(query, dim=-1) * scale.view(1, 3, 1, 1)
    made = append_normed(qkv, keys, values, 2, scale=scale, backend=backend)
    assert torch.allclose(made, query, rtol=1e-6, atol=1e-5)
    assert torch.allclose(keys[:, :, 2:6], torch.nn.functional.normalize(key, dim=-1), atol=1e-6)
    assert torch.equal(values[:, :, 2:6], value)


def test_strides_nan_and_empty(backend):
    qkv, keys, values, scale = problem(2, 4, 3, 16, 7)
    copies = keys.clone(), values.clone()
    qkv[1, 2, :, 1, 5] = math.nan
    wide = torch.cat((qkv, qkv), dim=-1)[..., :16]
    given = append_normed(qkv, *copies, 1, scale=scale, backend=backend)
    made = append_normed(wide, keys, values, 1, scale=torch.stack((scale, scale), 1)[:, 0], backend=backend)
    assert torch.equal(made.nan_to_num(9.0), given.nan_to_num(9.0))
    assert torch.equal(keys.nan_to_num(9.0), copies[0].nan_to_num(9.0))
    assert made[1, 1, 2].isnan().all()  # the whole vector, and no other
    assert made.isnan().sum() == 16
    assert append_normed(qkv[:0], keys[:0], values[:0], 0, backend=backend).shape == (0, 3, 4, 16)
    assert append_normed(qkv[:, :0], keys, values, 7, backend=backend).shape == (2, 3, 0, 16)


def test_gradients_are_pytorchs():
    qkv, keys, values, _ = problem(1, 2, 3, 8, 2)
    leaf, scale = qkv.requires_grad_(), torch.rand(3, requires_grad=True)
    query = append_normed(leaf, keys, values, 0, scale=scale)
    plain = torch.nn.functional.normalize(leaf[:, :, :2], dim=-1).unbind(2)
    plain = plain[0] * scale[:, None], plain[1], leaf[:, :, 2]
    ours, theirs = (
        torch.autograd.grad(sum(part.pow(3).sum() for part in parts), (leaf, scale))
        for parts in ((query, keys, values), plain)
    )
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"qkv": torch.zeros(2, 4, 2, 3, 16)}, ValueError, "qkv: got shape"),
        ({"qkv": torch.zeros(2, 4, 3, 3, 16, dtype=torch.int64)}, TypeError, "qkv: got dtype"),
        ({"keys": torch.zeros(2, 7, 3, 16).transpose(1, 2)}, ValueError, "keys: got shape"),
        ({"keys": torch.zeros(2, 3, 7, 15)}, ValueError, "keys: got shape"),
        ({"values": torch.zeros(2, 3, 8, 16)}, ValueError, "values: got shape"),
        ({"values": torch.zeros(2, 3, 7, 16).half()}, ValueError, "values: got torch.float16"),
        ({"start": 4}, ValueError, "start: got 4, expected a position from 0 at which 4 positions"),
        ({"start": -1}, ValueError, "start: got -1"),
        ({"scale": torch.ones(4)}, ValueError, "scale: got shape"),
        ({"scale": [1.0]}, TypeError, "scale: got list"),
    ],
)
def test_errors(change, error, words):
    qkv, keys, values, scale = problem(2, 4, 3, 16, 7)
    arguments = {"qkv": qkv, "keys": keys, "values": values, "start": 3, "scale": scale, **change}
    with pytest.raises(error, match=words):
        append_normed(**arguments, backend="reference")

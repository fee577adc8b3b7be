import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import nearest_distance

from ddfast.ops import dispatch, nearest_code


def assert_nearest(x: torch.Tensor, codebook: torch.Tensor, codes: torch.Tensor) -> None:
    """Distances before indices: the code chosen is as near as the nearest one, up to float32 rounding."""
    assert codes.dtype == torch.int64
    assert codes.shape == x.shape[:-1]
    flat = x.reshape(-1, x.shape[-1]).double().numpy()
    distance = nearest_distance(flat, codebook.double().numpy())
    chosen = distance[np.arange(len(flat)), codes.reshape(-1).numpy()]
    scale = (flat**2).sum(-1) + (codebook.double().numpy() ** 2).sum(-1).max() + 1e-30
    assert ((chosen - distance.min(-1)) <= 4e-6 * scale).all()


@settings(max_examples=60)
@given(
    rows=st.integers(1, 70),
    num_codes=st.sampled_from([1, 2, 7, 16, 33, 257, 1031]),
    dim=st.sampled_from([1, 2, 3, 5, 8, 13, 32, 64]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_random_shapes(rows, num_codes, dim, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator).to(dtype)
    codebook = torch.randn(num_codes, dim, generator=generator).to(dtype)
    for name in ("auto", *dispatch.available()):
        if dtype != torch.float64 or name in ("auto", "reference"):  # which has no kernel
            assert_nearest(x, codebook, nearest_code(x, codebook, backend=name))


@pytest.mark.parametrize(
    ("rows", "num_codes", "dim"), [(256, 16384, 8), (680, 4096, 32), (64, 4095, 32), (64, 16385, 8)]
)
def test_real_shapes(backend, rows, num_codes, dim):
    x, codebook = torch.randn(rows, dim), torch.randn(num_codes, dim)
    assert_nearest(x, codebook, nearest_code(x, codebook, backend=backend))


@pytest.mark.parametrize("dim", [65, 96, 200, 256, 512, 1024])
def test_many_dimensions(backend, dim):
    """Of which |c|^2 / 2 - x.c loses no more digits: centred codes, and a bound that grows with d where it matters."""
    x, codebook = torch.randn(70, dim) + 3, torch.randn(517, dim) + 3
    codebook[1::3] = codebook[::3][:172] + 1e-3 * torch.randn(172, dim)
    assert_nearest(x, codebook, nearest_code(x, codebook, backend=backend))


@pytest.mark.parametrize("cosine", [False, True])
def test_ties_go_to_the_lowest_index(backend, cosine):
    codebook = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).repeat(9, 1)
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    assert nearest_code(x, codebook, cosine=cosine, backend=backend).tolist() == [1, 0, 0]


def test_cosine_ignores_length(backend):
    x, codebook = torch.randn(50, 8), torch.randn(300, 8)
    scaled = codebook * torch.rand(300, 1).add(0.1)
    similarity = torch.nn.functional.cosine_similarity(x[:, None].double(), scaled[None].double(), dim=-1)
    chosen = nearest_code(x, scaled, cosine=True, backend=backend)
    assert (similarity.amax(-1) - similarity.gather(1, chosen[:, None])[:, 0] < 1e-6).all()


def test_strides_and_leading_dimensions(backend):
    x, codebook = torch.randn(4, 8, 3, 5).transpose(1, 3), torch.randn(8, 31).T
    codes = nearest_code(x, codebook, backend=backend)
    assert codes.shape == (4, 5, 3)
    assert torch.equal(codes, nearest_code(x.contiguous(), codebook.contiguous(), backend=backend))


def test_empty(backend):
    assert nearest_code(torch.empty(3, 0, 4), torch.randn(5, 4), backend=backend).shape == (3, 0)


@pytest.mark.parametrize(
    ("x", "codebook", "error", "words"),
    [
        ([0.0], torch.ones(2, 1), TypeError, "x: got list"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 3), TypeError, "x: got dtype torch.int64"),
        (torch.ones(2, 3), torch.ones(4, 5), ValueError, r"codebook: got shape \(4, 5\), expected \[V >= 1, 3\]"),
        (torch.ones(2, 3), torch.ones(0, 3), ValueError, "codebook: got shape"),
        (torch.tensor(1.0), torch.ones(4, 1), ValueError, "x: got a scalar"),
    ],
)
def test_errors(x, codebook, error, words):
    with pytest.raises(error, match=words):
        nearest_code(x, codebook)

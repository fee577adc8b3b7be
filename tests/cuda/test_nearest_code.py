import pytest
import torch
from torch.nn import functional as F

SHAPES = [(1, 1, 1), (5, 7, 3), (33, 33, 8), (40, 700, 32), (17, 130, 33), (9, 300, 64), (6, 4095, 8)]


@pytest.mark.parametrize(("rows", "num_codes", "dim"), SHAPES)
@pytest.mark.parametrize("cosine", [False, True])
def test_is_the_float32_argmin(emulator, rows, num_codes, dim, cosine):
    generator = torch.Generator().manual_seed(rows)
    x, codebook = (torch.randn(n, dim, generator=generator) for n in (rows, num_codes))
    if cosine:
        codebook = F.normalize(codebook, dim=-1)
    expected = emulator.nearest_scores(x, codebook, cosine).argmin(-1)
    for cluster in (0, 1, 2):
        assert torch.equal(emulator.nearest_code(x, codebook, cosine, cluster), expected)


@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("gap", [1e-3, 1e-6])
def test_near_ties_are_settled_in_float32(emulator, offset, gap):
    """Codes so close that the tensor cores cannot tell them apart, near and far from the origin."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 16, generator=generator) + offset
    codebook = (x.repeat(20, 1) + gap * torch.randn(640, 16, generator=generator))[
        torch.randperm(640, generator=generator)
    ]
    expected = emulator.nearest_scores(x, codebook).argmin(-1)
    assert torch.equal(emulator.nearest_code(x, codebook, cluster=1), expected)


def test_scores_are_those_of_the_reference(emulator):
    x, codebook = torch.randn(20, 32).double(), torch.randn(100, 32).double()
    exact = codebook.square().sum(-1) / 2 - x @ codebook.T
    assert (emulator.nearest_scores(x.float(), codebook.float()) - exact).abs().max() < 2e-5


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", [0, 5])
def test_ties_take_the_lowest_index(emulator, cluster, seed):
    emulator.configure(seed=seed)
    generator = torch.Generator().manual_seed(2)
    codebook = torch.randint(-2, 3, (60, 4), generator=generator).float().repeat(9, 1)
    x = torch.randint(-2, 3, (40, 4), generator=generator).float()
    distance = (x[:, None] - codebook).square().sum(-1)
    assert torch.equal(emulator.nearest_code(x, codebook, cluster=cluster), distance.argmin(-1))


def test_bad_values_stay_in_range(emulator):
    codebook = torch.randn(70, 3)
    x = torch.tensor([[torch.nan, 0, 0], [torch.inf, 0, 0], [3e38, -3e38, 3e38], [1.0, 2.0, 3.0]])
    codes = emulator.nearest_code(x, codebook)
    assert ((codes >= 0) & (codes < 70)).all()
    assert codes[3] == emulator.nearest_scores(x[3:], codebook).argmin()


def test_the_choice_of_cluster_needs_no_clusters(emulator):
    emulator.configure(clusters=False)
    x, codebook = torch.randn(3, 8), torch.randn(500, 8)
    assert torch.equal(emulator.nearest_code(x, codebook), emulator.nearest_scores(x, codebook).argmin(-1))


def test_empty_and_refused(emulator):
    assert emulator.nearest_code(torch.zeros(0, 3), torch.zeros(4, 3)).shape == (0,)
    with pytest.raises(RuntimeError, match="status 1"):
        emulator.nearest_code(torch.zeros(2, 65), torch.zeros(4, 65))

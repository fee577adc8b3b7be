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


@pytest.mark.parametrize("dim", [8, 16, 32, 64])
@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_every_way_to_share_rows_and_codes(emulator, dim, multiprocessors):
    """Rows for more than one block, from one row warp per block, whose strips eight warps share, to eight."""
    emulator.configure(multiprocessors=multiprocessors)
    generator = torch.Generator().manual_seed(dim)
    x, codebook = (torch.randn(n, dim, generator=generator) for n in (290, 600))
    expected = emulator.nearest_scores(x, codebook).argmin(-1)
    for rows in (3, 100, 290):
        assert torch.equal(emulator.nearest_code(x[:rows], codebook), expected[:rows])


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12])
@pytest.mark.parametrize("cosine", [False, True])
def test_lengths_whose_squares_are_out_of_range(emulator, scale, cosine):
    generator = torch.Generator().manual_seed(3)
    x, codebook = (scale * torch.randn(n, 8, generator=generator) for n in (40, 300))
    codebook = codebook / scale if cosine else codebook
    expected = emulator.nearest_scores(x, codebook, cosine).argmin(-1)
    assert torch.equal(emulator.nearest_code(x, codebook, cosine), expected)


@pytest.mark.parametrize("cosine", [False, True])
def test_rows_of_one_block_whose_lengths_differ(emulator, cosine):
    """The shift that keeps scores from being negative is the longest row's; those whose square is huge are apart."""
    generator = torch.Generator().manual_seed(7)
    x, codebook = (torch.randn(n, 8, generator=generator) for n in (64, 700))
    x *= torch.logspace(-20, 19, 64)[torch.randperm(64, generator=generator), None]
    codebook = F.normalize(codebook, dim=-1) if cosine else codebook
    for rows in (x, x[x.norm(dim=-1) < 1e3], x[x.norm(dim=-1) < 1e-14]):
        expected = emulator.nearest_scores(rows, codebook, cosine).argmin(-1)
        assert torch.equal(emulator.nearest_code(rows, codebook, cosine), expected)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("side", [-30.0, -1.0, 1.0, 30.0])
def test_scores_of_one_sign(emulator, side, cosine):
    generator = torch.Generator().manual_seed(8)
    x = 1 + 0.1 * torch.randn(40, 32, generator=generator)
    codebook = side + 0.1 * torch.randn(300, 32, generator=generator)
    codebook = F.normalize(codebook, dim=-1) if cosine else codebook
    expected = emulator.nearest_scores(x, codebook, cosine).argmin(-1)
    assert torch.equal(emulator.nearest_code(x, codebook, cosine), expected)


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


def test_codes_that_rounding_to_bf16_puts_far_apart(emulator):
    """Every product of the nearest code is rounded down, in both factors, and every one of its rival's up."""
    down, up = 1 + 2**-8 - 2**-20, 1 + 2**-8 + 2**-20
    x = torch.tensor([[down] * 31 + [1.0625] + [up] * 32])
    nearest, rival = (torch.zeros(64) for _ in range(2))
    nearest[:31], nearest[31] = down, 1.0625
    rival[32:] = up
    assert (x[0] - nearest).norm() < (x[0] - rival).norm()
    codebook = torch.stack([rival, *torch.zeros(70, 64), nearest])
    assert emulator.nearest_scores(x, codebook).argmin() == 71
    assert emulator.nearest_code(x, codebook) == 71


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


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_code_is_never_the_nearest(emulator, bad):
    x, codebook = torch.randn(40, 8), torch.randn(500, 8)
    codebook[17, 3] = bad
    scores = emulator.nearest_scores(x, codebook)
    scores[:, 17] = torch.inf
    assert torch.equal(emulator.nearest_code(x, codebook), scores.argmin(-1))


def test_the_choice_of_cluster_needs_no_clusters(emulator):
    emulator.configure(clusters=False)
    x, codebook = torch.randn(3, 8), torch.randn(500, 8)
    assert torch.equal(emulator.nearest_code(x, codebook), emulator.nearest_scores(x, codebook).argmin(-1))


def test_empty_and_refused(emulator):
    assert emulator.nearest_code(torch.zeros(0, 3), torch.zeros(4, 3)).shape == (0,)
    with pytest.raises(RuntimeError, match="status 1"):
        emulator.nearest_code(torch.zeros(2, 65), torch.zeros(4, 65))

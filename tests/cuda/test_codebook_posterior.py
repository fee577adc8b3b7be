import math
import re
from pathlib import Path

import pytest
import torch
from truth import TOLERANCE, posterior, problem

from ddfast.ops.codebook_posterior import codebook_posterior_reference

SHAPES = [(1, 1, 1), (5, 7, 3), (33, 65, 8), (40, 300, 32), (35, 100, 16), (12, 130, 33), (9, 300, 64), (3, 4095, 8)]


def noisy(rows, num_codes, dim, times, *, support=0.7, seed=0):
    """float32 log_probs, points of the flow towards codes drawn from them, their times, and the codebook."""
    log_probs, noise, codebook = problem(rows, num_codes, dim, support=support, seed=seed)
    t = torch.tensor(times, dtype=torch.float32)[torch.arange(rows) % len(times)]
    generator = torch.Generator().manual_seed(seed)
    code = torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]
    x = (1 - t)[:, None] * codebook[code] + t[:, None] * noise
    return x.float(), t, log_probs.float(), codebook.float()


@pytest.mark.parametrize(("rows", "num_codes", "dim"), SHAPES)
@pytest.mark.parametrize("seed", [0, 9])
def test_forward_and_backward(emulator, rows, num_codes, dim, seed):
    emulator.configure(seed=seed)
    x, t, log_probs, codebook = noisy(rows, num_codes, dim, [1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.02, 1e-3])
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(rows, dim, generator=generator)
    exact_x = x.double().requires_grad_()
    exact, _ = codebook_posterior_reference(exact_x, t.double(), log_probs.double(), codebook.double())
    (exact_dx,) = torch.autograd.grad(exact, exact_x, grad.double())
    forward = emulator.posterior(x, t, log_probs, codebook)
    tolerance = TOLERANCE["codebook_posterior", torch.float32]
    assert (forward[0] - exact).abs().max() < tolerance
    truth = posterior(*(tensor.double().numpy() for tensor in (x, t, log_probs, codebook)))
    assert (forward[0] - torch.from_numpy(truth)).abs().max() < tolerance
    dx, _ = emulator.posterior(x, t, log_probs, codebook, grad, forward)
    assert ((dx - exact_dx).abs() <= tolerance * (1 + exact_dx.abs().amax(-1, keepdim=True))).all()


@pytest.mark.parametrize("time", [0.3, 0.1, 0.03, 0.01, 1e-3])
def test_small_times_between_two_codes(emulator, time):
    """Half way between codes whose dot products with x are about 1e4 times the difference that decides."""
    generator = torch.Generator().manual_seed(4)
    near = 5 * torch.randn(16, 32, generator=generator, dtype=torch.float64)
    codebook = torch.cat(
        [near, near + 1.5 * time * torch.randn(16, 32, generator=generator, dtype=torch.float64)]
    ).float()
    weight = torch.rand(16, 1, generator=generator, dtype=torch.float64)
    middle = weight * codebook[:16] + (1 - weight) * codebook[16:]
    t = torch.full((16,), time)
    x = ((1 - time) * middle + 0.1 * time * torch.randn(16, 32, generator=generator)).float()
    log_probs = torch.zeros(16, 32)
    exact, _ = codebook_posterior_reference(x.double(), t.double(), log_probs.double(), codebook.double())
    got, _ = emulator.posterior(x, t, log_probs, codebook)
    # x itself carries an error of 2^-24 |x|, which the posterior magnifies by (1-t) |c_i - c_j| / t^2.
    assert (got - exact).abs().max() < 1e-4 * max(1.0, 0.03 / time)


def exact_beyond() -> float:
    """The E_j beyond which the kernel computes a score from differences."""
    source = Path(__file__).parents[2] / "kernels" / "codebook_posterior.cu"
    return float(re.search(r"kExactBeyond = ([\d.]+)f;", source.read_text())[1])


def between_two_codes(dim, scale, bound, offset):
    """Rows half way between two codes that both matter, each at the t where its largest E_j is `bound`."""
    generator = torch.Generator().manual_seed(dim)
    count = 64
    codebook = (scale * (torch.randn(count, dim, generator=generator) + offset)).double()
    rows = torch.arange(count)
    other = (7 * rows + 3) % count
    other = torch.where(other == rows, (other + 1) % count, other)
    middle = (codebook + codebook[other]) / 2
    low, high = torch.full((count,), 1e-5, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
    for _ in range(60):
        t = (low + high) / 2
        ratio, longest = (1 - t) / t, codebook.norm(dim=1).max()
        size = ratio / t * (1 - t) * middle.norm(dim=1) * longest + ratio**2 * longest**2 / 2
        low, high = torch.where(size > bound, t, low), torch.where(size > bound, high, t)
    t = high.float()
    x = ((1 - high)[:, None] * middle).float()
    distance = (x.double()[:, None] - (1 - t.double())[:, None, None] * codebook).square().sum(-1)
    exponent = distance / (2 * t.double()[:, None] ** 2)
    log_probs = torch.full((count, count), -math.inf)
    log_probs[rows, rows] = 0.0
    tilt = torch.randn(count, generator=generator, dtype=torch.float64)
    log_probs[rows, other] = (exponent[rows, other] - exponent[rows, rows] + tilt).float()
    return x, t, log_probs, codebook.float()


@pytest.mark.parametrize("scale", [0.01, 0.5, 5.0])
@pytest.mark.parametrize("dim", [1, 3, 8, 16, 32, 64])
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_scores_that_are_just_exact_enough(emulator, dim, scale, offset):
    """The worst that the rule lets pass, and what it does not: beside it scores from differences."""
    for near, tolerance in ((0.99, 5e-5), (1.5, 2e-5)):
        x, t, log_probs, codebook = between_two_codes(dim, scale, near * exact_beyond(), offset)
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        exact_x = x.double().requires_grad_()
        distance = (exact_x[:, None] - (1 - t.double())[:, None, None] * codebook.double()).square().sum(-1)
        weights = (log_probs.double() - distance / (2 * t.double()[:, None] ** 2)).softmax(-1)
        exact = weights @ codebook.double()
        (exact_dx,) = torch.autograd.grad(exact, exact_x, grad.double())
        forward = emulator.posterior(x, t, log_probs, codebook)
        assert (forward[0] - exact).abs().max() < tolerance * codebook.abs().max()
        dx, _ = emulator.posterior(x, t, log_probs, codebook, grad, forward)
        size = scale + exact_dx.abs().amax(-1, keepdim=True)
        assert ((dx - exact_dx).abs() < 3e-4 * size).all()


@pytest.mark.parametrize("time", [1.0, 0.9, 0.7])
@pytest.mark.parametrize("dim", [8, 32])
def test_rows_far_from_every_code(emulator, dim, time):
    """|x|^2 / (2 t^2), which all scores share, is up to 6,000 here."""
    generator = torch.Generator().manual_seed(3)
    codebook = torch.randn(200, dim, generator=generator)
    x = 10 * torch.randn(32, dim, generator=generator)
    t, log_probs = torch.full((32,), time), (2.5 * torch.randn(32, 200, generator=generator)).log_softmax(-1)
    truth = posterior(*(tensor.double().numpy() for tensor in (x, t, log_probs, codebook)))
    assert (emulator.posterior(x, t, log_probs, codebook)[0] - torch.from_numpy(truth)).abs().max() < 1e-4


@pytest.mark.parametrize("time", [0.9, 0.02])
@pytest.mark.parametrize("rise", [-60.0, -3.0, 3.0, 60.0])
def test_a_maximum_that_rises_from_tile_to_tile(emulator, time, rise):
    """By less and by more than the sums may exceed it; the first tiles have nothing at all."""
    x, t, _, codebook = noisy(20, 400, 8, [time])
    if time < 0.1:
        codebook = codebook[:1] + time * codebook  # all near enough to matter
        x = (1 - t)[:, None] * codebook[:20] + t[:, None] * x
    log_probs = (rise * torch.arange(400) / 64).expand(20, 400).clone()
    log_probs[:, :130] = -math.inf
    truth = posterior(*(tensor.double().numpy() for tensor in (x, t, log_probs, codebook)))
    got, norm = emulator.posterior(x, t, log_probs, codebook)
    assert (got - torch.from_numpy(truth)).abs().max() < 1e-4
    assert norm.isfinite().all()


@pytest.mark.parametrize("time", [0.5, 0.02])
def test_vectors_that_are_not_aligned(emulator, time):
    x, t, log_probs, codebook = noisy(20, 150, 8, [time])
    expected, _ = emulator.posterior(x, t, log_probs, codebook)
    moved = []
    for tensor in (x, codebook):
        room = torch.empty(tensor.numel() + 1)[1:]
        moved.append(room.copy_(tensor.flatten()).view(tensor.shape))
    assert torch.equal(emulator.posterior(moved[0], t, log_probs, moved[1])[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_codes", [200, 203])
def test_dtypes_and_strides(emulator, dtype, num_codes):
    x, t, log_probs, codebook = noisy(20, num_codes, 8, [0.8, 0.4], support=1.0)
    wide = torch.full((20, 256), 5.0, dtype=dtype)
    wide[:, :num_codes] = log_probs
    view = wide[:, :num_codes]
    expected, _ = emulator.posterior(x, t, view.float().contiguous(), codebook)
    assert torch.equal(emulator.posterior(x, t, view, codebook)[0], expected)


@pytest.mark.parametrize("draws", [2, 3, 7])
def test_draws_share_their_tokens_rows(emulator, draws):
    x, t, log_probs, codebook = noisy(11 * draws, 90, 8, [0.9, 0.5, 0.2])
    shared = log_probs[:11].contiguous()
    together, norm = emulator.posterior(x, t, shared, codebook)
    apart, apart_norm = emulator.posterior(x, t, shared.repeat(draws, 1), codebook)
    assert torch.equal(together, apart)
    assert torch.equal(norm, apart_norm)
    grad = torch.randn_like(x)
    one = emulator.posterior(x, t, shared, codebook, grad, (together, norm))[0]
    assert torch.equal(one, emulator.posterior(x, t, shared.repeat(draws, 1), codebook, grad, (apart, apart_norm))[0])


def test_rows_do_not_depend_on_the_batch_or_the_order_of_threads(emulator):
    x, t, log_probs, codebook = noisy(40, 150, 16, [0.9, 0.4, 0.05])
    together, norm = emulator.posterior(x, t, log_probs, codebook)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    dx, _ = emulator.posterior(x, t, log_probs, codebook, grad, (together, norm))
    for i in (0, 17, 39, 2):
        one = [tensor[i : i + 1].contiguous() for tensor in (x, t, log_probs, grad)]
        alone, alone_norm = emulator.posterior(*one[:3], codebook)
        assert torch.equal(alone[0], together[i])
        assert alone_norm[0] == norm[i]
        alone_dx, _ = emulator.posterior(*one[:3], codebook, one[3], (alone, alone_norm))
        assert torch.equal(alone_dx[0], dx[i])
    for seed in (3, 4, 5):
        emulator.configure(seed=seed)
        assert torch.equal(emulator.posterior(x, t, log_probs, codebook)[0], together)
        assert torch.equal(emulator.posterior(x, t, log_probs, codebook, grad, (together, norm))[0], dx)


def test_log_norm_is_the_logarithm_of_the_weights_sum(emulator):
    x, t, log_probs, codebook = noisy(20, 90, 8, [0.9, 0.5, 0.2, 0.05])
    distance = (x.double()[:, None] - (1 - t.double())[:, None, None] * codebook.double()).square().sum(-1)
    exact = (log_probs.double() - distance / (2 * t.double()[:, None] ** 2)).logsumexp(-1)
    assert (emulator.posterior(x, t, log_probs, codebook)[1] - exact).abs().max() < 2e-4


def test_one_code_and_rows_without_a_distribution(emulator):
    x, t, log_probs, codebook = noisy(8, 50, 8, [0.9, 0.01])
    log_probs[1] = -math.inf
    log_probs[2, 49] = math.nan
    log_probs[3, 0] = math.inf
    log_probs[4] = -math.inf
    log_probs[4, 33] = -2.0
    out, norm = emulator.posterior(x, t, log_probs, codebook)
    bad = torch.tensor([False, True, True, True, False, False, False, False])
    assert torch.equal(out.isnan().all(-1), bad)
    assert torch.equal(norm.isnan(), bad)
    assert (out[4] - codebook[33]).abs().max() < 1e-6
    dx, _ = emulator.posterior(x, t, log_probs, codebook, torch.ones_like(x), (out, norm))
    assert torch.equal(dx.isnan().all(-1), bad)
    assert dx[4].abs().max() < 1e-2  # the factor (1-t)/t^2 = 9900 magnifies the last bit of x0_hat


def test_empty_and_refused(emulator):
    empty = torch.zeros(0, 3)
    assert emulator.posterior(empty, torch.zeros(0), torch.zeros(1, 4), torch.zeros(4, 3))[0].shape == (0, 3)
    with pytest.raises(RuntimeError, match="status 1"):
        emulator.posterior(torch.zeros(2, 65), torch.ones(2), torch.zeros(2, 4), torch.zeros(4, 65))
    with pytest.raises(RuntimeError, match="status 1"):
        emulator.posterior(torch.zeros(3, 5), torch.ones(3), torch.zeros(2, 4), torch.zeros(4, 5))

import math

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
    for i in (0, 17, 39):
        alone, alone_norm = emulator.posterior(
            *(tensor[i : i + 1].contiguous() for tensor in (x, t, log_probs)), codebook
        )
        assert torch.equal(alone[0], together[i])
        assert alone_norm[0] == norm[i]
    emulator.configure(seed=3)
    assert torch.equal(emulator.posterior(x, t, log_probs, codebook)[0], together)


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

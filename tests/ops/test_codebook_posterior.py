import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import TOLERANCE, posterior, problem

from ddfast.ops import codebook_posterior, dispatch, score, velocity


def expected(x, t, log_probs, codebook):
    arrays = [tensor.double().numpy() for tensor in (x, t.expand(len(x)), log_probs, codebook)]
    return torch.from_numpy(posterior(*arrays))


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    draws=st.sampled_from([1, 3]),
    num_codes=st.sampled_from([1, 2, 7, 33, 512, 4095]),
    dim=st.sampled_from([1, 3, 8, 32, 64]),
    support=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    peak=st.sampled_from([0.0, 1.0, 8.0]),
    low=st.sampled_from([1e-2, 0.1, 0.9, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_forward_and_backward_against_float64(rows, draws, num_codes, dim, support, peak, low, dtype, seed):
    shared, _, codebook = problem(rows, num_codes, dim, seed=seed, support=support, peak=peak)
    generator = torch.Generator().manual_seed(seed)
    shape, log_probs = (draws, rows, dim), shared.repeat(draws, 1)
    rows = draws * rows
    noise = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    t = low + (1 - low) * torch.rand(rows, generator=generator, dtype=torch.float64)
    target = codebook[torch.randint(num_codes, (rows,), generator=generator)]
    x = ((1 - t[:, None]) * target + t[:, None] * noise).to(dtype)
    codebook, log_probs, shared = codebook.to(dtype), log_probs.to(dtype), shared.to(dtype)
    t = t.float()
    truth = expected(x, t, log_probs, codebook)
    exact_x = x.double().requires_grad_()
    upstream = torch.randn(rows, dim, generator=generator)
    exact = codebook_posterior(exact_x, t.double(), log_probs.double(), codebook.double())
    (exact_grad,) = torch.autograd.grad(exact, exact_x, upstream.double())
    size = codebook.abs().max().double() + 1
    for name in dispatch.available():
        leaf = x.detach().clone().requires_grad_()
        got = codebook_posterior(leaf.view(shape), t.view(shape[:2]), shared, codebook, backend=name).view(rows, dim)
        assert got.dtype == dtype
        # A score of size |x||c|/t^2 carries its float32 rounding into the weights: that, not the sum, is the error.
        conditioning = 1 + 2e-3 / t.double().square()[:, None]
        tolerance = TOLERANCE["codebook_posterior", dtype] * size * conditioning * math.sqrt(dim)
        assert ((got.double() - truth).abs() <= tolerance).all()
        (grad,) = torch.autograd.grad(got, leaf, upstream.to(dtype))
        gain = ((1 - t) / t.square()).double()[:, None] * size**2
        assert ((grad.double() - exact_grad).abs() <= 10 * tolerance * (1 + gain)).all()


@pytest.mark.parametrize("dim", [65, 128, 200, 256, 1024])
def test_many_dimensions(backend, dim):
    """Between few codes, many and all, of times at which one, some and all of them matter."""
    log_probs, noise, codebook = problem(12, 257, dim, seed=dim, support=0.7, peak=2.0)
    t = torch.linspace(0.05, 1.0, 12)
    x = (1 - t[:, None]) * codebook[:12] + t[:, None] * noise
    given = [tensor.float() for tensor in (x, log_probs, codebook)]
    leaf, exact_leaf = given[0].clone().requires_grad_(), given[0].double().requires_grad_()
    got = codebook_posterior(leaf, t, *given[1:], backend=backend)
    exact = codebook_posterior(exact_leaf, t.double(), *(tensor.double() for tensor in given[1:]))
    assert (got - expected(given[0], t, *given[1:])).abs().max() < 2e-3
    upstream = torch.randn(12, dim, generator=torch.Generator().manual_seed(dim))
    (grad,) = torch.autograd.grad(got, leaf, upstream)
    (exact_grad,) = torch.autograd.grad(exact, exact_leaf, upstream.double())
    # What a weight's rounding comes to: (1 - t) / t^2 times a code's and the upstream's lengths.
    gain = ((1 - t) / t.square())[:, None] * codebook.norm(dim=1).max() * upstream.norm(dim=1, keepdim=True)
    assert ((grad - exact_grad).abs() <= 2e-5 * (1 + gain)).all()


def test_closed_form_in_float64():
    """The shipped reference is the formula itself, to float64 rounding."""
    log_probs, noise, codebook = problem(50, 33, 5, support=0.6)
    t = torch.rand(50, dtype=torch.float64) * 0.97 + 0.03
    got = codebook_posterior(noise, t, log_probs, codebook)
    assert (got - expected(noise, t, log_probs, codebook)).abs().max() < 1e-10


def test_gradcheck():
    log_probs, noise, codebook = problem(6, 17, 3, support=0.5)
    t = torch.linspace(0.15, 1.0, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: codebook_posterior(x, t, log_probs, codebook), (noise.requires_grad_(),), atol=1e-7
    )


@pytest.mark.parametrize(
    ("rows", "num_codes", "dim", "support"), [(64, 16384, 8, 0.5), (64, 4096, 32, 0.2), (9, 16385, 8, 1)]
)
def test_real_shapes(backend, rows, num_codes, dim, support):
    log_probs, noise, codebook = (tensor.float() for tensor in problem(rows, num_codes, dim, support=support))
    t = torch.linspace(0.05, 1.0, rows)
    got = codebook_posterior(noise, t, log_probs, codebook, backend=backend)
    assert (got - expected(noise, t, log_probs, codebook)).abs().max() < 5e-4


@pytest.mark.parametrize("time", [0.3, 0.1, 0.05, 0.02])
@pytest.mark.parametrize(("dim", "scale"), [(8, 0.35), (32, 0.5), (32, 1.0)])
def test_small_times_between_two_codes(backend, dim, scale, time):
    """Scores here are E = |x||c| / t^2 (1e5 at most), and what decides is of order one.

    Kernels that take differences do not feel it. The others lose E float32 roundings of a score, as the reference does:
    no more than that may reach the gradient, and of x0_hat the share of |c| by which the two codes differ.
    """
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    near = scale * normal(16, dim)
    codebook = torch.cat([near, near + 8.0 / dim**0.5 * time * normal(16, dim)]).float()
    weight = torch.rand(16, 1, generator=generator, dtype=torch.float64)
    x = ((1 - time) * (weight * codebook[:16] + (1 - weight) * codebook[16:]) + 0.1 * time * normal(16, dim)).float()
    log_probs, upstream = torch.zeros(16, 32), normal(16, dim)
    exact_x = x.double().requires_grad_()
    exact = codebook_posterior(exact_x, time, log_probs.double(), codebook.double())
    (exact_grad,) = torch.autograd.grad(exact, exact_x, upstream)
    leaf = x.clone().requires_grad_()
    got = codebook_posterior(leaf, time, log_probs, codebook, backend=backend)
    (grad,) = torch.autograd.grad(got, leaf, upstream.float())
    lost = 0.0 if backend in ("cpu", "cuda") else 2**-22 * (scale / time) ** 2 * dim
    assert (got - exact).abs().max() < 2e-6 + 2 * lost * time
    assert (grad - exact_grad).abs().max() < (2e-5 + 4 * lost) * exact_grad.abs().max()


def test_at_pure_noise_it_is_the_mean(backend):
    log_probs, noise, codebook = (tensor.float() for tensor in problem(9, 40, 4))
    got = codebook_posterior(noise, 1.0, log_probs, codebook, backend=backend)
    assert torch.allclose(got, log_probs.exp() @ codebook, atol=1e-5)


def test_one_code_left_is_that_code(backend):
    log_probs, noise, codebook = (tensor.float() for tensor in problem(9, 40, 4, support=0.0))
    got = codebook_posterior(noise, 0.3, log_probs, codebook, backend=backend)
    assert torch.allclose(got, codebook[log_probs.argmax(-1)], atol=1e-6)


def test_velocity_and_score_agree(backend):
    """s = -((1-t) v + x) / t: docs/method.md section 2 (The closed-form flow)."""
    log_probs, noise, codebook = (tensor.float() for tensor in problem(9, 40, 4))
    t = torch.linspace(0.1, 1.0, 9)
    v = velocity(noise, t, log_probs, codebook, backend=backend)
    s = score(noise, t, log_probs, codebook, backend=backend)
    assert torch.allclose(s, -((1 - t[:, None]) * v + noise) / t[:, None], rtol=1e-4, atol=1e-4)


def test_noise_draws_share_log_probs(backend):
    log_probs, _, codebook = (tensor.float() for tensor in problem(6, 30, 4))
    log_probs, x, t = (
        log_probs.view(2, 3, 30),
        torch.randn(5, 2, 3, 4, requires_grad=True),
        torch.rand(5, 1, 1) * 0.8 + 0.2,
    )
    shared = codebook_posterior(x, t, log_probs, codebook, backend=backend)
    (grad,) = torch.autograd.grad(shared.square().sum(), x)
    repeated = codebook_posterior(x, t, log_probs.expand(5, 2, 3, 30).contiguous(), codebook, backend=backend)
    (grad_repeated,) = torch.autograd.grad(repeated.square().sum(), x)
    assert torch.allclose(shared, repeated, atol=1e-5)
    assert torch.allclose(grad, grad_repeated, atol=1e-4)


def test_strides(backend):
    log_probs, noise, codebook = (tensor.float() for tensor in problem(12, 30, 4))
    x = noise.view(3, 4, 4).transpose(0, 1)
    got = codebook_posterior(x, 0.4, log_probs.view(3, 4, 30).transpose(0, 1), codebook, backend=backend)
    apart = codebook_posterior(noise, 0.4, log_probs, codebook, backend=backend)
    assert torch.allclose(got.transpose(0, 1).reshape(12, 4), apart, atol=1e-5)


def test_empty(backend):
    x = torch.empty(0, 4, requires_grad=True)
    got = codebook_posterior(x, 0.5, torch.empty(0, 7), torch.randn(7, 4), backend=backend)
    assert got.shape == (0, 4)
    assert torch.autograd.grad(got.sum(), x)[0].shape == (0, 4)


X, LOG_P, CODES = torch.randn(3, 4), torch.zeros(3, 5), torch.randn(5, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((X, 0.0, LOG_P, CODES), "t: got values from 0 to 0, expected 1e-12 <= t <= 1"),
        ((X, torch.tensor([0.1, 0.5, 1.5]), LOG_P, CODES), "t: got values from 0.1 to 1.5"),
        ((X, math.nan, LOG_P, CODES), "t: got values from nan"),
        ((X, torch.ones(2), LOG_P, CODES), r"t: got shape \(2,\)"),
        ((X, 0.5, torch.zeros(2, 5), CODES), r"log_probs: got shape \(2, 5\), expected \[3, 5\]"),
        ((X, 0.5, torch.zeros(3, 6), CODES), r"log_probs: got shape \(3, 6\)"),
        ((X, 0.5, torch.full((3, 5), -math.inf), CODES), "log_probs: row 0"),
        ((X, 0.5, torch.full((3, 5), math.nan), CODES), "log_probs: row 0"),
        ((X, 0.5, LOG_P.clone().requires_grad_(), CODES), "log_probs: requires a gradient"),
        ((X, 0.5, LOG_P, torch.randn(5, 3)), "codebook: got shape"),
    ],
)
def test_errors(backend, arguments, words):
    with pytest.raises(ValueError, match=words):
        codebook_posterior(*arguments, backend=backend)

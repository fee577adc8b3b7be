import pytest
import torch

from ddfast.ops import codebook_posterior, forms, score, velocity

T = torch.tensor([0.02, 0.3, 0.7, 0.98], dtype=torch.float64)


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, x0 = torch.randn(2, 5, 4, 3, dtype=torch.float64, generator=generator)
    return x, x0


@pytest.mark.parametrize("t", [T, 0.3])
def test_every_form_gives_every_other(t):
    x, x0 = tokens()
    v, s = forms.velocity_from_x0(x, t, x0), forms.score_from_x0(x, t, x0)
    for there in (forms.x0_from_velocity(x, t, v), forms.x0_from_score(x, t, s)):
        torch.testing.assert_close(there, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(forms.score_from_velocity(x, t, v), s)
    torch.testing.assert_close(forms.velocity_from_score(x, t, s), v, rtol=1e-7, atol=1e-7)


def test_the_velocity_of_one_known_token_is_noise_minus_token():
    noise, x0 = tokens()
    x = forms.add_noise(x0, noise, T)
    torch.testing.assert_close(forms.velocity_from_x0(x, T, x0), noise - x0)


def test_the_score_is_the_gradient_of_the_log_density():
    codebook = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    log_probs = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    x = tokens()[0][0].requires_grad_()
    distance = (x[:, None] - (1 - T)[:, None, None] * codebook).square().sum(-1)
    log_density = (log_probs - distance / (2 * T[:, None] ** 2)).logsumexp(-1)
    (gradient,) = torch.autograd.grad(log_density.sum(), x)
    x = x.detach()
    torch.testing.assert_close(score(x, T, log_probs, codebook), gradient)
    x0 = codebook_posterior(x, T, log_probs, codebook)
    torch.testing.assert_close(forms.score_from_velocity(x, T, velocity(x, T, log_probs, codebook)), gradient)
    torch.testing.assert_close(forms.x0_from_score(x, T, gradient), x0)

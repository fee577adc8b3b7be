import numpy as np
import pytest
import torch
from truth import filtered

from ddfast.ops import draw_codes, filter_logits


def drawn(log_probs: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and how close each number is to a boundary between two codes."""
    mass = np.exp(log_probs).cumsum(-1)
    mass /= mass[:, -1:]
    codes = np.array([np.searchsorted(row, number, side="right") for row, number in zip(mass, uniform, strict=True)])
    return codes, np.abs(mass - uniform[:, None]).min(-1)


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 60, "top_p": 0.8, "temperature": 1.4}, {"top_k": 1}]
)
@pytest.mark.parametrize("num_codes", [1, 7, 300, 4095])
def test_draws_what_the_number_says(backend, filters, num_codes, interpreted):
    rows = 16 if interpreted else 200
    generator = torch.Generator().manual_seed(num_codes)
    logits = 3 * torch.randn(rows, num_codes, generator=generator)
    uniform = torch.rand(rows, generator=generator)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-24])
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **filters}
    expected, margin = drawn(filtered(logits.double().numpy(), **settings), uniform.double().numpy())
    codes = draw_codes(logits, uniform, **filters, backend=backend).numpy()
    assert ((codes == expected) | (margin < 2e-6)).all()
    log_probs = filter_logits(logits, **filters, backend="reference")
    assert (log_probs[torch.arange(rows), torch.from_numpy(codes)] > -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_guidance_shapes_and_dtypes(backend, dtype):
    logits, uncond = (2 * torch.randn(2, 5, 90)).to(dtype), torch.randn(2, 5, 90).to(dtype)
    uniform, scale = torch.rand(2, 5), torch.rand(2, 1) + 1
    codes = draw_codes(logits, uniform, uncond=uncond, cfg_scale=scale, top_k=30, backend=backend)
    guided = uncond.float() + scale[..., None] * (logits.float() - uncond.float())
    assert torch.equal(codes, draw_codes(guided, uniform, top_k=30, backend="reference"))


def test_frequencies_are_the_distribution(backend, interpreted):
    count = 50_000
    logits = torch.tensor([1.0, -torch.inf, 0.0, 2.0, -1.0]).expand(count, 5)
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    if interpreted:  # slow; the same codes have the same frequencies
        logits, uniform = logits[:300], uniform[:300]
        codes, same = (draw_codes(logits, uniform, top_k=3, backend=name) for name in (backend, "reference"))
        assert torch.equal(codes, same)
        return
    share = draw_codes(logits, uniform, top_k=3, backend=backend).bincount(minlength=5) / count
    assert (share - filter_logits(logits[0], top_k=3).exp()).abs().max() < 5 * (0.25 / count) ** 0.5


def test_greedy_takes_the_first_of_equals(backend):
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert draw_codes(logits, torch.zeros(2), top_k=1, backend=backend).tolist() == [1, 0]


def test_a_number_that_rounds_to_one_draws_the_last_kept(backend):
    logits, uniform = torch.tensor([[0.0, 2.0, 1.0, -5.0]]), torch.tensor([1 - 2**-40], dtype=torch.float64)
    assert draw_codes(logits, uniform, top_k=3, backend=backend).tolist() == [2]


def test_empty(backend):
    assert draw_codes(torch.empty(0, 4, 7), torch.empty(0, 4), backend=backend).shape == (0, 4)


@pytest.mark.parametrize(
    ("logits", "uniform", "words"),
    [
        (torch.zeros(3, 5), torch.zeros(2), "uniform: got shape"),
        (torch.full((3, 5), torch.nan), torch.zeros(3), "logits: row 0"),
        (torch.tensor([[0.0, 1.0], [0.0, torch.inf]]), torch.zeros(2), "logits: row 1"),
    ],
)
def test_errors(backend, logits, uniform, words):
    with pytest.raises(ValueError, match=words):
        draw_codes(logits, uniform, backend=backend)

import numpy as np
import pytest

SHAPES = [(0, 5, 2), (1, 1, 1), (5, 7, 3), (5, 4095, 8), (7, 4096, 32), (3, 300, 64), (6, 16384, 8)]


def reference(x, t, log_probs, codebook, grad):
    x, t, log_probs, codebook, grad = (a.astype(np.float64) for a in (x, t, log_probs, codebook, grad))
    x0, lse, dx = np.zeros_like(x), np.zeros(len(x)), np.zeros_like(x)
    for i in range(len(x)):
        score = log_probs[i] - ((x[i] - (1 - t[i]) * codebook) ** 2).sum(1) / (2 * t[i] ** 2)
        most = score.max()
        lse[i] = most + np.log(np.exp(score - most).sum())
        weight = np.exp(score - lse[i])
        x0[i] = weight @ codebook
        dx[i] = (1 - t[i]) / t[i] ** 2 * (weight * ((codebook - x0[i]) @ grad[i])) @ codebook
    return x0, lse, dx


def problem(rows, num_codes, dim, t, seed=0, finite=1.0, spread=2.5):
    """Rows on the flow's own paths: x = (1-t) c + t eps for a code c of positive probability."""
    rng = np.random.default_rng(seed)
    codebook = rng.normal(size=(num_codes, dim)).astype(np.float32)
    codebook /= np.linalg.norm(codebook, axis=1, keepdims=True)
    logits = rng.normal(size=(rows, num_codes)) * spread
    logits[rng.random(logits.shape) >= finite] = -np.inf
    if rows:
        logits[:, rng.integers(num_codes)] = 0.5
    log_probs = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
    t = np.full(rows, t, np.float32) if np.isscalar(t) else t
    near = codebook[[rng.choice(np.flatnonzero(np.isfinite(row))) for row in log_probs]] if rows else np.zeros((0, dim))
    x = ((1 - t)[:, None] * near + t[:, None] * rng.normal(size=(rows, dim))).astype(np.float32)
    grad = rng.normal(size=(rows, dim)).astype(np.float32)
    return x, t, log_probs, codebook, grad


@pytest.mark.parametrize("rows, num_codes, dim", SHAPES)
@pytest.mark.parametrize("t", [0.02, 0.1, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("finite", [1.0, 0.2])
def test_against_float64(kernels, isa, rows, num_codes, dim, t, finite) -> None:
    x, t_rows, log_probs, codebook, grad = problem(rows, num_codes, dim, t, finite=finite)
    x0, lse, status = kernels.posterior_forward(x, t_rows, log_probs, codebook)
    assert status == -1
    expected_x0, expected_lse, expected_dx = reference(x, t_rows, log_probs, codebook, grad)
    np.testing.assert_allclose(x0, expected_x0, rtol=0, atol=1e-5)  # max |c| is 1
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=2e-5)
    dx = kernels.posterior_backward(grad, x, t_rows, log_probs, codebook, x0, lse)
    # |dx| <= (1-t)/t^2 |cov| |g|; the weights are good to about 1e-5 relative.
    bound = 2e-5 * (1 - t) / t**2 * np.linalg.norm(grad, axis=1, keepdims=True) + 1e-6 if rows else 1.0
    assert (np.abs(dx - expected_dx) <= bound).all()
    scale = np.abs(expected_dx).max(initial=0.0)
    np.testing.assert_allclose(dx, expected_dx, rtol=0, atol=1e-3 * scale + 1e-6)


@pytest.mark.parametrize("dtype", [1, 2])
def test_half_precision_rows(kernels, isa, dtype) -> None:
    x, t, log_probs, codebook, grad = problem(5, 333, 8, 0.5, finite=0.5)
    bits, values = kernels.to_dtype(log_probs, dtype)
    x0, lse, status = kernels.posterior_forward(x, t, bits, codebook, dtype)
    assert status == -1
    same_x0, same_lse, _ = kernels.posterior_forward(x, t, values, codebook)
    assert np.array_equal(x0, same_x0)
    assert np.array_equal(lse, same_lse)
    assert np.array_equal(
        kernels.posterior_backward(grad, x, t, bits, codebook, x0, lse, dtype),
        kernels.posterior_backward(grad, x, t, values, codebook, x0, lse),
    )


def test_any_split_gives_the_same(kernels, isa) -> None:
    t = np.linspace(0.02, 1, 41).astype(np.float32)
    x, t, log_probs, codebook, grad = problem(41, 700, 8, t, finite=0.3)
    x0, lse, _ = kernels.posterior_forward(x, t, log_probs, codebook)
    dx = kernels.posterior_backward(grad, x, t, log_probs, codebook, x0, lse)
    for threads in (2, 4):
        again = kernels.posterior_forward(x, t, log_probs, codebook, threads=threads)
        assert np.array_equal(again[0], x0)
        assert np.array_equal(again[1], lse)
        assert np.array_equal(kernels.posterior_backward(grad, x, t, log_probs, codebook, x0, lse, threads=threads), dx)
    for i in (0, 1, 7, 40):
        row = slice(i, i + 1)
        assert np.array_equal(kernels.posterior_forward(x[row], t[row], log_probs[row], codebook)[0], x0[row])
        alone = kernels.posterior_backward(grad[row], x[row], t[row], log_probs[row], codebook, x0[row], lse[row])
        assert np.array_equal(alone, dx[row])


@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.inf] * 33])
def test_status_names_the_first_bad_row(kernels, isa, bad) -> None:
    x, t, log_probs, codebook, _ = problem(40, 33, 4, 0.5)
    log_probs[[17, 23, 31], : len(bad)] = bad
    for threads in (1, 2, 4):
        assert kernels.posterior_forward(x, t, log_probs, codebook, threads=threads)[2] == 17

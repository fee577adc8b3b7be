import math

import numpy as np
import pytest


def reference(log_p, eps, codebook, sigma_min, steps, solver) -> int:
    """One row in float64, without early exit, in VE form: docs/method.md section 2 (The closed-form flow).

    With the solvers of ddfast.ops.
    """
    support = np.flatnonzero(np.isfinite(log_p))
    log_p, codes, eps = log_p[support].astype(np.float64), codebook[support].astype(np.float64), eps.astype(np.float64)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = p @ codes
    spread = math.sqrt(p @ ((codes - mean) ** 2).sum(1) / codes.shape[1])
    if len(support) == 1 or spread == 0:
        return int(support[p.argmax()])

    def scores(u, sigma):
        return log_p - ((u - codes) ** 2).sum(1) / (2 * sigma**2)

    def posterior_mean(u, sigma):
        s = scores(u, sigma)
        w = np.exp(s - s.max())
        return w @ codes / w.sum()

    sigma_max = max(8 * spread, 2 * sigma_min)
    h = math.log(sigma_max / sigma_min) / steps
    g, i0 = math.exp(-h), -math.expm1(-h)
    i1 = h - i0
    i2 = h * h - 2 * i1
    u = sigma_max * eps + mean
    first = posterior_mean(u, sigma_max)
    u = u + (first - mean) / 2
    history = [first, mean + (first - mean) * g, mean + (first - mean) * g * g]
    for i in range(steps):
        if i > 0:
            history = [posterior_mean(u, sigma_max * g**i), *history[:2]]
        d0, d1, d2 = history
        if solver == "euler":
            u = g * u + i0 * d0
        elif solver == "dpm2m":
            u = g * u + i0 * d0 + i1 * (d0 - d1) / h
        elif solver == "dpm3m":
            u = g * u + i0 * d0 + i1 * (3 * d0 - 4 * d1 + d2) / (2 * h) + i2 * (d0 - 2 * d1 + d2) / (2 * h * h)
        else:
            end = posterior_mean(g * u + i0 * d0, sigma_max * g ** (i + 1))
            u = g * u + i0 * d0 + i1 * (end - d0) / h
    return int(support[scores(u, sigma_min).argmax()])


def problem(rows, num_codes, dim, finite=1.0, spread=2.0, seed=0):
    rng = np.random.default_rng(seed)
    codebook = rng.normal(size=(num_codes, dim)).astype(np.float32)
    codebook /= np.linalg.norm(codebook, axis=1, keepdims=True)
    logits = rng.normal(size=(rows, num_codes)) * spread
    logits[rng.random(logits.shape) >= finite] = -np.inf
    logits[:, rng.integers(num_codes)] = 0.5
    return logits.astype(np.float32), rng.normal(size=(rows, dim)).astype(np.float32), codebook


@pytest.mark.parametrize("solver", ["euler", "dpm2m", "dpm3m", "heun"])
@pytest.mark.parametrize(
    "rows, num_codes, dim, finite",
    [(1, 1, 1, 1.0), (40, 7, 3, 1.0), (200, 64, 8, 0.5), (40, 1000, 32, 0.2), (20, 4095, 8, 1.0), (60, 101, 64, 1.0)],
)
def test_against_float64(kernels, isa, solver, rows, num_codes, dim, finite) -> None:
    log_probs, noise, codebook = problem(rows, num_codes, dim, finite)
    expected = [reference(p, eps, codebook, 0.05, 15, solver) for p, eps in zip(log_probs, noise, strict=True)]
    shape = kernels.geometry(codebook)
    for early_exit in (False, True):
        codes, evaluations, status = kernels.flow_sample(
            log_probs, noise, codebook, shape, steps=15, solver=solver, early_exit=early_exit
        )
        assert status == -1
        # A token that passes within float32 rounding of a basin's boundary may differ: at most one in a hundred.
        assert (codes != expected).sum() <= rows // 100
        full = 31 if solver == "heun" else 16
        if early_exit:
            assert (evaluations <= full).all()
        else:
            assert (evaluations == (0 if num_codes == 1 else full)).all()


@pytest.mark.parametrize("dim, finite, sharpness", [(2, 1.0, 1.0), (8, 0.5, 4.0), (32, 1.0, 2.5)])
def test_early_exit_never_changes_a_code(kernels, dim, finite, sharpness) -> None:
    log_probs, noise, codebook = problem(3000, 256, dim, finite, sharpness, seed=1)
    shape = kernels.geometry(codebook)
    options = {"sigma_min": float(np.median(shape[:-1])) / 8, "steps": 24, "threads": 2}
    full = kernels.flow_sample(log_probs, noise, codebook, shape, early_exit=False, **options)
    early = kernels.flow_sample(log_probs, noise, codebook, shape, early_exit=True, **options)
    assert np.array_equal(full[0], early[0])
    assert early[1].mean() < full[1].mean()


def test_frequencies_are_p(kernels, isa) -> None:
    rng = np.random.default_rng(2)
    count, num_codes = 20000, 16
    codebook = rng.normal(size=(num_codes, 4)).astype(np.float32)
    p = rng.dirichlet(np.full(num_codes, 1.0))
    log_probs = np.broadcast_to(np.log(p).astype(np.float32), (count, num_codes))
    noise = kernels.noise(5, np.arange(count), 4)
    codes, _, status = kernels.flow_sample(
        log_probs, noise, codebook, kernels.geometry(codebook), steps=64, sigma_min=0.02, threads=2
    )
    assert status == -1
    chi_square = ((np.bincount(codes, minlength=num_codes) - count * p) ** 2 / (count * p)).sum()
    assert chi_square < 37.7  # 15 degrees of freedom, p = 0.001


def test_far_from_the_origin(kernels, isa) -> None:
    log_probs, noise, codebook = problem(200, 64, 8)
    moved = (codebook * 64).round() / 64 + np.float32(1000)  # exactly representable: the same problem, translated
    near = (moved - 1000).astype(np.float32)
    a = kernels.flow_sample(log_probs, noise, moved, kernels.geometry(near))[0]
    b = kernels.flow_sample(log_probs, noise, near, kernels.geometry(near))[0]
    assert (a != b).sum() <= 2


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (50, 1.0), (0, 0.8), (100, 0.95)])
def test_sample_codes_is_filter_then_flow(kernels, isa, top_k, top_p) -> None:
    logits, noise, codebook = problem(50, 999, 8)
    uncond = np.random.default_rng(3).normal(size=logits.shape).astype(np.float32)
    cfg_scale = np.linspace(1, 3, 50).astype(np.float32)
    shape = kernels.geometry(codebook)
    options = {"uncond": uncond, "cfg_scale": cfg_scale, "temperature": 0.9, "top_k": top_k, "top_p": top_p}
    log_probs, status = kernels.filter_logits(logits, **options)
    assert status == -1
    one_by_one = kernels.flow_sample(log_probs, noise, codebook, shape)
    fused = kernels.sample_codes(logits, noise, codebook, shape, **options)
    assert np.array_equal(fused[0], one_by_one[0])
    assert np.array_equal(fused[1], one_by_one[1])
    assert fused[2] == -1


def test_degenerate_supports(kernels, isa) -> None:
    _, noise, codebook = problem(3, 20, 4)
    shape = kernels.geometry(codebook)
    log_probs = np.full((3, 20), -np.inf, np.float32)
    log_probs[0, 13] = -5
    log_probs[1, 4] = 0
    log_probs[2, [3, 9, 12]] = [-1, 0, 0]
    codebook[[3, 9, 12]] = 0.25  # equal codes: the most probable one, the lowest of equals
    codes, evaluations, status = kernels.flow_sample(log_probs, noise, codebook, shape)
    assert status == -1
    assert codes.tolist() == [13, 4, 9]
    assert evaluations.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [1, 2])
def test_half_precision_rows(kernels, isa, dtype) -> None:
    log_probs, noise, codebook = problem(30, 333, 8, 0.5)
    bits, values = kernels.to_dtype(log_probs, dtype)
    shape = kernels.geometry(codebook)
    half = kernels.flow_sample(bits, noise, codebook, shape, dtype=dtype)
    full = kernels.flow_sample(values, noise, codebook, shape)
    assert np.array_equal(half[0], full[0])
    assert np.array_equal(half[1], full[1])


@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.inf] * 33])
def test_status_names_the_first_bad_row(kernels, isa, bad) -> None:
    log_probs, noise, codebook = problem(40, 33, 4)
    shape = kernels.geometry(codebook)
    log_probs[[17, 23, 31], : len(bad)] = bad
    for threads in (1, 2, 4):
        assert kernels.flow_sample(log_probs, noise, codebook, shape, threads=threads)[2] == 17
        assert kernels.sample_codes(log_probs, noise, codebook, shape, threads=threads)[2] == 17
    noise[5, 2] = np.nan
    assert kernels.flow_sample(log_probs, noise, codebook, shape)[2] == 5


def test_any_split_gives_the_same(kernels, isa) -> None:
    log_probs, noise, codebook = problem(37, 500, 8, 0.4)
    shape = kernels.geometry(codebook)
    one = kernels.flow_sample(log_probs, noise, codebook, shape)
    for threads in (2, 4):
        again = kernels.flow_sample(log_probs, noise, codebook, shape, threads=threads)
        assert np.array_equal(again[0], one[0])
        assert np.array_equal(again[1], one[1])
    alone = kernels.flow_sample(log_probs[9:10], noise[9:10], codebook, shape)
    assert (alone[0][0], alone[1][0]) == (one[0][9], one[1][9])

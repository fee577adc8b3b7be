import numpy as np
import pytest


def reference(logits, uncond=None, cfg_scale=None, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    x = logits.astype(np.float32)
    if uncond is not None:
        with np.errstate(invalid="ignore"):
            guided = uncond + cfg_scale[:, None] * (x - uncond)
        x = np.where(np.isneginf(x) & np.isneginf(uncond), -np.inf, guided)
    x = (x / np.float32(temperature)).astype(np.float64)
    out = np.full(x.shape, -np.inf)
    for row, (values, target) in enumerate(zip(x, out, strict=True)):
        keep = np.isfinite(values)
        if 0 < top_k < len(values):
            keep &= values >= np.sort(values)[-top_k]
        weight = np.where(keep, np.exp(values - values[keep].max()), 0)
        if top_p < 1:
            order = np.argsort(-values, kind="stable")
            before = np.concatenate([[0], np.cumsum(weight[order])[:-1]]) / weight.sum()
            keep[order] &= (before < top_p) | (np.arange(len(order)) == 0)
        target[keep] = values[keep] - values[keep].max()
        target[keep] -= np.log(np.exp(target[keep]).sum())
        assert keep.any(), row
    return out


FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 900},
    {"top_k": 10**9},
    {"top_p": 0.0},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_k": 900, "top_p": 0.95},
    {"top_k": 5, "top_p": 0.5, "temperature": 0.7},
]


@pytest.mark.parametrize("rows, num_codes", [(0, 5), (1, 1), (5, 7), (5, 64), (3, 4095), (2, 16384)])
@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [0, 1, 2])
def test_against_sorting_in_float64(kernels, isa, rows, num_codes, options, dtype) -> None:
    rng = np.random.default_rng(num_codes)
    bits, logits = kernels.to_dtype(rng.normal(size=(rows, num_codes)) * 3, dtype)
    got, status = kernels.filter_logits(bits, dtype=dtype, **options)
    assert status == -1
    expected = reference(logits, **options)
    assert np.array_equal(np.isneginf(got), np.isneginf(expected))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
    "values",
    [
        lambda rng, n: np.zeros(n),
        lambda rng, n: rng.integers(-2, 3, n),
        lambda rng, n: np.where(rng.random(n) < 0.9, -np.inf, rng.normal(size=n)),
        lambda rng, n: rng.normal(size=n) * 1e-30,
        lambda rng, n: np.concatenate([[-3e38, 50.0], rng.normal(size=n - 2)]),
        lambda rng, n: np.exp(rng.normal(size=n) * 20) * rng.choice([-1, 1], n),
        lambda rng, n: np.concatenate([[0.0], np.full(n - 1, -1e4)]),
    ],
    ids=["equal", "ties", "sparse", "tiny", "outlier", "log-normal", "peak"],
)
@pytest.mark.parametrize("options", FILTERS[:-1], ids=str)
def test_hard_distributions(kernels, isa, values, options) -> None:
    rng = np.random.default_rng(0)
    logits = np.stack([values(rng, 2000) for _ in range(3)]).astype(np.float32)
    got, status = kernels.filter_logits(logits, **options)
    assert status == -1
    expected = reference(logits, **options)
    assert np.array_equal(np.isneginf(got), np.isneginf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(got[finite], expected[finite], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [0, 1, 2])
def test_guidance(kernels, isa, dtype) -> None:
    rng = np.random.default_rng(4)
    bits, logits = kernels.to_dtype(rng.normal(size=(6, 501)), dtype)
    other_bits, uncond = kernels.to_dtype(rng.normal(size=(6, 501)), dtype)
    cfg_scale = rng.uniform(0, 4, 6).astype(np.float32)
    got, status = kernels.filter_logits(
        bits, dtype=dtype, uncond=other_bits, cfg_scale=cfg_scale, temperature=0.8, top_k=50, top_p=0.9
    )
    expected = reference(logits, uncond, cfg_scale, 0.8, 50, 0.9)
    assert status == -1
    assert np.array_equal(np.isneginf(got), np.isneginf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(got[finite], expected[finite], rtol=1e-5, atol=1e-5)


def test_guidance_where_both_are_filtered(kernels, isa) -> None:
    logits = np.array([[1, -np.inf, 0, 2]], np.float32)
    uncond = np.array([[0, -np.inf, 1, 1]], np.float32)
    got, status = kernels.filter_logits(logits, uncond=uncond, cfg_scale=np.array([2], np.float32))
    assert status == -1
    assert np.isneginf(got[0]).tolist() == [False, True, False, False]


@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.inf] * 21])
def test_status_names_the_first_bad_row(kernels, isa, bad) -> None:
    logits = np.random.default_rng(5).normal(size=(40, 21)).astype(np.float32)
    logits[[17, 23, 31], : len(bad)] = bad
    for threads in (1, 2, 4):
        assert kernels.filter_logits(logits, threads=threads)[1] == 17


def test_rows_may_be_strided(kernels, isa) -> None:
    wide = np.random.default_rng(6).normal(size=(4, 100)).astype(np.float32)
    assert np.array_equal(
        kernels.filter_logits(wide[:, 3:60], top_k=9)[0],
        kernels.filter_logits(np.ascontiguousarray(wide[:, 3:60]), top_k=9)[0],
    )


def test_any_split_gives_the_same(kernels, isa) -> None:
    logits = np.random.default_rng(7).normal(size=(50, 1000)).astype(np.float32)
    one, _ = kernels.filter_logits(logits, top_k=100, top_p=0.9)
    for threads in (2, 4):
        assert np.array_equal(kernels.filter_logits(logits, top_k=100, top_p=0.9, threads=threads)[0], one)
    assert np.array_equal(kernels.filter_logits(logits[7:8], top_k=100, top_p=0.9)[0], one[7:8])

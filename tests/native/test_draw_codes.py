import numpy as np
import pytest

NEARLY_ONE = 1 - 2.0**-24
ROUNDING = 5e-7


def sums(logits, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """Running sums of the probabilities that are kept, in float64; 1 in the end."""
    x = (logits / np.float32(temperature)).astype(np.float64)
    keep = np.isfinite(x)
    if 0 < top_k < x.shape[1]:
        keep &= x >= np.sort(x, axis=1)[:, -top_k, None]
    weight = np.where(keep, np.exp(x - x.max(1, keepdims=True)), 0)
    if top_p < 1:
        for row in weight:
            order = np.argsort(-row, kind="stable")
            before = np.concatenate([[0], np.cumsum(row[order])[:-1]]) / row.sum()
            row[order[before >= top_p]] = 0
    mass = np.cumsum(weight, axis=1)
    return mass / mass[:, -1:]


def assert_drawn(kernels, logits, uniform, *, bits=None, dtype=0, **options) -> None:
    codes, status = kernels.draw_codes(logits if bits is None else bits, uniform, dtype=dtype, **options)
    assert status == -1
    mass = sums(logits, **options)
    for row, number, code in zip(mass, uniform.astype(np.float64), codes, strict=True):
        before = row[code - 1] if code else 0.0
        assert row[code] > before, "a code that the filter drops"
        assert before - ROUNDING <= number <= row[code] + ROUNDING
        if np.abs(row - number).min() > ROUNDING or number == 0:
            assert code == np.searchsorted(row, number, side="right")


def numbers(rng: np.random.Generator, rows: int) -> np.ndarray:
    uniform = rng.random(rows, dtype=np.float32)
    uniform[:2] = [0, NEARLY_ONE][:rows]
    return uniform


FILTERS = [{}, {"top_k": 1}, {"top_k": 40}, {"top_p": 0.3}, {"top_k": 900, "top_p": 0.95, "temperature": 0.7}]


@pytest.mark.parametrize("rows, num_codes", [(0, 5), (3, 1), (9, 7), (9, 129), (5, 4095), (2, 16384)])
@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [0, 1, 2])
def test_against_sums_in_float64(kernels, isa, rows, num_codes, options, dtype) -> None:
    rng = np.random.default_rng(num_codes)
    bits, logits = kernels.to_dtype(rng.normal(size=(rows, num_codes)) * 3, dtype)
    assert_drawn(kernels, logits, numbers(rng, rows), bits=bits, dtype=dtype, **options)


@pytest.mark.parametrize(
    "values",
    [
        lambda rng, n: np.zeros(n),
        lambda rng, n: rng.integers(-2, 3, n),
        lambda rng, n: np.where(rng.random(n) < 0.9, -np.inf, rng.normal(size=n)),
        lambda rng, n: np.concatenate([np.full(n - 1, -60.0), [0.0]]),
        lambda rng, n: np.concatenate([[0.0], np.full(n - 1, -60.0)]),
    ],
    ids=["equal", "ties", "sparse", "the last", "the first"],
)
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_hard_distributions(kernels, isa, values, options) -> None:
    rng = np.random.default_rng(0)
    logits = np.stack([values(rng, 1000) for _ in range(8)]).astype(np.float32)
    assert_drawn(kernels, logits, numbers(rng, 8), **options)


def test_the_likeliest_is_the_first_of_equals(kernels, isa) -> None:
    logits = np.random.default_rng(1).normal(size=(3, 200)).astype(np.float32)
    logits[0, 199], logits[1, [31, 64, 65]], logits[2] = 9, 9, -2
    assert kernels.draw_codes(logits, np.zeros(3, np.float32), top_k=1)[0].tolist() == [199, 31, 0]


@pytest.mark.parametrize("dtype", [0, 1, 2])
def test_guidance_and_strides(kernels, isa, dtype) -> None:
    """The codes that guided logits draw by themselves."""
    rng = np.random.default_rng(4)
    bits, logits = kernels.to_dtype(rng.normal(size=(6, 600)), dtype)
    other_bits, uncond = kernels.to_dtype(rng.normal(size=(6, 501)), dtype)
    cfg_scale = rng.uniform(0, 4, 6).astype(np.float32)
    options = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}
    uniform = numbers(rng, 6)
    codes, status = kernels.draw_codes(
        bits[:, 7:508], uniform, dtype=dtype, uncond=other_bits, cfg_scale=cfg_scale, **options
    )
    assert status == -1
    guided = uncond + cfg_scale[:, None] * (logits[:, 7:508] - uncond)
    assert np.array_equal(codes, kernels.draw_codes(guided, uniform, **options)[0])


@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.inf] * 21])
def test_status_names_the_first_bad_row(kernels, isa, bad) -> None:
    rng = np.random.default_rng(5)
    logits, uniform = rng.normal(size=(40, 21)).astype(np.float32), numbers(rng, 40)
    good, _ = kernels.draw_codes(logits, uniform)
    logits[[17, 23, 31], : len(bad)] = bad
    for threads in (1, 2, 4):
        codes, status = kernels.draw_codes(logits, uniform, threads=threads)
        assert status == 17
        assert np.array_equal(codes[:17], good[:17])


def test_any_split_gives_the_same(kernels, isa) -> None:
    rng = np.random.default_rng(7)
    logits, uniform = rng.normal(size=(50, 1000)).astype(np.float32), numbers(rng, 50)
    one, _ = kernels.draw_codes(logits, uniform, top_k=100, top_p=0.9)
    for threads in (2, 4):
        assert np.array_equal(kernels.draw_codes(logits, uniform, top_k=100, top_p=0.9, threads=threads)[0], one)
    assert np.array_equal(kernels.draw_codes(logits[7:8], uniform[7:8], top_k=100, top_p=0.9)[0], one[7:8])

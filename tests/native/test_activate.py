import numpy as np
import pytest

TOLERANCE = [1e-6, 8e-3, 1e-3]  # of float32, bfloat16, float16: as tests/ops/truth.py


def exact(x: np.ndarray, gelu: bool) -> np.ndarray:
    x = x.astype(np.float64)
    slope = 2 * np.sqrt(2 / np.pi) * (1 + 0.044715 * x**2) if gelu else 1
    return x / (1 + np.exp(-x * slope))


@pytest.mark.parametrize("count", [0, 1, 7, 255, 257, 9001])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [0, 1, 2])
def test_against_float64(kernels, isa, count, gelu, gated, dtype) -> None:
    rng = np.random.default_rng(count)
    (bits, x), (gate_bits, gate) = (kernels.to_dtype(rng.normal(size=count) * scale, dtype) for scale in (4, 1))
    got = kernels.from_dtype(kernels.activate(bits, gate_bits if gated else None, dtype=dtype, gelu=gelu), dtype)
    expected = exact(x, gelu) * (gate if gated else 1)
    assert (np.abs(got - expected) <= TOLERANCE[dtype] * (1 + np.abs(expected))).all()


@pytest.mark.parametrize("gelu", [False, True])
def test_far_values_and_nan(kernels, isa, gelu) -> None:
    x = np.array([0, -0.0, 30, -30, 1e4, -1e4, 3e38, np.inf, np.nan] * 5, np.float32)
    got = kernels.activate(x, gelu=gelu).reshape(5, 9)
    assert (got[:, :2] == 0).all()
    assert (got[:, [2, 4, 6, 7]] == x[[2, 4, 6, 7]]).all()
    assert (np.abs(got[:, [3, 5]]) < 1e-6).all()
    assert np.isnan(got[:, 8]).all()


def test_any_split_gives_the_same(kernels, isa) -> None:
    x, times = np.random.default_rng(1).normal(size=(2, 50_001)).astype(np.float32)
    one = kernels.activate(x, times)
    for threads in (2, 3, 4):
        assert np.array_equal(kernels.activate(x, times, threads=threads), one)
    assert np.array_equal(kernels.activate(x[:9000], times[:9000]), one[:9000])

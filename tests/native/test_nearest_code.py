import numpy as np
import pytest

SHAPES = [(1, 1, 1), (5, 7, 3), (5, 4095, 8), (33, 4096, 32), (3, 100, 64), (130, 257, 5), (64, 16384, 8)]


def distances(x: np.ndarray, codebook: np.ndarray, cosine: bool) -> np.ndarray:
    x, codebook = x.astype(np.float64), codebook.astype(np.float64)
    if cosine:
        unit = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-300) for v in (x, codebook)]
        return -unit[0] @ unit[1].T
    return np.stack([((row - codebook) ** 2).sum(1) for row in x]) if len(x) else np.zeros((0, len(codebook)))


@pytest.mark.parametrize("rows, num_codes, dim", SHAPES)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_is_the_float64_argmin(kernels, isa, rows, num_codes, dim, cosine, offset) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(rows, dim)) + offset).astype(np.float32)
    codebook = (rng.normal(size=(num_codes, dim)) + offset).astype(np.float32)
    distance = distances(x, codebook, cosine)
    codes = kernels.nearest_code(x, codebook, cosine)
    chosen = distance[np.arange(rows), codes]
    np.testing.assert_allclose(chosen, distance.min(1), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("cosine", [False, True])
def test_ties_take_the_lowest_index(kernels, isa, cosine) -> None:
    rng = np.random.default_rng(1)
    codebook = np.repeat(rng.integers(-2, 3, size=(300, 4)).astype(np.float32), 3, axis=0)
    codebook = codebook[rng.permutation(len(codebook))]
    x = rng.integers(-2, 3, size=(50, 4)).astype(np.float32)
    if cosine:  # equal directions of equal length, so that float64 sees exact ties
        codebook = np.sign(codebook) * np.float32(0.5)
    got = kernels.nearest_code(x, codebook, cosine)
    distance = np.round(distances(x, codebook, cosine), 12)
    assert np.array_equal(got, distance.argmin(1))


def test_cosine_of_zero_vectors(kernels, isa) -> None:
    codebook = np.array([[-1, 0], [0, 0], [0, 0]], np.float32)
    x = np.array([[0, 0], [1, 0], [-2, 0]], np.float32)
    assert kernels.nearest_code(x, codebook, True).tolist() == [0, 1, 0]


def test_any_split_gives_the_same(kernels, isa) -> None:
    rng = np.random.default_rng(2)
    x, codebook = rng.normal(size=(203, 8)).astype(np.float32), rng.normal(size=(1000, 8)).astype(np.float32)
    one = kernels.nearest_code(x, codebook)
    for threads in (2, 4):
        assert np.array_equal(kernels.nearest_code(x, codebook, threads=threads), one)


def test_bad_values_stay_in_range(kernels, isa) -> None:
    codebook = np.random.default_rng(3).normal(size=(70, 3)).astype(np.float32)
    x = np.array([[np.nan, 0, 0], [np.inf, 0, 0], [3e38, -3e38, 3e38]], np.float32)
    codes = kernels.nearest_code(x, codebook)
    assert ((codes >= 0) & (codes < 70)).all()
    assert codes[2] == distances(x[2:], codebook, False).argmin()


def test_empty(kernels, isa) -> None:
    assert kernels.nearest_code(np.zeros((0, 3), np.float32), np.zeros((4, 3), np.float32)).shape == (0,)

import math

import numpy as np
import pytest


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 as Salmon et al. (SC 2011) define it, in plain integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


def box_muller(x: int, y: int) -> tuple[float, float]:
    radius, angle = math.sqrt(-2 * math.log((x + 1) / 2**32)), 2 * math.pi * y / 2**32
    return radius * math.cos(angle), radius * math.sin(angle)


def test_philox_reference_has_the_published_answers() -> None:
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize("index", [0, 7, 2**40 + 3, -1])
def test_noise_is_box_muller_of_philox(kernels, noises, seed: int, index: int) -> None:
    got = kernels.noise(seed, np.array([index]), 11)[0]
    expected = []
    for quad in range(3):
        unsigned = index % 2**64
        r = philox((quad, unsigned % 2**32, unsigned >> 32, 0), (seed % 2**32, seed >> 32))
        expected += [*box_muller(r[0], r[1]), *box_muller(r[2], r[3])]
    np.testing.assert_allclose(got, np.array(expected[:11], np.float32), rtol=1.2e-7, atol=1e-12)


def test_noise_does_not_depend_on_the_batch_or_the_threads(kernels, noises) -> None:
    index = np.array([5, 2**33, 0, 12, 7, 5])
    together = kernels.noise(3, index, 4099, threads=4)
    for i, row in zip(index, together, strict=True):
        assert np.array_equal(kernels.noise(3, np.array([i]), 4099)[0], row)
    assert np.array_equal(kernels.noise(3, index, 10, threads=2), together[:, :10])


def test_noise_is_standard_normal(kernels, noises) -> None:
    x = kernels.noise(11, np.arange(1000), 1000, threads=2).astype(np.float64)
    # Five standard errors of each moment of 10^6 independent normals.
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((x**power).mean() - moment) < 5 * math.sqrt(variance / x.size)
    assert abs((x[:, :-1] * x[:, 1:]).mean()) < 5 / math.sqrt(x.size)
    assert abs((x[:-1] * x[1:]).mean()) < 5 / math.sqrt(x.size)
    quantiles = np.quantile(x, [0.001, 0.1, 0.5, 0.9, 0.999])
    np.testing.assert_allclose(quantiles, [-3.0902, -1.2816, 0, 1.2816, 3.0902], atol=0.06)


def test_empty(kernels, noises) -> None:
    assert kernels.noise(0, np.zeros(0, np.int64), 5).shape == (0, 5)
    assert kernels.noise(0, np.arange(3), 0).shape == (3, 0)

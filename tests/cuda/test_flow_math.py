"""kernels/flow_math.h on the host, against float64."""

import ctypes
import math

import numpy as np
import pytest

from ddfast.ops.flow_sample import SOLVERS


@pytest.fixture
def library(emulator):
    lib = emulator.library
    for name in ("math_key_of", "math_value_of_key"):
        getattr(lib, name).restype = ctypes.c_uint32 if name == "math_key_of" else ctypes.c_float
    lib.math_fixed_mass.restype = lib.math_mass_goal.restype = ctypes.c_uint64
    return lib


def test_keys_keep_the_order(library):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 2000, dtype=np.uint32).view(np.float32)
    values = np.append(
        values[np.isfinite(values)], np.float32([0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, math.inf, -math.inf])
    )
    values.sort()
    keys = [library.math_key_of(ctypes.c_float(value)) for value in values]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(set(values.tolist()))
    assert [library.math_value_of_key(ctypes.c_uint32(key)) for key in keys] == values.tolist()
    assert library.math_key_of(ctypes.c_float(-0.0)) == library.math_key_of(ctypes.c_float(0.0))
    assert library.math_key_of(ctypes.c_float(-math.inf)) == 0x007FFFFF


def test_masses(library):
    def mass(weight):
        return library.math_fixed_mass(ctypes.c_float(weight))

    assert mass(1.0) == 2**40
    assert mass(0.0) == 0
    assert mass(2.0**-40) == 1
    weight = np.float32(0.3)
    assert mass(weight) == int(float(weight) * 2**40)
    assert library.math_mass_goal(ctypes.c_double(0.5), ctypes.c_uint64(9)) == 5
    assert library.math_mass_goal(ctypes.c_double(1e-30), ctypes.c_uint64(9)) == 1


@pytest.mark.parametrize("h", [1e-4, 1e-2, 0.1, 0.3, 0.7, 0.999, 1.001, 2.0, 6.0])
def test_exponential_integrals(library, h):
    out = (ctypes.c_float * 3)()
    library.math_exponential_integrals(ctypes.c_float(h), out)
    h = float(np.float32(h))
    s, weights = np.polynomial.legendre.leggauss(30)
    s = (s + 1) * h / 2
    exact = [float((weights * np.exp(-(h - s)) * s**k).sum() * h / 2) for k in range(3)]
    np.testing.assert_allclose(list(out), exact, rtol=2e-6)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize(("spread", "steps"), [(1.0, 20), (0.3, 7), (1e-3, 20), (2.0, 1)])
def test_coefficients(library, solver, spread, steps):
    sigma_min = 0.05
    out = (ctypes.c_float * 7)()
    library.math_flow_grid(ctypes.c_float(spread), ctypes.c_float(sigma_min), steps, SOLVERS[solver], out)
    sigma_max, h, g, i0, a0, a1, a2 = out
    assert math.isclose(sigma_max, max(8 * spread, 2 * sigma_min), rel_tol=1e-6)
    exact_h = math.log(max(8 * spread, 2 * sigma_min) / sigma_min) / steps
    assert math.isclose(h, exact_h, rel_tol=1e-6)
    assert math.isclose(g, math.exp(-exact_h), abs_tol=1e-7)
    # A solver of order n is exact where D is a polynomial of degree below n; D at the nodes s = 0, -h, -2 h (Heun: h).
    nodes = [0.0, exact_h if solver == "heun" else -exact_h, -2 * exact_h]
    order = {"euler": 1, "dpm2m": 2, "heun": 2, "dpm3m": 3}[solver]
    s, weights = np.polynomial.legendre.leggauss(30)
    s = (s + 1) * exact_h / 2
    for degree in range(order):
        exact = float((weights * np.exp(-(exact_h - s)) * s**degree).sum() * exact_h / 2)
        got = sum(a * node**degree for a, node in zip((a0, a1, a2), nodes, strict=True))
        assert math.isclose(got, exact, rel_tol=3e-5)
    assert math.isclose(i0, -math.expm1(-exact_h), rel_tol=1e-6)


def test_exit_rule(library):
    def decided(rest, nearest=1.0, diameter=4.0, gap=0.0, slack=1e-6):
        return bool(library.math_flow_is_decided(*map(ctypes.c_float, (rest, nearest, diameter, gap, slack))))

    assert decided(0.0)
    assert decided(0.1)  # 2 delta R = .73
    assert not decided(0.2)  # 1.33
    assert decided(0.0, gap=-0.9)
    assert not decided(0.0, gap=-0.99)  # -n_k (n_k - 0), less the 1 %
    assert not decided(0.1, gap=-0.5)
    assert not decided(0.0, nearest=0.0)  # a duplicated code is never decided

import pytest
from backends import backends_of

from ddfast import env
from ddfast.ops import dispatch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend`: every one that can run here and, in a file of one op, has a kernel for it."""
    if "backend" in metafunc.fixturenames:
        op = metafunc.module.__name__.rpartition("test_")[2]
        metafunc.parametrize("backend", backends_of(op) if op in dispatch.KERNELS else sorted(dispatch.available()))


@pytest.fixture
def interpreted(backend: str) -> bool:
    """Whether the backend runs a thousand times slower than it is meant to."""
    return backend == "triton" and env.triton_interpreted()

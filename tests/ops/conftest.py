from collections.abc import Iterator

import pytest
from backends import backends_of
from tiles import use_tile

from ddfast import env
from ddfast.ops import dispatch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend`: every one that can run here and, in a file of one op, has a kernel for it."""
    if "backend" in metafunc.fixturenames:
        op = metafunc.module.__name__.rpartition("test_")[2]
        metafunc.parametrize("backend", backends_of(op) if op in dispatch.KERNELS else sorted(dispatch.available()))


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Interpreted kernels have tiles of 256 rows, and pay for them; most problems here have fewer than 64."""
    if "triton" not in dispatch.available() or not env.triton_interpreted():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        use_tile(patch, 64, 512)
        yield


@pytest.fixture
def interpreted(backend: str) -> bool:
    """Whether the backend runs a thousand times slower than it is meant to."""
    return backend == "triton" and env.triton_interpreted()

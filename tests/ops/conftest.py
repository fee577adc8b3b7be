import pytest

from ddfast import env
from ddfast.ops import dispatch


@pytest.fixture(params=sorted(dispatch.available()))
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def interpreted(backend: str) -> bool:
    """Whether the backend runs a thousand times slower than it is meant to."""
    return backend == "triton" and env.triton_interpreted()

import pytest

from ddfast.ops import dispatch


@pytest.fixture(params=sorted(dispatch.available()))
def backend(request: pytest.FixtureRequest) -> str:
    return request.param

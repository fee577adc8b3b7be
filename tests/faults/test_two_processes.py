"""The same, done twice at once in one folder: one of both is refused, or both end with what one would make."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import injection
import pytest
from operations import each, result, run, start


@pytest.fixture(scope="module")
def second(server, tmp_path_factory):
    with injection.server(tmp_path_factory.mktemp("second")) as running:
        yield running


@pytest.mark.parametrize("operation", each("hub_save", "verdicts"))
def test_nothing_is_mixed(server, second, base, undisturbed, tmp_path, operation):
    work = start(operation, base, tmp_path / "work")
    with ThreadPoolExecutor(2) as both:
        ended = [*both.map(lambda where: run(where, operation, base, work), (server, second))]
    codes = sorted(end.code for end in ended)
    assert codes in ([0, 0], [0, 1]), ended
    for end in ended:
        assert end.errors.count("error:") == end.code, ended
        assert "Traceback" not in end.errors, ended
    assert result(work) == undisturbed.of(operation)

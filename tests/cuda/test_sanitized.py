"""The sizes on which compute-sanitizer is run and by which kernels are verified: what they reach on an H100."""

import sys
from pathlib import Path

import pytest

from ddfast.ops.checks import SAMPLED


def risks() -> list[tuple[int, int, dict[str, float]]]:
    """Codes, their dimension and filter, of tests/gpu/test_risks.py."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
    try:
        from test_risks import MANY
    finally:
        sys.path.pop(0)
    return [(num_codes, dim, {name: value}) for name, value, num_codes, dim in MANY]


@pytest.mark.parametrize(
    "sizes", [risks(), [(codes, 8, filters) for codes, filters in SAMPLED]], ids=["risks", "checks"]
)
def test_clusters_the_second_launch_and_one_launch_are_reached(emulator, sizes):
    plans = [emulator.flow_plan(num_codes, dim, **filters) for num_codes, dim, filters in sizes]
    assert any(kept < 0 and blocks > 1 for kept, blocks in plans)  # clusters
    assert any(kept >= 0 and blocks > 0 for kept, blocks in plans)  # a second launch for what the first one leaves
    assert any(kept >= 0 and not blocks for kept, blocks in plans)  # half a multiprocessor for every row

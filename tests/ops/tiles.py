"""One tile for all Triton kernels that take theirs from a table."""

import pytest


def use_tile(monkeypatch: pytest.MonkeyPatch, rows: int, codes: int) -> None:
    """A program's rows and codes; four warps, two stages."""
    pytest.importorskip("triton")
    from ddfast_kernels import tiles

    monkeypatch.setattr(tiles, "EVERY", tiles.Tile(rows, codes, num_warps=4, num_stages=2))

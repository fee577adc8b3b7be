"""Which tile of rows and codes a launch has: one table, never a race.

Sums over the codes go tile by tile, and within a tile in an order of the GPU's own: another tile means other last bits,
and now and then another code. So a tile follows from the kernel, the GPU's capability and the code dimension alone: not
from how many rows come along, nor from what some process found the fastest; choosing backends by time (`ddfast tune`)
changes none. A row's bits do not depend on the rows beside it, but on their number in a tile they do: a program of one
row adds products in float32, and one of several shares them out among its threads in another way.

Chosen without a GPU, by what Triton 3.9 compiles for sm_80, 90, 100 and 120 at 8, 32, 64 and 128 coordinates: nothing
spills; of those, the fewest instructions of the loop over the codes per row and code, and then the most warps that a
multiprocessor holds. An estimate: none of them was timed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
from ddfast_kernels.launch import INTERPRETED, capability
from torch import Tensor


class Tile(NamedTuple):
    """Rows and codes of a program's tile, its warps, and for how many tiles Triton's pipeline makes room."""

    rows: int
    codes: int
    num_warps: int
    num_stages: int


class Line(NamedTuple):
    """Of the table: for GPUs of at least this capability (80 is 8.0), and codes of at most this dimension."""

    capability: int
    dim: int
    tile: Tile


_ANY = 1 << 30

# Behind the tiles: instructions of a thread per row and code (all warps of a program, by 32), and registers, on sm_90.
TILES: dict[str, tuple[Line, ...]] = {
    # As sample_codes, guided. A step of LlamaGen (8 coordinates) has as many tokens as pictures: a program each. 214,
    # of 64 rows 102, but those would leave all but a few multiprocessors idle; 177 registers, 8 warps: half the codes
    # and warps take 211, but a program is then alone on a multiprocessor with 4. On sm_100 the larger tile spills
    # without a filter. VAR's scales (32) have up to 256 times as many tokens: 178, of one row 903; 175 registers,
    # 8 warps. Behind it 236 and 836, 217 and 241.
    "flow_sample": (
        Line(100, 16, Tile(1, 512, 4, 2)),
        Line(0, 16, Tile(1, 1024, 8, 2)),
        Line(0, 64, Tile(16, 32, 4, 2)),
        Line(0, _ANY, Tile(16, 16, 8, 2)),
    ),
    # 14 and 17, 108 and 122 registers, 16 warps; of 128 rows 12, with half as many programs. 27 and 88 registers.
    "nearest_code": (
        Line(0, 32, Tile(64, 64, 4, 3)),
        Line(0, 64, Tile(64, 32, 4, 2)),
        Line(0, _ANY, Tile(16, 32, 4, 2)),
    ),
    # 38 and 43, 96 and 128 registers, 20 and 16 warps; a second stage takes 3 more, and 16 bytes of stack on sm_80.
    "codebook_posterior": (
        Line(0, 32, Tile(64, 32, 4, 1)),
        Line(0, 64, Tile(16, 32, 4, 1)),
        Line(0, _ANY, Tile(16, 32, 4, 1)),
    ),
    # 39 and 45, 125 and 156 registers, 16 and 12 warps.
    "codebook_posterior_backward": (
        Line(0, 32, Tile(64, 32, 4, 1)),
        Line(0, 64, Tile(16, 32, 4, 1)),
        Line(0, _ANY, Tile(16, 16, 8, 1)),
    ),
}
"""Of every kernel: the first line that fits holds."""

EVERY: Tile | None = Tile(256, 512, 4, 1) if INTERPRETED else None
"""One for all kernels: the interpreter has no registers to fill, and pays by the operation."""


@functools.cache
def tile_of(kernel: str, capability: int, dim: int) -> Tile:
    """The table's tile."""
    return next(line.tile for line in TILES[kernel] if capability >= line.capability and dim <= line.dim)


def constants(tile: Tile, dim: int) -> dict[str, int]:
    """What a kernel is compiled with: ROWS, CODES, and DIM, a power of two, at least 16 where rows make a matrix."""
    padded = triton.next_power_of_2(dim)
    return {"ROWS": tile.rows, "CODES": tile.codes, "DIM": padded if tile.rows == 1 else max(16, padded), "dim": dim}


def tile(kernel: str, rows: Tensor) -> dict[str, int]:
    """A launch's constants and options, for rows [rows, d]."""
    dim = rows.shape[1]
    chosen = EVERY or tile_of(kernel, capability(rows), dim)
    return {**constants(chosen, dim), "num_warps": chosen.num_warps, "num_stages": chosen.num_stages}

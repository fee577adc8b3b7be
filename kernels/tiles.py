"""Which tile of rows and codes a launch has: one table, never a race.

Sums over the codes go tile by tile, and within a tile in an order of the GPU's own: another tile means other last bits,
and now and then another code. So a tile follows from the kernel, the GPU's capability and the code dimension alone: not
from how many rows come along, nor from what some process found the fastest; choosing backends by time (`ddfast tune`)
changes none. A row's bits do not depend on the rows beside it, but on their number in a tile they do: a program of one
row adds products in float32, and one of several shares them out among its threads in another way.

How many registers a tile takes is also Triton's matter, and nobody chooses a user's Triton. So before its first launch
a variant of a kernel is compiled, and where it spills, smaller tiles made from the table's by rule: the first that
spills nothing is taken, else the one that spills least. The variant's types and switches decide with the rest, sizes
and alignments do not: the verdict is the same in every process with this Triton, and later launches look it up.

Chosen without a GPU, by what Triton 3.9 compiles for sm_80, 90, 100 and 120 at 8, 32, 64 and 128 coordinates: nothing
spills; of those, the fewest instructions of the loop over the codes per row and code, and then the most warps that a
multiprocessor holds. An estimate: none of them was timed. GPUs below 8.0 have no tensor cores for float32: there the
posterior, whose products of tiles spill up to 3.4 KB a thread on 7.5 and 8 KB on 7.0, has one row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import triton
from ddfast_kernels.launch import FUSED, INTERPRETED, capability, current_device
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

_WITHOUT_TENSOR_CORES = (
    Line(0, 32, Tile(1, 256, 4, 2)),
    Line(0, 64, Tile(1, 128, 4, 2)),
    Line(0, _ANY, Tile(1, 64, 4, 2)),
)

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
        Line(80, 32, Tile(64, 32, 4, 1)),
        Line(80, _ANY, Tile(16, 32, 4, 1)),
        *_WITHOUT_TENSOR_CORES,
    ),
    # 39 and 45, 125 and 156 registers, 16 and 12 warps.
    "codebook_posterior_backward": (
        Line(80, 32, Tile(64, 32, 4, 1)),
        Line(80, 64, Tile(16, 32, 4, 1)),
        Line(80, _ANY, Tile(16, 16, 8, 1)),
        *_WITHOUT_TENSOR_CORES,
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


class Verdict(NamedTuple):
    """The tile that a variant of a kernel has, and what led to it.

    spills: 32-bit words of a thread for which there was no register; None: this Triton does not say.
    before: (tile, spills) of what was compiled before it, beginning with the table's; empty where that is taken.
    """

    tile: Tile
    spills: int | None
    before: tuple[tuple[Tile, int | None], ...] = ()


_verdicts: dict[tuple[Any, ...], Verdict] = {}
"""By kernel, dimension, capability, switches and types."""


def smaller(tile: Tile) -> Iterator[Tile]:
    """What is tried in a tile's place, in this order: half the codes (16 make a matrix), twice the warps, both."""
    half, more = max(16, tile.codes // 2), min(16, 2 * tile.num_warps)
    tried = {tile}
    for codes, num_warps in ((half, tile.num_warps), (tile.codes, more), (half, more)):
        other = tile._replace(codes=codes, num_warps=num_warps)
        if other not in tried:
            tried.add(other)
            yield other


def launch(name: str, kernel: Any, rows: Tensor, arguments: tuple[Any, ...], **switches: Any) -> None:
    """Launch a kernel of the table on its arguments, with a program for every tile of `rows` [rows, d].

    switches: the kernel's constants but for those of its tile.
    """
    dim = rows.shape[1]
    with current_device(rows):
        tile = EVERY or _verdict(name, kernel, rows, arguments, switches).tile
        kernel[(triton.cdiv(len(rows), tile.rows),)](*arguments, **switches, **_settings(tile, dim))


def _verdict(name: str, kernel: Any, rows: Tensor, arguments: tuple[Any, ...], switches: dict[str, Any]) -> Verdict:
    """Found out once per variant."""
    dim, found = rows.shape[1], capability(rows)
    types = (value.dtype for value in arguments if isinstance(value, Tensor))
    key = (name, dim, found, *switches.values(), *types)
    verdict = _verdicts.get(key)
    if verdict is None:
        usual = [value.dtype if isinstance(value, Tensor) else 16 if isinstance(value, int) else value
                 for value in arguments]  # fmt: skip
        verdict = judge(
            tile_of(name, found, dim),
            lambda tile: spills(kernel.warmup(*usual, grid=(1,), **switches, **_settings(tile, dim))),
        )
        _verdicts[key] = verdict
    return verdict


def judge(first: Tile, spills_of: Callable[[Tile], int | None]) -> Verdict:
    """The first tile if it spills nothing, or nothing is known of it; else the best of it and its smaller ones."""
    tried: list[tuple[Tile, int | None]] = []
    for tile in (first, *smaller(first)):
        words = spills_of(tile)
        if not words:
            return Verdict(tile, words, tuple(tried))
        tried.append((tile, words))
    best = min(tried, key=lambda pair: pair[1] or 0)
    return Verdict(*best, () if best is tried[0] else tuple(tried[:1]))


def spills(compiled: Any) -> int | None:
    """Words of a thread that a compiled kernel spills, as its driver tells when it is loaded; None: not known.

    What does not fit the GPU's shared memory spills without end.
    """
    try:
        getattr(compiled, "run", None)  # loads it
    except triton.OutOfResources:
        return _ANY
    words = getattr(compiled, "n_spills", None)
    return words if isinstance(words, int) else None


def remarks() -> list[str]:
    """Of what this process has compiled: which variants have no tile of the table, and which spill all the same."""
    told = []
    for (name, dim, *_), (tile, words, before) in _verdicts.items():
        line = f"{name} of {dim} coordinates (Triton {triton.__version__}): a tile of {_said(tile)}"
        if before:
            line += f" in place of {_said(before[0][0])}, which {_spilling(before[0][1])}"
        if words:
            line += f"; it {_spilling(words)}"
        if before or words:
            told.append(line)
    return list(dict.fromkeys(told))


def _said(tile: Tile) -> str:
    return f"{tile.rows} x {tile.codes} codes, {tile.num_warps} warps"


def _spilling(words: int | None) -> str:
    return "does not fit the shared memory" if words == _ANY else f"spills {words} words a thread"


def _settings(tile: Tile, dim: int) -> dict[str, Any]:
    """A launch's constants and options."""
    return {**constants(tile, dim), "num_warps": tile.num_warps, "num_stages": tile.num_stages, **FUSED}

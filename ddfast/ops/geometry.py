"""What the flow's time grid and early exit need to know of a codebook, computed once and remembered.

A wrong geometry ends a flow too early, so what is remembered is used for the very numbers that it was computed from. A
version counter does not tell: writes through `.data`, and any in inference mode, pass it by. The numbers themselves are
compared, bit by bit: on a CPU at every use, which costs 20 us of the 200 or more that the shortest flow over as large a
codebook takes. A GPU would have to be waited for: there the counter decides, a decoding compares once at its start,
where it waits anyway, and `mark_stale` makes what a stale geometry led to no result.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ddfast import private_api
from ddfast.ops import common

_MOST_HELD = 2**24
"""Distances that are held at a time."""
_SIGMA_MIN_FRACTION = 1 / 8
"""Below an eighth of the distance between neighbouring codes nothing changes sides; measured:
docs/method.md section 3 (Solving the flow)."""

_MOST_DIFFERENCES = 2**32
"""Beyond VAR's codebook (2^29) and LlamaGen's (2^31): seconds. It would be 2^41 of 50,000 codes of 1,024 dimensions."""

_SCALES = (1e-15, 1e15)


class CodebookGeometry(NamedTuple):
    """Distances within a codebook.

    nearest: distance of every code to its nearest other code, float32 [V].
    diameter: upper bound on the distance of any two codes.
    sigma_min: where the flow's grid ends, in units of the codes.
    packed: float32 [V + 1], `nearest` followed by `diameter`, as the native kernels read it.
    centred: the codes less their mean, float32 [V, d]: a common offset costs the flow no digits.
    codes: a copy of the codebook.
    """

    nearest: Tensor
    diameter: float
    sigma_min: float
    packed: Tensor
    centred: Tensor
    codes: Tensor


_MOST_CODEBOOKS = 32

_cache: dict[tuple, tuple[StorageWeakRef, int, CodebookGeometry]] = {}


def codebook_geometry(codebook: Tensor, *, wait: bool = True) -> CodebookGeometry:
    """Geometry of `codebook` [V, d]; remembered as long as the tensor's memory lives and holds the same numbers.

    Without `wait`, the memory of a GPU is not looked at if a version counter tells of writes.

    Raises:
        ValueError: the codebook has NaN or infinite values, or codes so far apart, or so near each other, that float32
            does not hold the squares.
    """
    memory, layout = private_api.storage_key(codebook), (codebook.storage_offset(), codebook.shape, codebook.stride())
    key, version = (memory, *layout, codebook.dtype), private_api.writes(codebook)
    entry = _cache.get(key)
    if entry is not None and not entry[0].expired() and entry[1] == version:
        counted = not wait and version >= 0 and not codebook.is_cpu
        if counted or _same_bits(codebook, entry[2].codes):
            return entry[2]
    for stale in [k for k, (reference, _, _) in list(_cache.items()) if reference.expired()]:
        _cache.pop(stale, None)
    geometry = _compute(codebook)
    # Views of one memory live as long as it does. Not those of a GPU: a graph may read a geometry where it lies.
    on_cpu = [k for k, (_, _, kept) in list(_cache.items()) if kept.codes.is_cpu]
    for oldest in on_cpu[: 1 - _MOST_CODEBOOKS]:
        _cache.pop(oldest, None)
    _cache[key] = (StorageWeakRef(codebook.untyped_storage()), version, geometry)
    return geometry


def mark_stale(codes_out: Tensor, codebook: Tensor, geometry: CodebookGeometry) -> None:
    """Make codes -1 that a GPU found by the geometry of another codebook; the device is not waited for."""
    if not codebook.is_cpu:
        codes_out.masked_fill_((codebook != geometry.codes).any(), -1)


def _same_bits(codebook: Tensor, copy: Tensor) -> bool:
    if not codebook.is_cpu:
        return torch.equal(codebook, copy)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[codebook.element_size()]
    # NumPy's comparison takes a fifth of the time of torch.equal.
    return np.array_equal(codebook.detach().view(integers).numpy(), copy.view(integers).numpy())


def _compute(codebook: Tensor) -> CodebookGeometry:
    common.check_finite("codebook", codebook)
    kept = codebook.detach().clone()
    codes = kept.double()
    num_codes = len(codes)
    centred = codes - codes.mean(0)
    radius = float(centred.norm(dim=-1).max())
    nearest = torch.full((num_codes,), torch.inf, dtype=torch.float64, device=codes.device)
    # Sums of squared differences are a tenth as fast as a matrix product, which takes float64 to be as right.
    multiplied = num_codes**2 * codes.shape[1] > _MOST_DIFFERENCES
    points = centred if multiplied else codes.float()
    mode = "use_mm_for_euclid_dist" if multiplied else "donot_use_mm_for_euclid_dist"
    chunk = max(1, min(1024, _MOST_HELD // num_codes))
    for start in range(0, num_codes, chunk):
        rows = points[start : start + chunk]
        distance = torch.cdist(rows, points, compute_mode=mode)
        distance[
            torch.arange(len(rows), dtype=torch.int64), torch.arange(start, start + len(rows), dtype=torch.int64)
        ] = torch.inf
        nearest[start : start + chunk] = distance.amin(-1)
    if kept.dtype != torch.float64 and not (radius == 0.0 or _SCALES[0] <= radius <= _SCALES[1]):
        expected = f"from {_SCALES[0]:g} to {_SCALES[1]:g}, whose squares float32 holds"
        raise ValueError(f"codebook: got codes up to {radius:g} from their mean, expected {expected}")
    diameter = 2 * radius
    typical = float(nearest.median()) if num_codes > 1 else 1.0
    # A codebook of mostly duplicated codes has no neighbour distance to speak of: fall back on its size.
    sigma_min = max(typical * _SIGMA_MIN_FRACTION, 1e-3 * radius) or 1.0
    nearest = nearest.float()
    packed = torch.cat([nearest, torch.tensor([diameter], dtype=torch.float32, device=nearest.device)])
    return CodebookGeometry(nearest, diameter, sigma_min, packed, centred.float(), kept)

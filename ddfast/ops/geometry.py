"""What the flow's time grid and early exit need to know of a codebook, computed once and remembered."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_CHUNK = 1024
_SIGMA_MIN_FRACTION = 1 / 8
"""Below an eighth of the distance between neighbouring codes nothing changes sides (NUMERICS.md, measured)."""


class CodebookGeometry(NamedTuple):
    """Distances within a codebook.

    nearest: distance of every code to its nearest other code, float32 [V].
    diameter: upper bound on the distance of any two codes.
    sigma_min: where the flow's grid ends, in units of the codes.
    packed: float32 [V + 1], `nearest` followed by `diameter`, as the native kernels read it.
    centred: the codes less their mean, float32 [V, d]: a common offset costs the flow no digits.
    """

    nearest: Tensor
    diameter: float
    sigma_min: float
    packed: Tensor
    centred: Tensor


_cache: dict[tuple, tuple[StorageWeakRef, int, CodebookGeometry]] = {}


def codebook_geometry(codebook: Tensor) -> CodebookGeometry:
    """Geometry of `codebook` [V, d]; remembered as long as the tensor's memory lives and is not written to."""
    if codebook.is_inference():  # no version counter, so a change could not be noticed
        return _compute(codebook)
    storage = codebook.untyped_storage()
    key = (storage._cdata, codebook.storage_offset(), codebook.shape, codebook.stride(), codebook.dtype)
    entry = _cache.get(key)
    if entry is not None and not entry[0].expired() and entry[1] == codebook._version:
        return entry[2]
    for stale in [k for k, (reference, _, _) in _cache.items() if reference.expired()]:
        del _cache[stale]
    geometry = _compute(codebook)
    _cache[key] = (StorageWeakRef(storage), codebook._version, geometry)
    return geometry


def _compute(codebook: Tensor) -> CodebookGeometry:
    codes = codebook.detach().double()
    num_codes = len(codes)
    centred = codes - codes.mean(0)
    radius = float(centred.norm(dim=-1).max())
    nearest = torch.full((num_codes,), torch.inf, dtype=torch.float64, device=codes.device)
    for start in range(0, num_codes, _CHUNK):
        rows = codes[start : start + _CHUNK].float()
        distance = torch.cdist(rows, codes.float(), compute_mode="donot_use_mm_for_euclid_dist")
        distance[
            torch.arange(len(rows), dtype=torch.int64), torch.arange(start, start + len(rows), dtype=torch.int64)
        ] = torch.inf
        nearest[start : start + _CHUNK] = distance.amin(-1)
    diameter = 2 * radius
    typical = float(nearest.median()) if num_codes > 1 else 1.0
    # A codebook of mostly duplicated codes has no neighbour distance to speak of: fall back on its size.
    sigma_min = max(typical * _SIGMA_MIN_FRACTION, 1e-3 * radius) or 1.0
    nearest = nearest.float()
    packed = torch.cat([nearest, torch.tensor([diameter], dtype=torch.float32, device=nearest.device)])
    return CodebookGeometry(nearest, diameter, sigma_min, packed, centred.float())

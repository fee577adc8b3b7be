"""Files that samples are compared with: those that the field has, read and made.

adm: an npz file with `mu`, `sigma` (FID), `mu_s`, `sigma_s` (sFID) and `arr_0`, images for precision and recall. dd1: a
.pth file with `m` and `s`. clean: an npz file with `mu` and `sigma`, as clean-fid keeps them.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ddfast import processes, seeds
from ddfast.errors import DDFastError, first_line
from ddfast.evaluation.images import ARRAY, ImageArray, Images, is_archive, member
from ddfast.evaluation.inception import POOL, SPATIAL
from ddfast.evaluation.instruments import Instrument, Reference
from ddfast.files import reading, write_atomically
from ddfast.frechet import Gaussian
from ddfast.models.checkpoint import read_checkpoint, read_tensor
from ddfast.progress import Progress, silent

WIDTHS = {POOL: 2048, SPATIAL: 17 * 17 * 7}
"""Numbers of features of Inception."""

MOST_IMAGES = 10_000
"""That a reference holds for precision and recall, as the field's does."""

CLEAN = "clean"
"""Array of a reference that we make, the count of images; it tells clean's `mu` and `sigma` from adm's."""

_NAMES = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}
_FEATURES = {"fid": POOL, "sfid": SPATIAL}


class ReferenceFile:
    """A reference as it lies in a file, of which the images are still to be looked at.

    Attributes:
        path: of the file.
        gaussians: by the name of the distance.
        images: for precision and recall, and for the distances that the file has no statistics of; None: there are
            none.
    """

    def __init__(self, path: Path, instrument: str) -> None:
        """Read the file of an instrument: adm, dd1 or clean.

        Raises:
            DDFastError: it is missing, damaged, unsafe, or not what this instrument takes.
        """
        self.path = path
        self.gaussians: dict[str, Gaussian] = {}
        self.images: Images | None = None
        if not path.is_file():
            raise DDFastError(f"--reference {path}: there is no such file")
        {"adm": self._read_adm, "dd1": self._read_dd1, "clean": self._read_clean}[instrument]()
        for name, gaussian in self.gaussians.items():
            _check(gaussian, WIDTHS[_FEATURES[name]], f"--reference {path}: {name}")

    def seen_by(self, instrument: Instrument, progress: Progress = silent) -> Reference:
        """What the instrument compares with; processes share the images, and the first one has their features."""
        if self.images is None:
            return Reference(gaussians=self.gaussians)
        seen = instrument.see(self.images.batches(), progress, count=self.images.count).reference()
        return Reference(gaussians={**seen.gaussians, **self.gaussians}, features=seen.features)

    def _read_adm(self) -> None:
        option, path = "--reference", self.path
        names = _names(path)
        if names is None or {"mu", "sigma", ARRAY}.isdisjoint(names):
            there = "" if names is None else f", not {', '.join(names)[:80]}"
            expected = f"an .npz file with mu, sigma, mu_s, sigma_s and {ARRAY}"
            raise DDFastError(f"{option} {path}: --protocol adm takes {expected}{there}")
        if CLEAN in names:
            raise DDFastError(f"{option} {path}: was made by --protocol clean, whose statistics are others than adm's")
        if not {"mu", "sigma"} <= set(names) and ARRAY not in names:
            raise DDFastError(f"{option} {path}: has {', '.join(names)[:80]}, and neither mu with sigma nor {ARRAY}")
        if {"mu_s", "sigma_s", ARRAY}.isdisjoint(names):
            raise DDFastError(
                f"{option} {path}: has mu and sigma alone, as references of pytorch-fid and clean-fid do, which resize "
                f"images otherwise; adm's have mu_s, sigma_s or {ARRAY} too"
            )
        for distance, (mean, covariance) in _NAMES.items():
            if {mean, covariance} <= set(names):
                self.gaussians[distance] = Gaussian(_array(path, mean), _array(path, covariance))
        if ARRAY in names:
            self.images = ImageArray(path, option)

    def _read_clean(self) -> None:
        names = _names(self.path) or []
        if not {"mu", "sigma"} <= set(names) or not {"mu_s", ARRAY}.isdisjoint(names):
            there = f"it has {', '.join(names)[:80]}" if names else "it is none"
            expected = "an .npz file with mu and sigma alone, of --make-reference or of clean-fid"
            raise DDFastError(f"--reference {self.path}: --protocol clean takes {expected}; {there}")
        self.gaussians["fid"] = Gaussian(_array(self.path, "mu"), _array(self.path, "sigma"))

    def _read_dd1(self) -> None:
        if _names(self.path) is not None:
            raise DDFastError(
                f"--reference {self.path}: is an .npz file, as --protocol adm takes it; --protocol dd1 takes a .pth "
                "file with m and s (the statistic.pth of Distilled Decoding 1)"
            )
        content, _ = read_checkpoint(self.path)
        if not {"m", "s"} <= set(content):
            there = ", ".join(map(str, content))[:80]
            raise DDFastError(f"--reference {self.path}: --protocol dd1 takes m and s, not {there}")
        self.gaussians["fid"] = Gaussian(_tensor(content["m"]), _tensor(content["s"]))


def write_reference(path: Path, instrument: str, reference: Reference, images: Images, seed: int = 0) -> int:
    """Write a reference's file; returns how many images it holds.

    Args:
        path: of the file.
        instrument: adm, dd1 or clean.
        reference: the Gaussians.
        images: that they are of; adm's file holds up to 10,000, in their order, chosen by the seed.
        seed: of the choice.

    Raises:
        DDFastError: the file cannot be written.
    """
    if instrument == "dd1":
        fitted = reference.gaussians["fid"]
        write_atomically(path, lambda file: torch.save({"m": fitted.mean, "s": fitted.covariance}, file))
        return 0
    if instrument == "clean":
        fitted = reference.gaussians["fid"]
        mean, covariance, count = fitted.mean.numpy(), fitted.covariance.numpy(), np.array(fitted.count)
        write_atomically(path, lambda file: np.savez(file, mu=mean, sigma=covariance, clean=count))
        return 0
    kept = min(images.count, MOST_IMAGES)
    chosen = torch.arange(images.count, dtype=torch.int64)
    if kept < images.count:
        chosen = torch.randperm(images.count, generator=seeds.generator(seed), dtype=torch.int64)[:kept].sort().values

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for distance, names in _NAMES.items():
                fitted = reference.gaussians[distance]
                for name, values in zip(names, (fitted.mean, fitted.covariance), strict=True):
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                        np.lib.format.write_array(entry, values.numpy())
            with archive.open(f"{ARRAY}.npy", "w", force_zip64=True) as entry:
                shape = (kept, *images.size, 3)
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(entry, header)
                for pixels in images.read(range(number, number + 1) for number in chosen.tolist()):
                    entry.write(pixels.permute(0, 2, 3, 1).contiguous().numpy().tobytes())

    with processes.busy():
        write_atomically(path, write)
    return kept


def _names(path: Path) -> list[str] | None:
    """Of the arrays in an npz file; None: it is none."""
    if not is_archive(path):
        return None
    with reading(f"--reference {path}"), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return [name.removesuffix(".npy") for name in names] if all(name.endswith(".npy") for name in names) else None


def _array(path: Path, name: str) -> Tensor:
    """float64, of an npz file."""
    with member(path, name, "--reference") as (file, shape, dtype):
        if dtype.kind != "f":
            raise DDFastError(f"--reference {path}: {name} is {dtype}, expected floating-point numbers")
        try:
            values = np.frombuffer(file.read(), dtype=dtype).reshape(shape)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DDFastError(f"--reference {path}: {name} is damaged: {first_line(error)}") from error
    return torch.from_numpy(values.astype(np.float64))


def _tensor(value: object) -> Tensor:
    """float64, of what a .pth file holds."""
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else read_tensor(value)  # type: ignore[arg-type]
    return tensor.double()


def _check(gaussian: Gaussian, width: int, what: str) -> None:
    """Raise unless mean and covariance are those of `width` features."""
    shapes = list(gaussian.mean.shape), list(gaussian.covariance.shape)
    if shapes != ([width], [width, width]):
        raise DDFastError(
            f"{what}: mean {shapes[0]} and covariance {shapes[1]}, expected {width} features of Inception"
        )
    if not (gaussian.mean.isfinite().all() and gaussian.covariance.isfinite().all()):
        raise DDFastError(f"{what}: the statistics are not finite")
    apart = (gaussian.covariance - gaussian.covariance.T).abs().max()
    if apart > 1e-4 * gaussian.covariance.diagonal().abs().max():
        raise DDFastError(f"{what}: the covariance is not symmetric")

"""Images that anyone made, in the two forms that the field's evaluators read, batch by batch.

`arr_0` of an npz file, uint8 [count, H, W, 3], is read without ever being there as a whole, compressed or not; of a
folder, the PNG and JPG files in the order of their names. What can be refused is refused before the first image is
decoded.

Dimensions: B batch, H height, W width.
"""

from __future__ import annotations

import contextlib
import math
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddfast import processes
from ddfast.errors import DDFastError
from ddfast.files import parse_json, read_text, reading
from ddfast.pictures import SETTINGS
from ddfast.progress import Progress, silent

ARRAY, LABELS = "arr_0", "arr_1"
SUFFIXES = (".png", ".jpg", ".jpeg")

_OPAQUE = ("RGB", "L", "P", "1")
"""Pillow's modes of pictures that have one reading as RGB."""


_NAME = re.compile(r"(\d+)-(?:class|caption)(\d+)")
"""Of a picture of `ddfast sample`: its number, and its condition's."""


def _place(file: Path) -> tuple[float, str]:
    """Where a file stands among others: those of `ddfast sample` by their numbers, of five digits or more."""
    found = _NAME.fullmatch(file.stem)
    return (int(found[1]) if found else math.inf, file.name)


class Pictured(Protocol):
    """A batch of images: pixels uint8 [B, 3, H, W], their number int64 [B] in the whole set, and their condition's."""

    @property
    def pixels(self) -> Tensor:
        """On the CPU."""

    @property
    def number(self) -> Tensor:
        """On the CPU."""

    @property
    def condition(self) -> Tensor:
        """On the CPU."""


@dataclass(frozen=True)
class Batch:
    """Images as `Pictured`; those that `ddfast sample` made have its `condition`s int64 [B], others their numbers."""

    pixels: Tensor
    number: Tensor
    condition: Tensor


class Images(ABC):
    """A set of images on disk.

    Attributes:
        path: of the file or folder.
        count: how many there are.
        size: height and width of each; (0, 0): they have several.
    """

    path: Path
    count: int
    size: tuple[int, int]

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """With which `ddfast sample` made them; empty: nothing says it."""

    @abstractmethod
    def conditions(self) -> Tensor:
        """Condition int64 [count] of each, where `ddfast sample` made them."""

    @abstractmethod
    def read(self, numbers: Iterator[range]) -> Iterator[Tensor]:
        """Pixels uint8 [B, 3, H, W] of runs of numbers, in ascending order."""

    def batches(self, size: int = 64) -> Iterator[Batch]:
        """All images in batches, of several sizes one by one; of several processes, each gets its share of them."""
        size = size if any(self.size) else 1
        runs = [range(start, min(start + size, self.count)) for start in range(0, self.count, size)]
        own = processes.share(runs)
        numbers = torch.arange(self.count, dtype=torch.int64)
        conditions = self.conditions() if self.settings() else numbers
        for run, pixels in zip(own, self.read(iter(own)), strict=True):
            yield Batch(pixels, numbers[run.start : run.stop], conditions[run.start : run.stop])


def open_images(path: Path, option: str, progress: Progress = silent, *, any_size: bool = False) -> Images:
    """The images of an npz file or a folder, checked by all of their headers.

    Args:
        path: of the file or folder.
        option: the command's, for errors.
        progress: called as progress(done, total, text) while headers are read.
        any_size: the images of a folder may have several sizes.

    Raises:
        DDFastError: it is neither, or holds something else than images of one size in 8-bit RGB or grey.
    """
    if path.is_dir():
        return ImageFolder(path, option, progress, any_size=any_size)
    if not path.exists():
        raise DDFastError(f"{option} {path}: there is no such file or folder")
    if not is_archive(path):
        raise DDFastError(f"{option} {path}: expected an .npz file with {ARRAY}, or a folder with PNG or JPG files")
    return ImageArray(path, option)


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive in one piece."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # one of several disks
        return False


class ImageFolder(Images):
    """The PNG and JPG files of a folder in the order of their names (`_place`); those with transparency are refused."""

    def __init__(self, path: Path, option: str, progress: Progress = silent, *, any_size: bool = False) -> None:
        self.path = path
        self.files = sorted((file for file in path.iterdir() if file.suffix.lower() in SUFFIXES), key=_place)
        self.count = len(self.files)
        if not self.files:
            raise DDFastError(f"{option} {path}: no PNG or JPG files there")
        sizes: dict[tuple[int, int], Path] = {}
        for done, file in enumerate(self.files, 1):
            with _picture(file) as picture:
                if "A" in picture.getbands() or "transparency" in picture.info:
                    raise DDFastError(
                        f"{option} {file}: has transparency ({picture.mode}), and nothing says what lies behind it; "
                        "save the images as RGB"
                    )
                if picture.mode not in _OPAQUE:
                    raise DDFastError(f"{option} {file}: is {picture.mode}, expected 8-bit RGB or grey")
                sizes.setdefault((picture.height, picture.width), file)
            if len(sizes) > 1 and not any_size:
                (one, first), (other, second) = sizes.items()
                raise DDFastError(
                    f"{option} {path}: images of several sizes: {_by(one)} ({first.name}) and {_by(other)} "
                    f"({second.name}); expected one size"
                )
            progress(done, self.count, "headers")
        self.size = (0, 0) if len(sizes) > 1 else next(iter(sizes))

    def settings(self) -> dict[str, Any]:
        file = self.path / SETTINGS
        return _settings(read_text(file), file) if file.is_file() else {}

    def conditions(self) -> Tensor:
        """By the files' names."""
        found = [_NAME.fullmatch(file.stem) for file in self.files]
        strange = [file.name for file, match in zip(self.files, found, strict=True) if match is None]
        if strange:
            raise DDFastError(f"{self.path}: {strange[0]} is not of the run of which {SETTINGS} tells; take it away")
        return torch.tensor([int(match[2]) for match in found if match], dtype=torch.int64)

    def read(self, numbers: Iterator[range]) -> Iterator[Tensor]:
        for run in numbers:
            yield torch.stack([_pixels(self.files[number]) for number in run])


class ImageArray(Images):
    """`arr_0` of an npz file."""

    def __init__(self, path: Path, option: str) -> None:
        self.path = path
        with member(path, ARRAY, option) as (file, shape, dtype):
            self.start = file.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise DDFastError(f"{option} {path}: {ARRAY} is {dtype} {list(shape)}, expected uint8 [count, H, W, 3]")
        if not math.prod(shape):
            raise DDFastError(f"{option} {path}: {ARRAY} is {list(shape)}: there are no images")
        self.count, self.size = shape[0], (shape[1], shape[2])

    def settings(self) -> dict[str, Any]:
        with reading(self.path), zipfile.ZipFile(self.path) as archive:
            said = archive.comment.decode(errors="replace")
        return _settings(said, self.path) if said.startswith("{") else {}

    def conditions(self) -> Tensor:
        """By the array of labels."""
        with member(self.path, LABELS, "--images") as (file, shape, dtype):
            if shape != (self.count,) or dtype != np.int64:
                raise DDFastError(f"{self.path}: {LABELS} is {dtype} {list(shape)}, expected int64 [{self.count}]")
            return torch.frombuffer(bytearray(file.read()), dtype=torch.int64)

    def read(self, numbers: Iterator[range]) -> Iterator[Tensor]:
        height, width = self.size
        bytes_each = height * width * 3
        with reading(self.path), zipfile.ZipFile(self.path) as archive, archive.open(f"{ARRAY}.npy") as file:
            for run in numbers:
                begin = self.start + run.start * bytes_each
                if file.tell() == 0:
                    file.read(self.start)
                if file.tell() != begin:  # a seek ends the check of the file's sum, and inflates what lies between
                    file.seek(begin)
                data = bytearray(file.read(len(run) * bytes_each))
                if len(data) < len(run) * bytes_each:
                    raise DDFastError(f"{self.path} is damaged, most likely cut short: copy or make it again")
                rows = torch.frombuffer(data, dtype=torch.uint8).view(len(run), height, width, 3)
                yield rows.permute(0, 3, 1, 2)


@contextlib.contextmanager
def member(path: Path, name: str, option: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """An array of an npz file, open where its values begin, with shape and type.

    Raises:
        DDFastError: it is not there, or is no array in C's order.
    """
    with reading(path), zipfile.ZipFile(path) as archive:
        there = [entry.removesuffix(".npy") for entry in archive.namelist()]
        if name not in there:
            raise DDFastError(f"{option} {path}: no array {name} there, only {', '.join(there) or 'nothing'}")
        with archive.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, in_columns, dtype = read(file)
            size = file.tell() + math.prod(shape) * dtype.itemsize
            if (
                dtype.hasobject
                or in_columns
                or min(shape, default=0) < 0
                or archive.getinfo(f"{name}.npy").file_size != size
            ):
                raise DDFastError(f"{option} {path}: {name} is no plain array of numbers in C's order")
            yield file, shape, dtype


def _settings(text: str, path: Path) -> dict[str, Any]:
    """Of a JSON object, as `ddfast sample` writes it beside its images or into their file."""
    try:
        found = parse_json(text)
    except ValueError as error:
        raise DDFastError(f"{path} is damaged ({error}): what it says of its images cannot be read") from error
    if not isinstance(found, dict):
        raise DDFastError(f"{path}: what it says of its images is no JSON object")
    return found


@contextlib.contextmanager
def _picture(file: Path) -> Iterator[Image.Image]:
    with reading(file, "is damaged or no picture"), Image.open(file) as picture:
        yield picture


def _pixels(file: Path) -> Tensor:
    """uint8 [3, H, W]."""
    with _picture(file) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"

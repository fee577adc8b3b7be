"""Samples in files: a grid, a picture each, an npz as the field's evaluators read it, texts, or codes.

Every file is whole, and none of another run is touched. What a stream made before it was killed is kept, but for a
grid: pictures in their folder, batches of the others in a folder beside the file until it is there. With them is what
decides the samples, so that the same command makes what is missing, and another is refused.

Dimensions: B batch, N tokens, H height, W width.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ddfast import processes
from ddfast.errors import DDFastError
from ddfast.files import check_new, check_writable, parse_json, sync, write_atomically, writing
from ddfast.messages import say
from ddfast.models.checkpoint import load_tensors, read_checkpoint, save_tensors
from ddfast.models.protocol import Teacher
from ddfast.pictures import SETTINGS, decoded, grid, write_png
from ddfast.progress import Progress
from ddfast.runs import LOCK, occupied
from ddfast.sampling import Samples, one_line

SUFFIXES = {"grid": ".png", "files": "", "npz": ".npz", "text": ".txt", "codes": ".safetensors"}
"""The forms that samples are written in, and how the name of their file or folder ends."""

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_OTHERS = {".safetensors", ".txt", ".npz", ".npy", ".pt", ".pth", ".zip"}

_AT_A_TIME = 64
"""Images decoded at a time where nobody has asked for batches: a decoder needs far more memory than its images."""

_END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"


def new_target(form: str, target: Path, *, continued: bool = False) -> Path:
    """The file or folder that samples of a form go to: `target`, with the form's suffix if it has none.

    Args:
        form: one of `SUFFIXES`.
        target: as the user says it.
        continued: a folder with pictures of a run that says what it is, is no fault: `Kept.check` decides.

    Raises:
        DDFastError: `target` has the suffix of something else, holds another run's samples, or cannot be written.
    """
    suffix, found = SUFFIXES[form], target.suffix.lower()
    if found != suffix and found in _PICTURES | _OTHERS:
        wanted = f"a name that ends in {suffix}" if suffix else "the name of a folder"
        raise DDFastError(f"--to {target}: the form {form} takes {wanted}, or one without a suffix")
    path = target if found == suffix else target.with_name(target.name + suffix)
    if form == "files" and path.is_dir():
        check_writable(path / "any")
        there = sorted(_pictures(path))
        if there and not (continued and (path / SETTINGS).is_file()):
            held = f"holds {len(there)} images already, such as {there[0]}"
            raise DDFastError(f"--to {path}: {held}; choose another folder, or delete them")
    else:
        check_new(path, "--to")
    return path


def _pictures(folder: Path) -> set[str]:
    """Names of the pictures in a folder, whoever made them."""
    return {file.name for file in os.scandir(folder) if Path(file.name).suffix.lower() in _PICTURES}


def image_name(number: int, condition: int, kind: str) -> str:
    """The file of a sample; `kind` is class or caption."""
    return f"{number:05d}-{kind}{condition}.png"


class Kept:
    """What is on disk of a stream of samples before all of it is: in which folder, made with which settings.

    Args:
        form: files, npz, text or codes; a grid keeps nothing.
        path: where its samples go (`new_target`).
        settings: what decides them, as JSON takes it; None: nobody will go on.

    Attributes:
        wanted: files of all batches, once it is known which there are (`whole`).
    """

    def __init__(self, form: str, path: Path, settings: Mapping[str, Any] | None = None) -> None:
        self.form, self.path = form, path
        self.settings = None if settings is None else json.loads(json.dumps(settings))
        self.folder = path if form == "files" else path.with_name(f".{path.name}.parts")
        self.wanted: list[Path] | None = None

    def part(self, first: int) -> Path:
        """File of the batch that begins with a sample's number."""
        return self.folder / f"{first:09d}.safetensors"

    def parts(self) -> list[Path]:
        """The batches that are there, in order."""
        return sorted(self.folder.glob("[0-9]*.safetensors"))

    def begun(self) -> bool:
        """Whether there are samples."""
        if self.form == "files":
            return self.folder.is_dir() and bool(_pictures(self.folder))
        return bool(self.parts())

    def begun_with(self) -> dict[str, Any]:
        """The settings of the samples that are there; empty: there are none.

        Raises:
            DDFastError: nothing readable says with which they were made.
        """
        if not self.begun():
            return {}
        with contextlib.suppress(OSError, ValueError):
            found = parse_json((self.folder / SETTINGS).read_text())
            if isinstance(found, dict) and found:
                return found
        what = f"{self.folder / SETTINGS} does not say how it was begun"
        raise DDFastError(f"--to {self.path}: {what}; choose another name, or delete {self.folder}")

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise `DDFastError` unless what is there was made with these settings, or nothing is."""
        there = self.begun_with()
        different = [
            f"{name} is {there.get(name)!r}, not {value!r}"
            for name, value in json.loads(json.dumps(settings)).items()
            if there and there.get(name) != value
        ]
        if different:
            remedy = f"choose another name, or delete {self.folder}"
            raise DDFastError(f"--to {self.path}: was begun with other settings ({'; '.join(different)}); {remedy}")

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Within, this run alone works here; what it leaves says with which settings it was made.

        Raises:
            DDFastError: another run does, or there are samples made with other settings.
        """
        if self.form == "grid":
            yield
            return

        processes.first_does(self._check_free)
        with occupied(self.folder):
            try:
                processes.first_does(self._begin)
                yield
            finally:
                if processes.rank() == 0:
                    self._tidy()

    def _check_free(self) -> None:
        """Raise where something is in the way, before anything is touched."""
        if self.settings is not None:
            self.check(self.settings)
        elif self.form != "files":
            check_new(self.folder, "--to")

    def _begin(self) -> None:
        if self.form != "files":
            check_new(self.path, "--to")  # once more: another run may have finished while this one waited or loaded
        if self.settings is None:
            return
        self.check(self.settings)  # once more: nobody else can have begun since
        for unfinished in self.folder.glob(".*.tmp"):
            unfinished.unlink(missing_ok=True)
        write_atomically(self.folder / SETTINGS, json.dumps(self.settings, indent=2) + "\n")

    def _tidy(self) -> None:
        """Leave nothing that nobody will use."""
        goes = self.form != "files" and (self.settings is None or self.path.exists())
        empty = processes.count() == 1 and not self.begun()  # of several, another may be about to write
        with contextlib.suppress(OSError):
            for file in self.folder.iterdir() if goes else [self.folder / SETTINGS] if empty else ():
                if file.name != LOCK:  # the last: without it, another run would begin among what goes
                    file.unlink(missing_ok=True)
            (self.folder / LOCK).unlink(missing_ok=True)
            if goes or empty:
                self.folder.rmdir()

    def whole(self, batches: Sequence[range], names: Callable[[range], Iterable[str]]) -> set[int]:
        """Which of the batches are there, all of each; what is damaged is said, and to be made again.

        Args:
            batches: of the stream.
            names: of the files of a batch's images.

        Raises:
            DDFastError: there are images that are none of the stream's.
        """
        if self.form == "grid":
            return set()
        self.wanted = [self.part(batch.start) for batch in batches]
        named = [[part.name] for part in self.wanted]
        if self.form == "files":
            named = [list(names(batch)) for batch in batches]
            strange = sorted(_pictures(self.folder).difference(*named))
            if strange:
                what = f"holds {len(strange)} images that are not of this run, such as {strange[0]}"
                raise DDFastError(f"--to {self.path}: {what}; choose another folder, or delete them")
        complete, damaged = set(), []
        for number in processes.share(range(len(batches))):
            processes.sign()
            faults = [name for name in named[number] if not self._is_whole(self.folder / name)]
            damaged += [name for name in faults if (self.folder / name).exists()]
            complete |= set() if faults else {number}
        for name in sorted(name for one in processes.gather(damaged) for name in one):
            say(f"{self.folder / name} is damaged, and made again")
        return set().union(*processes.gather(complete))

    def _is_whole(self, path: Path) -> bool:
        return is_whole_png(path) if self.form == "files" else _read_part(path) is not None


def is_whole_png(path: Path) -> bool:
    """Whether a file ends as a PNG does: what the machine's stop left is shorter, or zeros."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_END_OF_PNG), os.SEEK_END)
            return file.read() == _END_OF_PNG
    except OSError:
        return False


def _read_part(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a batch that was kept; None: it is missing or damaged, or another one has its name."""
    with contextlib.suppress(DDFastError):
        tensors, about = load_tensors(path)
        return tensors if about.get("first", int(path.stem)) == int(path.stem) else None
    return None


class _Form(ABC):
    """What takes batches, one after the other, and makes files of them."""

    unit: ClassVar[str] = "images"

    def __init__(self, kept: Kept, decode: Callable[[Samples], Tensor], teacher: Teacher) -> None:
        self.kept, self.path, self.decode, self.teacher = kept, kept.path, decode, teacher

    @abstractmethod
    def take(self, batch: Samples) -> None:
        """Write, or keep, a batch."""

    @abstractmethod
    def finish(self) -> None:
        """When all processes have taken theirs."""

    def there(self) -> str:
        """What is there when the stream ends early."""
        return f"{self.path} was not written"

    def told(self, count: int) -> str:
        """What is there in the end."""
        return f"{count} {self.unit}: {self.path}"


class _Grid(_Form):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.images: list[Tensor] = []

    def take(self, batch: Samples) -> None:
        self.images.append(self.decode(batch))

    def finish(self) -> None:
        whole = processes.collected(self.images)

        def write() -> None:
            images = torch.cat(whole)
            write_png(self.path, grid(images, max(1, round(len(images) ** 0.5))))

        processes.first_does(write)


class _Files(_Form):
    def take(self, batch: Samples) -> None:
        kind = kind_of(self.teacher)
        named = zip(batch.number.tolist(), batch.condition.tolist(), strict=True)
        for image, (number, condition) in zip(self.decode(batch), named, strict=True):
            file = self.path / image_name(number, condition, kind)
            if not is_whole_png(file):
                write_png(file, rearrange(image, "c h w -> h w c"), durable=False)

    def finish(self) -> None:
        processes.wait()

    def there(self) -> str:
        images = sum(1 for _ in self.path.glob("*.png"))
        if not images:
            return super().there()
        continued = ": the same command goes on" if self.kept.settings is not None else ""
        return f"{images} images are in {self.path}, each of them whole{continued}"

    def told(self, count: int) -> str:
        return f"{count} images in {self.path}"


class _Parts(_Form):
    """A file for every batch, until the last one: then one of all."""

    @abstractmethod
    def tensors(self, batch: Samples) -> dict[str, Tensor]:
        """What is kept of a batch."""

    @abstractmethod
    def assemble(self, path: Path, parts: Sequence[Path]) -> None:
        """Write the one file; a part is in memory at a time."""

    def take(self, batch: Samples) -> None:
        tensors = self.tensors(batch) | {"condition": batch.condition.cpu()}
        first = int(batch.number[0])
        save_tensors(self.kept.part(first), tensors, {"first": first})

    def finish(self) -> None:
        processes.wait()

        def write() -> None:
            inside = self.kept.folder / f"whole{self.path.suffix}"  # killed meanwhile, nothing is left beside the file
            parts = self.kept.parts()
            if self.kept.wanted is not None and parts != self.kept.wanted:
                there, all_of_it = len(parts), len(self.kept.wanted)
                raise DDFastError(
                    f"{self.kept.folder} has {there} batches, expected {all_of_it}: all processes must see one folder; "
                    "start the same command where they do"
                )
            with processes.busy(), writing(self.path):
                self.assemble(inside, parts)
                os.replace(inside, self.path)
                sync(self.path.parent)

        processes.first_does(write)

    def there(self) -> str:
        kept = len(self.kept.parts()) if self.kept.settings is not None else 0
        return super().there() + (f", {kept} batches of it are kept: the same command goes on" if kept else "")

    def read(self, part: Path) -> dict[str, Tensor]:
        """A batch; raises where it has been damaged since it was written."""
        tensors = _read_part(part)
        if tensors is None:
            raise DDFastError(f"{part} has been damaged; the same command makes it again")
        return tensors


class _Codes(_Parts):
    unit = "code sequences"

    def tensors(self, batch: Samples) -> dict[str, Tensor]:
        return {"codes": batch.codes.cpu()}

    def assemble(self, path: Path, parts: Sequence[Path]) -> None:
        batches = [self.read(part) for part in parts]
        whole = {name: torch.cat([batch[name] for batch in batches]) for name in ("codes", "condition")}
        save_tensors(path, whole, {"samples": self.kept.settings} if self.kept.settings else {})


class _Text(_Codes):
    """A line for each: `one_line`."""

    unit = "texts"

    def assemble(self, path: Path, parts: Sequence[Path]) -> None:
        texts = (text for part in parts for text in self.teacher.texts(self.read(part)["codes"]))
        write_atomically(path, "".join(f"{one_line(text)}\n" for text in texts))


class _Npz(_Parts):
    """`arr_0`: images uint8 [B, H, W, 3], all that evaluators read; `arr_1`: classes int64 [B], as OpenAI has them."""

    def tensors(self, batch: Samples) -> dict[str, Tensor]:
        return {"pixels": rearrange(self.decode(batch), "b c h w -> b h w c").contiguous()}

    def assemble(self, path: Path, parts: Sequence[Path]) -> None:
        # Before the pixels: what is kept between them would break the memory that they leave behind into pieces.
        conditions = torch.cat([read_checkpoint(part)[0]["condition"].read() for part in parts]).numpy()
        image = read_checkpoint(parts[0])[0]["pixels"].shape[1:]
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(conditions), *image)}

        def write(file: BinaryIO) -> None:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    for part in parts:
                        member.write(self.read(part)["pixels"].numpy().data)
                with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, conditions, version=(1, 0), allow_pickle=False)
                comment = json.dumps(self.kept.settings or {}).encode()
                archive.comment = comment if len(comment) <= zipfile.ZIP_MAX_COMMENT else b""

        write_atomically(path, write)


_FORMS: dict[str, type[_Form]] = {"grid": _Grid, "files": _Files, "npz": _Npz, "text": _Text, "codes": _Codes}


def save_samples(
    samples: Samples | Iterable[Samples],
    teacher: Teacher,
    form: str,
    target: Path,
    *,
    quantise: str = "nearest",
    size: int = 0,
    count: int | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write samples as a picture ("grid"), pictures ("files"), "npz", "text" or "codes"; returns what was written.

    Of batches, each is written (or what a grid takes of it kept) and forgotten before the next one is made. Of several
    processes each writes what it makes; the one file is put together by the first, in the order of the batches.

    Args:
        samples: all, or batches of them: this process's share, as streams make it.
        teacher: decodes them.
        form: of the five.
        target: where to; see `new_target`.
        quantise, size: of pictures, as in `ddfast.pictures.stream_pictures`.
        count: how many there will be, for the progress.
        progress: called as progress(done, count, text) after every batch.

    Raises:
        DDFastError: as `new_target`; or what ended the writing early, with what is there by then.
    """
    kept = Kept(form, processes.first_does(lambda: new_target(form, target)))  # before anybody writes there
    parts = processes.share(samples.split(_AT_A_TIME)) if isinstance(samples, Samples) else samples
    with kept.claimed():
        return save_stream(parts, teacher, kept, quantise=quantise, size=size, count=count, progress=progress)


def save_stream(
    batches: Iterable[Samples],
    teacher: Teacher,
    kept: Kept,
    *,
    quantise: str = "nearest",
    size: int = 0,
    count: int | None = None,
    progress: Progress | None = None,
    there: int = 0,
) -> list[str]:
    """`save_samples` of this process's batches into a place that is claimed, where `there` samples are already."""
    decode = functools.partial(decoded, teacher=teacher, quantise=quantise, size=size)
    form = _FORMS[kept.form](kept, decode, teacher)
    made = 0
    with _ended(form.there):
        for batch in batches:
            form.take(batch)
            made += len(batch.codes)
            if progress is not None:  # the others are about as far
                done = int(batch.number[-1]) + 1
                progress(done, done if count is None else count, "")
        form.finish()
        made = sum(processes.gather(made))
    return [form.told(there + made) + (f", {there} of them from before" if there else "")]


def kind_of(teacher: Teacher) -> str:
    """What a teacher's conditions are called in the names of files."""
    return "class" if teacher.num_classes else "caption"


@contextlib.contextmanager
def _ended(there: Callable[[], str]) -> Iterator[None]:
    """What ends the body early says what is there by then."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(there()) from None
    except (DDFastError, ValueError, TypeError, OSError) as error:
        raise DDFastError(f"{error}; {there()}") from error

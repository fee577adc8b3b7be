"""Samples as files: a grid, a picture each, or codes; every file is whole, and none of another run is touched.

Pictures are 8-bit RGB, rounded to the nearest value, grey ones with three equal channels: what the field's evaluation
tools read.

Dimensions: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from ddfast import processes
from ddfast.errors import DDFastError
from ddfast.files import check_new, check_writable, write_atomically
from ddfast.models.checkpoint import save_tensors
from ddfast.models.protocol import Teacher
from ddfast.progress import Progress
from ddfast.sampling import Samples
from ddfast.trajectories.memory import fitting

SUFFIXES = {"grid": ".png", "files": "", "codes": ".safetensors"}
"""The forms that samples are written in, and how the name of their file or folder ends."""

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_OTHERS = {".safetensors", ".npz", ".npy", ".pt", ".pth", ".zip"}

_AT_A_TIME = 64
"""Images decoded at a time where nobody has asked for batches: a decoder needs far more memory than its images."""


@dataclass(kw_only=True)
class Pictures:
    """Samples as 8-bit pictures: pixels uint8 [B, 3, H, W], their condition's index and their number int64 [B].

    All of it is on the CPU.
    """

    pixels: Tensor
    condition: Tensor
    number: Tensor


def _nearest(images: Tensor) -> Tensor:
    return (_unit(images) * 255).round()


def _half_up(images: Tensor) -> Tensor:
    return (_unit(images) * 255 + 0.5).clamp(0, 255)


def _llamagen(images: Tensor) -> Tensor:
    return (127.5 * images + 128.0).clamp(0, 255)


def _unit(images: Tensor) -> Tensor:
    """Images in [0, 1], as teachers decode them with `clamp=True`."""
    return (images.clamp(-1, 1) + 1) / 2


QUANTISERS: dict[str, Callable[[Tensor], Tensor]] = {
    "nearest": _nearest,
    "var": _half_up,
    "llamagen": _llamagen,
    "dd1": _half_up,
}
"""How raw images, about [-1, 1], become 8-bit values, which are then cut off to integers, by name of protocol."""


def pixels(images: Tensor, quantise: str = "nearest") -> Tensor:
    """Raw images [B, 1 or 3, H, W], about [-1, 1], as uint8 [B, 3, H, W] on the CPU.

    With u = (x + 1) / 2, all of `QUANTISERS` are 255 u to the nearest integer, clamped to 0..255. They differ where
    255 u + 0.5 is an integer or within a rounding error of one: "nearest" takes ties to the even value; "var" and "dd1"
    (torchvision's save_image) take them up, as floor(255 u + 0.5); "llamagen" does so in x, as floor(127.5 x + 128).
    """
    values = QUANTISERS[quantise](images.float()).to(torch.uint8)
    return values.expand(-1, 3, -1, -1).cpu()


def resized(images: Tensor, size: int) -> Tensor:
    """Raw images [B, C, H, W] with sides of `size` pixels, bicubic, as LlamaGen's script does it; 0: as they are."""
    if size == 0 or images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images.float(), size=(size, size), mode="bicubic")


def decoded(samples: Samples, teacher: Teacher, *, quantise: str = "nearest", size: int = 0) -> Tensor:
    """The pixels uint8 [B, 3, H, W] of samples; arguments as of `stream_pictures`.

    What lies beyond [-1, 1] is clamped after the resize, as officially.
    """
    count = len(samples.embeddings)
    with torch.no_grad(), fitting(count, teacher.codebook.device, "the batch size"):
        return pixels(resized(teacher.decode(samples.embeddings, clamp=False), size), quantise)


def stream_pictures(
    batches: Iterable[Samples], teacher: Teacher, *, quantise: str = "nearest", size: int = 0
) -> Iterator[Pictures]:
    """Pictures of samples, batch by batch: each is decoded, and forgotten before the next one is made.

    Args:
        batches: of samples, as streams make them.
        teacher: decodes them.
        quantise: how values become integers: nearest, var, llamagen or dd1 (`pixels`).
        size: side in pixels that images are resized to before that; 0: none.

    Raises:
        ValueError: `quantise` is no such name, or the size is negative.
        DDFastError: a batch does not fit in memory.
    """
    if quantise not in QUANTISERS:
        raise ValueError(f"quantise: got {quantise!r}, expected one of {', '.join(QUANTISERS)}")
    if size < 0:
        raise ValueError(f"size: got {size}, expected a side in pixels, or 0 for the teacher's own")
    return (
        Pictures(
            pixels=decoded(batch, teacher, quantise=quantise, size=size),
            condition=batch.condition.cpu(),
            number=batch.number,
        )
        for batch in batches
    )


def grid(images: Tensor, rows: int) -> Tensor:
    """Pixels [B, 3, H, W] filled column by column into `rows` rows, white lines between: [H', W', 3]."""
    missing = -len(images) % rows
    images = torch.cat((images, images.new_full((missing, *images.shape[1:]), 255)))
    images = F.pad(images, (0, 1, 0, 1), value=255)
    return rearrange(images, "(column row) c h w -> (row h) (column w) c", row=rows)[:-1, :-1]


def write_png(path: Path, image: Tensor, *, durable: bool = True) -> None:
    """Write pixels [H, W, 3]."""
    picture = Image.fromarray(image.contiguous().numpy())
    write_atomically(path, lambda file: picture.save(file, "PNG"), durable=durable)


def new_target(form: str, target: Path) -> Path:
    """The file or folder that samples of a form go to: `target`, with the form's suffix if it has none.

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
        there = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _PICTURES)
        if there:
            held = f"holds {len(there)} images already, such as {there[0]}"
            raise DDFastError(f"--to {path}: {held}; choose another folder, or delete them")
    else:
        check_new(path, "--to")
    return path


def save_samples(
    samples: Samples | Iterable[Samples],
    teacher: Teacher,
    form: str,
    target: Path,
    *,
    count: int | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write samples as one picture ("grid"), a picture each ("files") or "codes"; returns what was written, in lines.

    Of batches, each is written (or what the one file takes of it kept) and forgotten before the next one is made. Of
    several processes each writes the images that it makes; the one file is written by the first, of what all have made.

    Args:
        samples: all, or batches of them: this process's share, as streams make it.
        teacher: decodes them.
        form: of the three.
        target: where to; see `new_target`.
        count: how many there will be, for the progress.
        progress: called as progress(done, count, text) after every batch.

    Raises:
        DDFastError: as `new_target`; or what ended the writing early, with what is there by then.
    """
    path = processes.first_does(lambda: new_target(form, target))  # before anybody writes there
    parts = processes.share(samples.split(_AT_A_TIME)) if isinstance(samples, Samples) else samples
    kept: list[tuple[Tensor, ...]] = []
    made, name = 0, "class" if teacher.num_classes else "caption"

    def there() -> str:
        images = sum(1 for _ in path.glob("*.png")) if form == "files" else 0
        return f"{images} images are in {path}, each of them whole" if images else f"{path} was not written"

    with _ended(there):
        for batch in parts:
            if form == "codes":
                kept.append((batch.codes.cpu(), batch.condition.cpu()))
            elif form == "grid":
                kept.append((decoded(batch, teacher),))
            else:
                labels = zip(batch.number.tolist(), batch.condition.tolist(), strict=True)
                for image, (number, label) in zip(decoded(batch, teacher), labels, strict=True):
                    file = path / f"{number:05d}-{name}{label}.png"
                    write_png(file, rearrange(image, "c h w -> h w c"), durable=False)
            made += len(batch.codes)
            if progress is not None:  # the others are about as far
                done = int(batch.number[-1]) + 1
                progress(done, done if count is None else count, "")
        whole = processes.collected(kept)
        made = sum(processes.gather(made))
        if form == "codes":
            processes.first_does(lambda: _write_codes(path, whole))
            return [f"{made} code sequences: {path}"]
        if form == "grid":
            processes.first_does(lambda: _write_grid(path, whole))
            return [f"{made} images: {path}"]
        return [f"{made} images in {path}"]


def _write_codes(path: Path, batches: Sequence[tuple[Tensor, ...]]) -> None:
    codes, condition = map(torch.cat, zip(*batches, strict=True))
    save_tensors(path, {"codes": codes, "condition": condition}, {})


def _write_grid(path: Path, batches: Sequence[tuple[Tensor, ...]]) -> None:
    images = torch.cat([images for (images,) in batches])
    write_png(path, grid(images, max(1, round(len(images) ** 0.5))))


@contextlib.contextmanager
def _ended(there: Callable[[], str]) -> Iterator[None]:
    """What ends the body early says what is there by then."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(there()) from None
    except (DDFastError, ValueError, TypeError, OSError) as error:
        raise DDFastError(f"{error}; {there()}") from error

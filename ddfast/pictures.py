"""Samples as pictures: 8-bit RGB, grey ones with three equal channels, which is what the field's evaluation tools read.

Dimensions: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from ddfast.files import write_atomically
from ddfast.models.protocol import Teacher
from ddfast.sampling import Samples
from ddfast.trajectories.memory import BATCH_OPTION, fitting

SETTINGS = "samples.json"
"""What decides the samples of a folder: a file beside them. An npz file has it as the zip's comment."""


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
    with torch.no_grad(), fitting(count, teacher.codebook.device, BATCH_OPTION):
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

"""What users hand to a model: labels, codes, images, noise.

What has one meaning only is converted (integer types, uint8 and PIL images, precisions); the rest is refused by its
argument's name. Values are looked at once, and not where that would wait for a GPU in a hot path, nor where a compiler
or a CUDA graph is recording and there are none yet.

Dimensions: B batch, N tokens, D code dimension, C channels, H height, W width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddfast import private_api
from ddfast.ops.common import check_finite
from ddfast.ops.draw_codes import check_uniform

_INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip

_TOLERANCE = 1e-3
"""By how much an image may leave its range: a resized one does so by rounding."""

_NAMES_HERE = {
    "cfg": "cfg_scale",
    "g_seed": "generator=torch.Generator().manual_seed(...)",
    "seed": "generator=torch.Generator().manual_seed(...)",
    "label_B": "condition",
    "labels": "condition",
    "class_labels": "condition",
    "cond": "condition",
    "cond_idx": "condition",
    "B": "condition, whose length is the batch",
    "emb_masks": "condition=(features, mask)",
    "max_new_tokens": "stop",
    "sample_logits": "sampler='multinomial' or 'greedy'",
    "t_list": "steps",
    "loss_split_t": "split",
    "split_t": "split",
    "teacher_start_t": "teacher_range=(first, last)",
    "t_teacher_start": "teacher_range=(first, last)",
}
"""What the official code calls an argument, and what it is here."""

_NOT_HERE = {"more_smooth": "draws by Gumbel softmax for pictures only"}


def known(tensor: Tensor, *, waits: bool = True) -> bool:
    """Whether the values of a tensor can be looked at; `waits`: also where that waits for a GPU."""
    if torch.compiler.is_compiling() or tensor.is_meta or private_api.is_fake(tensor) or not tensor.numel():
        return False
    if tensor.is_cuda:
        return waits and not torch.cuda.is_current_stream_capturing()
    return True


def check_options(taker: Callable[..., Any], given: Iterable[str], others: Iterable[str] = ()) -> None:
    """Raise `TypeError` for a keyword that is none of `taker`'s or `others`, with its name here if it is official."""
    parameters = inspect.signature(taker).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    allowed = ({parameter.name for parameter in parameters} | set(others)) - {"self", "condition", "guided", "options"}
    for name in given:
        if name in allowed:
            continue
        if name in _NAMES_HERE:
            raise TypeError(f"{name}: here it is called {_NAMES_HERE[name]}")
        if name in _NOT_HERE:
            raise TypeError(f"{name}: not here; officially it {_NOT_HERE[name]}")
        raise TypeError(f"{name}: no argument of this model; known: {', '.join(sorted(allowed))}")


def check_labels(condition: object, num_classes: int, *, null: bool = False) -> None:
    """Raise unless `condition` is int64 labels [B] in 0..num_classes - 1 (with `null`: or num_classes)."""
    if not isinstance(condition, Tensor):
        raise TypeError(f"condition: got {type(condition).__name__}, expected int64 labels [B]")
    if condition.dtype != torch.int64 or condition.ndim != 1:
        raise TypeError(f"condition: got {condition.dtype} {list(condition.shape)}, expected int64 labels [B]")
    if not known(condition):
        return
    low, high = (int(bound) for bound in torch.aminmax(condition))
    if low < 0 or high >= num_classes + null:
        labels = f"{low}..{high}" if low != high else str(low)
        meaning = f" ({num_classes} means 'no condition')" if null else ""
        raise ValueError(f"condition: got labels {labels}, expected 0..{num_classes - 1 + null}{meaning}")


def check_codes(codes: Tensor, num_codes: int, name: str = "codes", *, waits: bool = True) -> Tensor:
    """Codes [...] of any integer type as int64, each in 0..num_codes - 1; `waits` as in `known`."""
    if codes.dtype not in _INTEGERS:
        raise TypeError(f"{name}: got {codes.dtype}, expected integer codes")
    codes = codes.long()
    if known(codes, waits=waits):
        low, high = (int(bound) for bound in torch.aminmax(codes))
        if low < 0 or high >= num_codes:
            raise ValueError(f"{name}: got codes {low}..{high}, expected 0..{num_codes - 1}")
    return codes


def as_codes(
    codes: Any, num_codes: int, shape: tuple[int | None, int], name: str = "codes", *, waits: bool = True
) -> Tensor:
    """Codes of any integer type [B, N] as int64.

    Args:
        codes: a tensor or a NumPy array.
        num_codes: V.
        shape: B (None: any) and N.
        name: of the argument.
        waits: as in `known`.

    Raises:
        TypeError: they are no integers.
        ValueError: their shape is another, or one is not in 0..V - 1.
    """
    if isinstance(codes, np.ndarray):
        codes = torch.from_numpy(codes)
    if not isinstance(codes, Tensor) or codes.dtype not in _INTEGERS:
        got = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise TypeError(f"{name}: got {got}, expected integer codes [B, N]")
    batch, count = shape
    if codes.ndim != 2 or codes.shape[1] != count or batch not in (None, codes.shape[0]):
        expected = f"[{'B' if batch is None else batch}, {count}]"
        raise ValueError(f"{name}: got shape {list(codes.shape)}, expected {expected}")
    return check_codes(codes, num_codes, name, waits=waits)


def as_embeddings(
    tokens: Any, codebook: Tensor, shape: tuple[int | None, int], name: str = "codes", *, waits: bool = True
) -> Tensor:
    """Embeddings float32 [B, N, D] of codes [B, N], or of embeddings of any precision.

    Args:
        tokens: integer codes as `as_codes` takes them, or floating-point embeddings.
        codebook: float32 [V, D].
        shape, name, waits: as in `as_codes`.

    Raises:
        TypeError, ValueError: as `as_codes`.
    """
    batch, count = shape
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        codes = as_codes(tokens, len(codebook), shape, name, waits=waits)
        return codebook[codes.to(codebook.device)]
    if tokens.ndim == 2:
        raise TypeError(f"{name}: got {tokens.dtype} {list(tokens.shape)}, expected integer codes [B, N]")
    if tokens.ndim != 3 or tokens.shape[1:] != (count, codebook.shape[1]) or batch not in (None, tokens.shape[0]):
        expected = f"[{'B' if batch is None else batch}, {count}, {codebook.shape[1]}]"
        raise ValueError(f"{name}: got shape {list(tokens.shape)}, expected embeddings {expected}")
    return tokens.to(codebook.device, torch.float32)


def check_noise(noise: object, shape: tuple[int, int, int], name: str = "noise") -> Tensor:
    """Noise, or a point of a trajectory, [B, N, D] of any precision.

    Raises:
        TypeError: it is no floating-point tensor.
        ValueError: it has another shape, or a value that is not finite.
    """
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"{name}: got {got}, expected a floating-point tensor {list(shape)}")
    if tuple(noise.shape) != shape:
        raise ValueError(f"{name}: got shape {list(noise.shape)}, expected {list(shape)}")
    if known(noise, waits=False):
        check_finite(name, noise)
    return noise


def as_uniform(uniform: object, shape: tuple[int, int]) -> Tensor:
    """Uniform numbers [B, N] of any precision as float32, each in [0, 1).

    Raises:
        TypeError: they are no floating-point tensor.
        ValueError: they have another shape, or one is not in [0, 1).
    """
    if not isinstance(uniform, Tensor) or not uniform.is_floating_point():
        got = uniform.dtype if isinstance(uniform, Tensor) else type(uniform).__name__
        raise TypeError(f"uniform: got {got}, expected a floating-point tensor {list(shape)}")
    if tuple(uniform.shape) != shape:
        raise ValueError(f"uniform: got shape {list(uniform.shape)}, expected {list(shape)}")
    uniform = uniform.float()
    if known(uniform, waits=False):
        check_uniform(uniform)
    return uniform


def as_images(images: Any, channels: int, *, low: float, device: torch.device | str = "cpu") -> Tensor:
    """Images float32 [B, C, H, W] in [low, 1].

    Args:
        images: floating-point tensor [B, C, H, W] in [low, 1]; uint8 in 0..255; NumPy's of either, there also with the
            channels last; a PIL image, or a list of those of one size.
        channels: C.
        low: 0 or -1.
        device: where they are wanted.

    Raises:
        TypeError: they are something else.
        ValueError: their shape is another, or a value is NaN or out of range.
    """
    if _is_pil(images):
        images = [images]
    if isinstance(images, (list, tuple)) and images and all(_is_pil(image) for image in images):
        images = _from_pil(images, channels)
    if isinstance(images, np.ndarray):
        images = _from_numpy(images, channels)
    if not isinstance(images, Tensor):
        expected = "a tensor [B, C, H, W], a NumPy array, or PIL images"
        raise TypeError(f"images: got {type(images).__name__}, expected {expected}")
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"images: got shape {list(images.shape)}, expected [B, {channels}, H, W]")
    images = images.to(device)
    if images.dtype == torch.uint8:
        images = images.float() / 255
        return images if low == 0 else 2 * images - 1
    if not images.is_floating_point():
        raise TypeError(f"images: got {images.dtype}, expected floating-point values in [{low:g}, 1], or uint8")
    images = images.float()
    if known(images):
        least, most = (float(bound) for bound in torch.aminmax(images.detach()))
        if not (least >= low - _TOLERANCE and most <= 1 + _TOLERANCE):  # NaN is neither
            hint = "; 0..255 is for uint8" if most > 2 else ""
            raise ValueError(f"images: got values from {least:g} to {most:g}, expected {low:g} to 1{hint}")
    return images


def check_size(images: Tensor, height: int, width: int) -> None:
    """Raise `ValueError` unless images [B, C, H, W] have this many pixels."""
    if tuple(images.shape[-2:]) != (height, width):
        got = " x ".join(map(str, images.shape[-2:]))
        raise ValueError(f"images: got {got} pixels, expected {height} x {width}")


def _is_pil(value: object) -> bool:
    """Whether it is a PIL image, without loading PIL to find out."""
    return type(value).__module__.partition(".")[0] == "PIL" and hasattr(value, "convert")


def _from_pil(images: Iterable[Any], channels: int) -> np.ndarray:
    arrays = []
    for image in images:
        if image.mode.startswith(("I", "F")):
            raise TypeError(f"images: got a PIL image of mode {image.mode}, expected 8 bits a channel")
        array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        arrays.append(array.reshape(*array.shape[:2], channels).transpose(2, 0, 1))
    sizes = sorted({array.shape[1:] for array in arrays})
    if len(sizes) > 1:
        raise ValueError(f"images: got PIL images of several sizes {sizes}, expected one")
    return np.stack(arrays)


def _from_numpy(images: np.ndarray, channels: int) -> Tensor:
    if images.dtype not in (np.uint8, np.float16, np.float32, np.float64):
        raise TypeError(f"images: got {images.dtype}, expected floating-point values or uint8")
    last = images.ndim in (3, 4) and images.shape[-1] == channels
    if last and (images.ndim == 3 or images.shape[1] != channels):
        images = np.moveaxis(images.reshape(-1, *images.shape[-3:]), -1, 1)
    return torch.from_numpy(np.ascontiguousarray(images))

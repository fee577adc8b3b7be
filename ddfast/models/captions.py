"""Caption features for text-conditional teachers: T5's, computed here or read from a file.

A text condition is (features float32 [B, C, dim], mask int64 [B, C]): C tokens per caption, padded on the *left*,
features zero at padding. Dimensions: B captions, C tokens, M captions of a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddfast.errors import DDFastError
from ddfast.models.checkpoint import load_tensors, save_tensors


def left_padded(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move every caption's valid tokens to the end, in their order, and zero what is before them.

    features [B, C, dim], mask [B, C] (nonzero: valid) -> the same shapes, the mask int64.
    """
    valid = mask.bool()
    order = valid.int().argsort(dim=1, stable=True)  # padding first, both in their order
    moved = features.gather(1, order[..., None].expand_as(features))
    kept = valid.gather(1, order)
    return moved * kept[..., None], kept.long()


@torch.no_grad()
def encode_captions(
    captions: Sequence[str],
    *,
    model: str = "google/flan-t5-xl",
    length: int = 120,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """Features and masks of captions, by a T5 encoder of the transformers library (`pip install 'ddfast[text]'`).

    Args:
        captions: texts.
        model: name or folder of the encoder; LlamaGen's was trained with flan-t5-xl.
        length: C, tokens per caption; longer captions are cut.
        device, dtype: of the encoder.
        batch_size: captions at a time.

    Returns:
        features float32 [B, C, dim] and mask int64 [B, C], padded on the left, on the CPU.

    Raises:
        DDFastError: transformers is not installed, or the encoder cannot be had.
    """
    try:
        from transformers import AutoTokenizer, T5EncoderModel
    except ImportError as error:
        raise DDFastError(
            "captions: the T5 encoder needs transformers; pip install 'ddfast[text]', or give precomputed features"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        encoder = T5EncoderModel.from_pretrained(model, torch_dtype=dtype).to(device).eval()
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or ["no reason given"])[0]
        raise DDFastError(f"captions: cannot load the encoder {model}: {first}") from error
    features, masks = [], []
    for start in range(0, len(captions), batch_size):
        texts = list(captions[start : start + batch_size])
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        hidden = encoder(
            input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
        ).last_hidden_state
        moved, kept = left_padded(hidden.float().cpu(), tokens["attention_mask"])
        features.append(moved)
        masks.append(kept)
    if not features:
        raise DDFastError("captions: got none, expected at least one text")
    return torch.cat(features), torch.cat(masks)


def save_captions(path: Path, features: Tensor, mask: Tensor, captions: Sequence[str] | None = None) -> None:
    """Write features [M, C, dim] and mask [M, C], and optionally the texts, to one safetensors file."""
    save_tensors(path, {"features": features, "mask": mask}, {"captions": list(captions or [])})


def load_captions(path: Path) -> tuple[Tensor, Tensor]:
    """Features [M, C, dim] and mask [M, C] of a file that `save_captions` wrote.

    Raises:
        DDFastError: the file is missing or damaged, or its tensors are not these.
    """
    tensors, _ = load_tensors(path)
    features, mask = tensors.get("features"), tensors.get("mask")
    if features is None or mask is None:
        raise DDFastError(f"{path}: got {', '.join(sorted(tensors)) or 'no tensors'}, expected features and mask")
    fits = features.ndim == 3 and features.is_floating_point() and mask.shape == features.shape[:2] and len(features)
    if not fits:
        got = f"features {list(features.shape)} {features.dtype} and mask {list(mask.shape)}"
        raise DDFastError(f"{path}: got {got}, expected floating-point features [M, C, dim] and mask [M, C]")
    return features.float(), mask.long()


def random_captions(count: int, length: int, dim: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Stand-ins for features, to test and to profile with random weights: `count` captions of various lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(max(length // 4, 1), length + 1, (count,), generator=generator)
    mask = (torch.arange(length) >= length - lengths[:, None]).long()
    features = torch.randn(count, length, dim, generator=generator) * dim**-0.5
    return features * mask[..., None], mask

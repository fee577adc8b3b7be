"""Captions of text-conditional teachers: T5 features, padded on the left, encoded, stored and read back.

Dimensions: M captions, C tokens of a caption (120 in LlamaGen), dim of a token's features (2048 in flan-t5-xl).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast import seeds
from ddfast.errors import DDFastError, first_line
from ddfast.models.caption_files import holds_features, read_texts
from ddfast.models.checkpoint import load_tensors, save_tensors
from ddfast.models.llamagen.network import LlamaGenTeacher
from ddfast.models.protocol import Teacher


def left_padded(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the valid tokens of every row to its end, in their order, with zeros before them.

    Args:
        features: [M, C, dim]; what stands at padding is ignored, also where it is not finite.
        mask: [M, C], int64 or bool, nonzero at valid tokens; a row may have any number of them.

    Returns:
        Features and mask of the same shapes and dtypes.

    Raises:
        ValueError: the shapes do not agree.
    """
    problem = _shape_problem(features, mask)
    if problem:
        raise ValueError(problem)
    # A stable sort by validity puts padding first and keeps the order of the tokens.
    order = (mask != 0).to(torch.uint8).argsort(dim=1, stable=True)
    mask = mask.gather(1, order)
    features = features.gather(1, order[..., None].expand_as(features))
    return features.masked_fill((mask == 0)[..., None], 0), mask


class CaptionEncoder:
    """The encoder of a T5, which `transformers` loads (and downloads, the first time).

    Args:
        model: name or folder of the T5.
        length: C, tokens per caption, the end token included.
        device: where the encoder runs.
        dtype: in which it runs; bfloat16 halves its memory, float16 overflows in the larger T5s.
        batch_size: captions at a time.

    Raises:
        DDFastError: transformers is not installed, or cannot load the model.
        ValueError: the batch size is below 1.
    """

    def __init__(
        self,
        *,
        model: str = "google/flan-t5-xl",
        length: int = 120,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError as error:
            raise DDFastError(
                "captions: the T5 encoder needs transformers; pip install 'ddfast[text]', or give precomputed features"
            ) from error
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
            encoder: Any = T5EncoderModel.from_pretrained(model)
        except (OSError, ValueError, ImportError) as error:
            raise DDFastError(f"captions: cannot load the T5 encoder {model}: {first_line(error)}") from error
        # By .to, not an argument of from_pretrained: that one's name depends on the version of transformers.
        self.encoder = encoder.to(device=device, dtype=dtype).eval()
        self.length, self.device, self.batch_size = length, device, batch_size

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features float32 [M, C, dim] and mask int64 [M, C] of M texts, padded on the left, on the CPU."""
        features, masks = [], []
        for start in range(0, len(captions), self.batch_size):
            tokens = self.tokenizer(
                list(captions[start : start + self.batch_size]),
                padding="max_length",
                max_length=self.length,
                truncation=True,
                add_special_tokens=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
            valid = tokens["attention_mask"].to(self.device)
            hidden = self.encoder(input_ids=tokens["input_ids"].to(self.device), attention_mask=valid).last_hidden_state
            # To the CPU batch by batch: a caption of flan-t5-xl takes a megabyte.
            features.append(hidden.float().cpu())
            masks.append(valid.cpu())
        return left_padded(torch.cat(features), torch.cat(masks))


def encode_captions(captions: list[str], **encoding: Any) -> tuple[Tensor, Tensor]:
    """Features of captions by the encoder of a T5.

    Args:
        captions: M texts, at least one; tokens beyond the encoder's length are cut off.
        encoding: as of `CaptionEncoder`; errors too.

    Returns:
        Features float32 [M, C, dim] and mask int64 [M, C], padded on the left, on the CPU.

    Raises:
        ValueError: there is no caption.
    """
    if not captions:
        raise ValueError("captions: got none, expected at least one")
    return CaptionEncoder(**encoding)(captions)


class EncodedOnDemand:
    """Captions as texts, of which those of a batch are encoded when the batch is made.

    The features of COCO's 30,000 captions would take 29 GB.
    """

    def __init__(self, texts: Sequence[str], encoder: CaptionEncoder) -> None:
        self.texts, self.encoder = texts, encoder

    def __len__(self) -> int:
        """How many captions there are."""
        return len(self.texts)

    def encoded(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, C, dim] and mask [B, C] of the captions with the numbers int64 [B], each encoded once."""
        numbers, place = index.cpu().unique(return_inverse=True)
        asked = [self.texts[number] for number in numbers.tolist()]
        features, mask = self.encoder(asked or self.texts[:1])  # an empty batch has their shape too
        return features[place], mask[place]


def save_captions(path: Path, features: Tensor, mask: Tensor, captions: Sequence[str] | None = None) -> None:
    """Write caption features to a safetensors file, the texts (where given) to the configuration in its header.

    Args:
        path: of the file, replaced where it exists.
        features: float32 [M, C, dim].
        mask: int64 or bool [M, C].
        captions: the M texts.

    Raises:
        ValueError: dtypes or shapes are others, or there is not one text per row.
    """
    problem = _problem(features, mask)
    if problem:
        raise ValueError(problem)
    config: dict[str, Any] = {}
    if captions is not None:
        if len(captions) != len(features):
            raise ValueError(f"captions: got {len(captions)} texts, expected {len(features)}, one per row of features")
        config["captions"] = list(captions)
    save_tensors(path, {"features": features, "mask": mask}, config)


def load_captions(path: Path) -> tuple[Tensor, Tensor]:
    """Caption features float32 [M, C, dim] and mask int64 or bool [M, C] of a file that `save_captions` wrote.

    Raises:
        DDFastError: the file is missing, damaged or not safetensors, or its tensors have other names, dtypes or shapes.
    """
    tensors, _ = load_tensors(path)
    if tensors.keys() != {"features", "mask"}:
        got = ", ".join(sorted(tensors)) or "nothing"
        raise DDFastError(f"{path} holds no captions: got {got}, expected features, mask")
    features, mask = tensors["features"], tensors["mask"]
    problem = _problem(features, mask)
    if problem:
        raise DDFastError(f"{path} holds no captions: {problem}")
    return features, mask


def read_captions(path: Path, **encoding: Any) -> tuple[Tensor, Tensor]:
    """Captions of a file with features, or of one with texts, which are encoded.

    Args:
        path: what `save_captions` wrote, or what `read_texts` reads: lines, or COCO's annotations.
        encoding: as of `CaptionEncoder`.

    Raises:
        DDFastError: the file is neither, or `encode_captions` fails.
    """
    return load_captions(path) if holds_features(path) else encode_captions(read_texts(path), **encoding)


def random_captions(count: int, length: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Stand-ins for captions, to profile with random weights: normal features of about unit norm, varied lengths.

    Args:
        count: M.
        length: C; about a quarter of it to all of it is valid in a row, at least one token.
        dim: of the features.
        seed: the same seed gives the same captions.

    Returns:
        Features float32 [M, C, dim] and mask int64 [M, C], padded on the left.

    Raises:
        ValueError: length or dim is below 1.
    """
    if length < 1 or dim < 1:
        raise ValueError(f"length, dim: got {length}, {dim}, expected at least 1")
    generator = seeds.generator(seed)
    valid = torch.randint(max(1, length // 4), length + 1, (count, 1), generator=generator, dtype=torch.int64)
    mask = (torch.arange(length, dtype=torch.int64) >= length - valid).long()
    features = torch.randn(count, length, dim, generator=generator, dtype=torch.float32) * dim**-0.5
    return features.masked_fill((mask == 0)[..., None], 0), mask


def _shape_problem(features: Tensor, mask: Tensor) -> str:
    """What is wrong with the shapes of caption features and their mask, in one line; "" where nothing is."""
    if features.ndim != 3 or not len(features):
        return f"features: got {list(features.shape)}, expected [M >= 1, C, dim]"
    if mask.shape != features.shape[:2]:
        return f"mask: got {list(mask.shape)}, expected {list(features.shape[:2])} as of features [M, C, dim]"
    return ""


def _problem(features: Tensor, mask: Tensor) -> str:
    """What is wrong with the dtypes and shapes of caption features and their mask; "" where nothing is."""
    if features.dtype != torch.float32:
        return f"features: got {features.dtype}, expected torch.float32"
    if mask.dtype not in (torch.int64, torch.bool):
        return f"mask: got {mask.dtype}, expected torch.int64 or torch.bool"
    return _shape_problem(features, mask)


_HELD = 1024
"""Captions that are encoded at once and kept, a gigabyte of flan-t5-xl's features; of more texts, batch by batch."""


def give_captions(teacher: Teacher, captions: Path | Sequence[str], **encoding: Any) -> None:
    """Set the captions that the samples of a text teacher cycle through; arguments and errors as of `captions_for`.

    Of more than a thousand texts, those of a batch are encoded when the batch is made.
    """
    made = _made(teacher, captions, **encoding, held=_HELD)
    assert isinstance(teacher, LlamaGenTeacher)
    teacher.captions = made


def captions_for(
    teacher: Teacher, captions: Path | Sequence[str], *, encoder: str = "", device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Features [M, C, dim] and mask [M, C] of captions for a text teacher.

    Args:
        teacher: a text-conditional one.
        captions: a file of features, of lines of text or of COCO's annotations (`read_texts`), or texts.
        encoder: name or folder of the T5 that encodes texts; empty: the one that LlamaGen was trained with.
        device: where it runs.

    Raises:
        DDFastError: the teacher takes class labels, a file cannot be read, the encoder is not there, or the features
            are not this teacher's.
    """
    made = _made(teacher, captions, encoder=encoder, device=device)
    assert isinstance(made, tuple)
    return made


def _made(
    teacher: Teacher,
    captions: Path | Sequence[str],
    *,
    encoder: str = "",
    device: torch.device | str = "cpu",
    held: int | None = None,
) -> tuple[Tensor, Tensor] | EncodedOnDemand:
    """As `captions_for`; of more texts than are `held`, what encodes them."""
    if not isinstance(teacher, LlamaGenTeacher) or teacher.num_classes:
        expected = f"class labels, 0..{teacher.num_classes - 1}"
        raise DDFastError(f"captions: have no effect: this {type(teacher).__name__} is conditioned on {expected}")
    encoding: dict[str, Any] = {"length": teacher.sizes.cls_token_num, "device": device}
    if encoder:
        encoding["model"] = encoder
    made: tuple[Tensor, Tensor] | EncodedOnDemand
    if isinstance(captions, Path) and holds_features(captions):
        made = load_captions(captions)
    else:
        texts = read_texts(captions) if isinstance(captions, Path) else captions
        texts = [texts] if isinstance(texts, str) else list(texts)
        many = held is not None and len(texts) > held
        made = EncodedOnDemand(texts, CaptionEncoder(**encoding)) if many else encode_captions(texts, **encoding)
    try:
        teacher.check_condition(made if isinstance(made, tuple) else made.encoded(torch.zeros(1, dtype=torch.int64)))
    except (TypeError, ValueError) as error:
        source = captions if isinstance(captions, Path) else "captions"
        raise DDFastError(f"{source}: {str(error).removeprefix('condition: ')}") from error
    return made

"""CLIP score: how well images show what their captions say, by a CLIP model of the user's, or by features of a file.

It is 100 max(cos, 0) of an image's features and its caption's, in the mean over images: the figure of text-to-image
tables, 0..100. Hessel et al. 2021 have the factor 2.5, and "A photo depicts" before every caption; other tables leave
the factor out. Scores of two models (ViT-B/32, G/14) are two figures.

Dimensions: B batch, M images, D features.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from ddfast import processes
from ddfast.errors import DDFastError, first_line
from ddfast.evaluation.images import Pictured
from ddfast.evaluation.resizing import clip_resize
from ddfast.files import expect, file_sha256, parse_json, read_text
from ddfast.models.checkpoint import load_tensors

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that OpenAI's and OpenCLIP's models were trained with, where a folder does not say others."""


_AT_A_TIME = 64
"""Images in a pass of the model."""

_WRONG_FILES = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError)
"""What transformers raises for files that are damaged, missing, or another model's."""


class Clip:
    """A CLIP model in a folder, as `transformers` keeps it (openai/clip-vit-base-patch32, laion/CLIP-ViT-bigG-14-...).

    Args:
        folder: with config.json, weights and tokenizer; nothing is downloaded.
        device: where it runs, in float32.

    Attributes:
        sha256: of the weights' file, or of those of several files.

    Raises:
        DDFastError: transformers is not installed, the folder is not there, or holds something else.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        if not (folder / "config.json").is_file():
            raise DDFastError(f"--clip {folder}: no folder of a CLIP model: it has no config.json")
        try:
            from transformers import AutoTokenizer, CLIPModel
        except ImportError as error:
            raise DDFastError(
                f"--clip: needs transformers ({first_line(error)}): pip install 'ddfast[text]'"
            ) from error
        try:
            model: Any
            with _without_warnings("transformers"):
                model, found = CLIPModel.from_pretrained(folder, output_loading_info=True, local_files_only=True)
                self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (*_WRONG_FILES, ImportError) as error:
            raise DDFastError(f"--clip {folder}: cannot load the CLIP model: {first_line(error)}") from error
        # transformers only warns of weights that it draws anew, and makes a tokenizer of nothing.
        if found["missing_keys"]:
            missing = sorted(found["missing_keys"])
            what = f"{len(missing)} weights of a CLIP model are missing"
            raise DDFastError(f"--clip {folder}: {what}, such as {missing[0]}")
        text = model.config.text_config
        if len(self.tokenizer) != text.vocab_size:
            got = f"{len(self.tokenizer)} tokens, its model {text.vocab_size}"
            raise DDFastError(f"--clip {folder}: the tokenizer has {got}; download vocab.json and merges.txt too")
        self.folder, self.sha256 = folder, processes.first_does(lambda: _weights_sha256(folder))
        self.model = model.to(device=device, dtype=torch.float32).eval()
        self.device, self.length = device, text.max_position_embeddings
        self.size = model.config.vision_config.image_size
        self.mean, self.std = (part.view(3, 1, 1).to(device) for part in _normalisation(folder))

    @torch.no_grad()
    def cosines(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each image's features and its caption's: float64 [B], on the CPU.

        Args:
            pixels: uint8 [B, 3, H, W]; resized as `clip_resize` says.
            captions: B texts; of long ones, the first tokens that the model reads.
        """
        captions = list(captions)
        return torch.cat(
            [
                self._cosines(part, captions[first : first + _AT_A_TIME])
                for first, part in zip(range(0, len(pixels), _AT_A_TIME), pixels.split(_AT_A_TIME), strict=True)
            ]
        )

    def _cosines(self, pixels: Tensor, captions: list[str]) -> Tensor:
        images = (clip_resize(pixels, self.size).to(self.device).float() / 255 - self.mean) / self.std
        tokens = self.tokenizer(captions, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        texts = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        made = self.model(pixel_values=images, **texts)
        return cosines(made.image_embeds, made.text_embeds)


@contextlib.contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    """Within, a logger keeps to errors: of missing weights it would print a table."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _weights_sha256(folder: Path) -> str:
    """Of what transformers reads: safetensors, where there are both."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digests = [file_sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _normalisation(folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the pixels, float32 [3] each: what the folder says, or else CLIP's."""
    said: Any = {}
    file = folder / "preprocessor_config.json"
    if file.is_file():
        try:
            said = expect(parse_json(read_text(file)), dict[str, Any])
            numbers = [expect(said.get(name), list[float], name) for name in ("image_mean", "image_std")]
            made = [torch.tensor(one, dtype=torch.float32) for one in numbers]
        except ValueError as error:
            raise DDFastError(f"{file}: no settings of an image processor: {first_line(error)}") from error
        if any(part.shape != (3,) or not bool(part.isfinite().all()) for part in made) or not bool(made[1].all()):
            raise DDFastError(f"{file}: expected image_mean and image_std, three numbers each")
        return made[0], made[1]
    return torch.tensor(_MEAN, dtype=torch.float32), torch.tensor(_STD, dtype=torch.float32)


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """Cosines of rows of features [M, D] and [M, D]: float64 [M] on the CPU; NaN where a row is zero or not finite."""
    images, texts = images.double().cpu(), texts.double().cpu()
    return (images * texts).sum(-1) / (images.norm(dim=-1) * texts.norm(dim=-1))


def clip_figures(cosines: Tensor) -> dict[str, float]:
    """Mean of 100 max(cos, 0) over images as `clip_score`, `clip_score_error`, its standard error, and their `count`.

    Args:
        cosines: float64 [M], M at least 1; of one image there is no error.

    Raises:
        ValueError: one is not finite.

    Source: Hessel et al. 2021 (CLIPScore, whose factor is 2.5).
    """
    if not bool(cosines.isfinite().all()):
        first = int((~cosines.isfinite()).nonzero()[0])
        raise ValueError(f"CLIP score: the features of image {first} or of its caption are zero or not finite")
    scores = 100 * cosines.clamp_min(0)
    result = {"clip_score": float(scores.mean())}
    if len(scores) > 1:
        result["clip_score_error"] = float(scores.std() / len(scores) ** 0.5)
    return result | {"count": len(scores)}


P = TypeVar("P", bound=Pictured)


class ClipScore:
    """Scores pictures while they pass to whoever measures something else of them: they are made once.

    Args:
        clip: the model.
        captions: of the pictures: their `condition`s are numbers of them.

    Attributes:
        said: what a judgement says of model and captions.
    """

    def __init__(self, clip: Clip, captions: Sequence[str]) -> None:
        self.clip, self.captions = clip, captions
        told = hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()
        self.said = {"file": clip.folder.name, "sha256": clip.sha256, "captions": told}
        self._cosines: list[Tensor] = []  # eight bytes of an image

    def along(self, pictures: Iterable[P]) -> Iterator[P]:
        """The same batches of pictures, each scored as it passes.

        Raises:
            ValueError: a picture has the number of no caption.
        """
        for batch in pictures:
            numbers = batch.condition.tolist()
            if wrong := [number for number in numbers if not 0 <= number < len(self.captions)]:
                raise ValueError(f"captions: got {len(self.captions)}, expected one with the number {wrong[0]}")
            self._cosines.append(self.clip.cosines(batch.pixels, [self.captions[number] for number in numbers]))
            yield batch

    def figures(self) -> dict[str, float]:
        """The figures of all that has passed, at all processes; as `clip_figures`."""
        parts = processes.collected(self._cosines)
        return processes.first_does(lambda: clip_figures(torch.cat(parts)))


class FileScore:
    """The score of features that somebody computed, in the place of `ClipScore`.

    Args:
        path: safetensors with `image_features` and `text_features`, floating-point [M, D], row i of both of image i.
        count: M.

    Attributes:
        said: what a judgement says; the same text features are the same model and captions.

    Raises:
        DDFastError: the file cannot be read, or holds something else.
    """

    def __init__(self, path: Path, count: int) -> None:
        tensors, _ = load_tensors(path)
        if tensors.keys() != {"image_features", "text_features"}:
            got = ", ".join(sorted(tensors)[:5]) or "nothing"
            raise DDFastError(f"--clip {path}: holds {got}, expected image_features and text_features")
        images, texts = tensors["image_features"], tensors["text_features"]
        fits = images.ndim == 2 and images.shape == texts.shape and len(images) == count
        if not fits or not (images.is_floating_point() and texts.is_floating_point()):
            got = f"{list(images.shape)} of {images.dtype} and {list(texts.shape)} of {texts.dtype}"
            raise DDFastError(f"--clip {path}: holds features {got}, expected floating-point [{count}, D] both")
        try:
            self._figures = clip_figures(cosines(images, texts))
        except ValueError as error:
            raise DDFastError(f"--clip {path}: {error}") from error
        told = hashlib.sha256(texts.float().contiguous().numpy().tobytes()).hexdigest()
        self.said = {"file": path.name, "sha256": told, "captions": told}

    def along(self, pictures: Iterable[P]) -> Iterator[P]:
        """The same batches of pictures."""
        yield from pictures

    def figures(self) -> dict[str, float]:
        """As `clip_figures`."""
        return self._figures

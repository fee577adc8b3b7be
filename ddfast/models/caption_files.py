"""Captions in files: features, lines of text, and COCO's annotations, told apart by what they hold.

COCO's annotations (captions_val2014.json and the like) are JSON: {"images": [{"id": 1}, ...], "annotations":
[{"image_id": 1, "caption": "..."}, ...]}, several captions to an image. One of each is taken, the first in the file, in
the order of the images: what is measured on 30,000 captions takes the first 30,000 images.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ddfast.errors import DDFastError, first_line, shown
from ddfast.files import parse_json, read_text
from ddfast.models.checkpoint import read_checkpoint

_LARGEST_FILE = 2**30
"""Bytes; COCO's largest file, captions_train2014.json, has 67 million."""

_LONGEST_CAPTION = 10_000
"""Letters: encoders read the first 77 or 120 tokens."""

_HALVES = re.compile("[\ud800-\udfff]")
"""Halves of letters (lone surrogates): JSON may name them, and no tokenizer reads them."""


def holds_features(path: Path) -> bool:
    """Whether a file holds tensors, as `save_captions` writes them; otherwise it is text.

    Raises:
        DDFastError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise DDFastError(f"cannot read {path}: {error.strerror}") from error
    # safetensors begin with the length of their header, and text would tell an enormous one: '{"info":{' is COCO's.
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def read_texts(path: Path) -> list[str]:
    """The captions of a file as texts: at least one, each on one line, none empty.

    Args:
        path: text with a caption in every line, COCO's annotations, or features that `save_captions` wrote with their
            texts.

    Raises:
        DDFastError: the file cannot be read, is too large, is damaged, or holds no captions; the message says where.
    """
    if holds_features(path):
        _, config = read_checkpoint(path)  # the features themselves stay in the file
        texts = config.get("captions")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise DDFastError(f"{path} holds features without their texts: give save_captions the texts too")
        return texts
    if path.stat().st_size > _LARGEST_FILE:
        raise DDFastError(f"{path} has {path.stat().st_size / 2**30:.1f} GB, expected captions: at most 1 GB of text")
    text = read_text(path)
    if path.suffix.lower() == ".json" or text.lstrip()[:1] == "{":
        try:
            return coco_captions(parse_json(text))
        except ValueError as error:  # of the JSON, of one of its numbers, or of what it holds
            raise DDFastError(f"{path} is no file of captions in COCO's format: {first_line(error)}") from error
    texts = [line.strip() for line in text.splitlines() if line.strip()]
    if not texts:
        raise DDFastError(
            f"{path} holds no captions: expected features, text with a caption in every line, or COCO's JSON"
        )
    return texts


def coco_captions(annotations: Any) -> list[str]:
    """The first caption of every image that has one, in the order of the images.

    Args:
        annotations: what COCO's JSON holds.

    Raises:
        ValueError: it is something else; the message names the entry.
    """
    images = {_entry(image, f"images[{number}]", "id", int): "" for number, image in _entries(annotations, "images")}
    for number, annotation in _entries(annotations, "annotations"):
        where = f"annotations[{number}]"
        image = _entry(annotation, where, "image_id", int)
        caption = " ".join(_entry(annotation, where, "caption", str).split())
        if image not in images:
            raise ValueError(f"{where}.image_id: got {shown(image)}, which is no image of the file")
        if len(caption) > _LONGEST_CAPTION:
            raise ValueError(f"{where}.caption: got {len(caption)} letters, expected at most {_LONGEST_CAPTION}")
        if _HALVES.search(caption):
            raise ValueError(f"{where}.caption: got a lone surrogate, expected Unicode text")
        images[image] = images[image] or caption
    captions = [caption for caption in images.values() if caption]
    if not captions:
        raise ValueError("there is no caption of any image")
    return captions


def _entries(annotations: Any, name: str) -> list[tuple[int, Any]]:
    if not isinstance(annotations, dict):
        raise ValueError(f"got {shown(annotations)}, expected images and annotations")
    entries = annotations.get(name)
    if not isinstance(entries, list):
        raise ValueError(f"{name}: got {shown(entries)}, expected a list")
    return list(enumerate(entries))


def _entry(of: Any, where: str, name: str, kind: type) -> Any:
    value = of.get(name) if isinstance(of, dict) else None
    if type(value) is not kind:  # True is no number of an image
        raise ValueError(f"{where}.{name}: got {shown(value)}, expected {'a text' if kind is str else 'an integer'}")
    return value

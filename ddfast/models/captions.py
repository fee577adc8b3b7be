"""Captions of text-conditional teachers, under the name that they had: `ddfast.models.llamagen.captions`."""

from ddfast.models.llamagen.captions import (
    encode_captions,
    load_captions,
    random_captions,
    read_captions,
    save_captions,
)

__all__ = ["encode_captions", "load_captions", "random_captions", "read_captions", "save_captions"]

"""LlamaGen: its networks, its tokenizer, its files, its captions."""

from ddfast.models.llamagen.network import (
    LLAMAGEN_SIZES,
    LlamaGenFlowNetwork,
    LlamaGenSizes,
    LlamaGenStudent,
    LlamaGenTeacher,
)
from ddfast.models.llamagen.tokenizer import LlamaGenTokenizer

__all__ = [
    "LLAMAGEN_SIZES",
    "LlamaGenFlowNetwork",
    "LlamaGenSizes",
    "LlamaGenStudent",
    "LlamaGenTeacher",
    "LlamaGenTokenizer",
]

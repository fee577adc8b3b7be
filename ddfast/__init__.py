"""Distilled Decoding 1 and 2: one- and two-step image generators from auto-regressive teachers."""

from ddfast.ops import noise

__version__ = "0.1.0"

__all__ = ["__version__", "noise"]

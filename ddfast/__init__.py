"""Distilled Decoding 1 and 2: one- and two-step image generators from auto-regressive teachers."""

__version__ = "0.1.0"

"""Text, character by character: what Python's own documentation says, a teacher of it, and its files."""

from ddfast.models.text.data import reference, windows
from ddfast.models.text.network import TextTeacher, train_teacher
from ddfast.models.text.tokenizer import ALPHABET, as_codes, as_texts

__all__ = ["ALPHABET", "TextTeacher", "as_codes", "as_texts", "reference", "train_teacher", "windows"]

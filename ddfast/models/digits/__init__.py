"""The embedded task of handwritten digits: its images, its networks, its tokenizer, its files, its classifier."""

from ddfast.models.digits.data import digit_batch, digit_images, render
from ddfast.models.digits.network import DigitsTeacher, train_teacher
from ddfast.models.digits.tokenizer import Tokenizer, train_tokenizer

__all__ = ["DigitsTeacher", "Tokenizer", "digit_batch", "digit_images", "render", "train_teacher", "train_tokenizer"]

"""The digits' teachers in files: trained on first use, and kept.

`OfDigits` is what every family of the digits has: the classifier, the real images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ddfast.config import DigitsTeacherConfig, DigitsTokenizerConfig, TeacherConfig, TrainConfig
from ddfast.models.digits.classifier import DigitsClassifier, load_or_train_classifier
from ddfast.models.digits.data import digit_batch
from ddfast.models.digits.network import DigitsTeacher, train_teacher
from ddfast.models.digits.tokenizer import Tokenizer, train_tokenizer
from ddfast.models.family import FamilyOnFirstUse
from ddfast.models.protocol import Teacher
from ddfast.progress import Progress


class OfDigits(FamilyOnFirstUse):
    """A family whose tokenizer and teacher are trained on the digits."""

    def conditioned(self, teacher: Teacher, config: TeacherConfig) -> Teacher:
        return teacher

    def feature_network(self, progress: Progress | None = None) -> DigitsClassifier:
        return load_or_train_classifier(progress)

    def real_images(self, count: int, seed: int) -> Tensor:
        """Of the training split, as FID on ImageNet uses the training images."""
        return digit_batch("train", count, seed, number=10)[0]


class DigitsFamily(OfDigits):
    """The digits' own teacher."""

    name = "digits"
    teacher, config, tokenizer_config = DigitsTeacher, DigitsTeacherConfig, DigitsTokenizerConfig
    signs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "teacher": (
            "class_embedding.weight", "position_embedding", "input.weight", "body.norm.weight", "head.weight",
        ),
    }  # fmt: skip

    def untrained(self, config: TrainConfig) -> DigitsTeacher:
        assert isinstance(config.tokenizer, DigitsTokenizerConfig)
        assert isinstance(config.teacher, DigitsTeacherConfig)
        return DigitsTeacher(Tokenizer(config.tokenizer), config.teacher)

    def trained(self, config: TrainConfig, progress: Progress | None = None) -> DigitsTeacher:
        assert isinstance(config.tokenizer, DigitsTokenizerConfig)
        assert isinstance(config.teacher, DigitsTeacherConfig)
        tokenizer = train_tokenizer(config.tokenizer, seed=config.seed, progress=progress)
        return train_teacher(tokenizer, config.teacher, seed=config.seed, progress=progress)

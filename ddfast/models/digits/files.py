"""The digits' teacher in files: trained on first use, and kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ddfast.config import DigitsTeacherConfig, DigitsTokenizerConfig, TrainConfig, config_hash
from ddfast.env import cache_dir
from ddfast.models.checkpoint import load_tensors
from ddfast.models.digits.classifier import DigitsClassifier, load_or_train_classifier
from ddfast.models.digits.data import digit_batch
from ddfast.models.digits.network import DigitsTeacher, train_teacher
from ddfast.models.digits.tokenizer import Tokenizer, train_tokenizer
from ddfast.models.family import Family, Parts
from ddfast.progress import Progress


class DigitsFamily(Family):
    """The digits' teacher, whose tokenizer and weights are trained on first use."""

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

    def build(self, config: TrainConfig, progress: Progress | None = None) -> DigitsTeacher:
        """The teacher of these settings and this seed: from the cache, or trained now (two minutes) and cached."""
        path = cache_dir() / f"digits-teacher-{config_hash(config.tokenizer, config.teacher, config.seed)}.safetensors"
        if not path.exists():
            assert isinstance(config.tokenizer, DigitsTokenizerConfig)
            assert isinstance(config.teacher, DigitsTeacherConfig)
            tokenizer = train_tokenizer(config.tokenizer, seed=config.seed, progress=progress)
            self.save(path, train_teacher(tokenizer, config.teacher, seed=config.seed, progress=progress))
        tensors, header = load_tensors(path)
        made = self.read(Parts(tensors=tensors, source=path, header=header))
        assert isinstance(made, DigitsTeacher)
        return made

    def feature_network(self, progress: Progress | None = None) -> DigitsClassifier:
        return load_or_train_classifier(progress)

    def real_images(self, count: int, seed: int) -> Tensor:
        """Of the training split, as FID on ImageNet uses the training images."""
        return digit_batch("train", count, seed, number=10)[0]

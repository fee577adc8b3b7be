"""The teacher of text in a file: trained on first use, and kept."""

from __future__ import annotations

from ddfast.config import TextTeacherConfig, TextTokenizerConfig, TrainConfig
from ddfast.models.family import FamilyOnFirstUse
from ddfast.models.text.data import text_digest
from ddfast.models.text.network import TextTeacher, train_teacher
from ddfast.progress import Progress


class TextFamily(FamilyOnFirstUse):
    """Teachers of characters; no tensor's name tells them from the digits', so their files say what they are."""

    name = "text"
    teacher, config, tokenizer_config = TextTeacher, TextTeacherConfig, TextTokenizerConfig

    def untrained(self, config: TrainConfig) -> TextTeacher:
        assert isinstance(config.tokenizer, TextTokenizerConfig)
        assert isinstance(config.teacher, TextTeacherConfig)
        return TextTeacher(config.tokenizer, config.teacher)

    def trained(self, config: TrainConfig, progress: Progress | None = None) -> TextTeacher:
        assert isinstance(config.tokenizer, TextTokenizerConfig)
        assert isinstance(config.teacher, TextTeacherConfig)
        return train_teacher(config.tokenizer, config.teacher, seed=config.seed, progress=progress)

    def data(self) -> tuple[str, ...]:
        """The text, which is another in another version of Python."""
        return (text_digest(),)

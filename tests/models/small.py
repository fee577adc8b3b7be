"""A small teacher and its student, shared by the tests of this folder."""

import torch

from ddfast.models.student import TransformerStudent
from ddfast.models.transformer import TransformerTeacher

LABELS = torch.tensor([0, 1, 2, 0])


def build(groups: tuple[int, ...], *, trained: bool = False) -> tuple[TransformerTeacher, TransformerStudent]:
    """`trained`: weights large enough that outputs depend visibly on every input."""
    torch.manual_seed(0)
    teacher = TransformerTeacher(
        codebook=torch.randn(11, 3), groups=groups, num_classes=3, width=32, depth=2, heads=4
    ).requires_grad_(False)
    student = TransformerStudent.from_teacher(teacher)
    if trained:
        for module in (teacher, student):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
    return teacher.eval(), student.eval().requires_grad_(False)

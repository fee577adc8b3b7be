"""The digits networks (random weights: the arithmetic is the same): AR decoding against one and two steps."""

import pytest
import torch
from compare import side_by_side

import ddfast
from ddfast.evaluation.plain_decoding import plain_decoder
from ddfast.models.loading import untrained_teacher
from ddfast.models.student import TransformerStudent
from ddfast.recipes import get_recipe


@pytest.mark.parametrize("decode", [False, True], ids=["codes", "images"])
@pytest.mark.parametrize("batch", [1, 64])
def test_one_step_against_ar(benchmark, batch: int, decode: bool):
    config = get_recipe("digits")
    teacher = untrained_teacher(config)
    student = TransformerStudent.from_teacher(teacher).eval()
    condition = torch.arange(batch) % teacher.num_classes
    plain = plain_decoder(teacher)
    noise = ddfast.noise(0, torch.arange(batch), (teacher.num_tokens, teacher.code_dim))

    def images(made: torch.Tensor) -> torch.Tensor:
        return teacher.decode(made) if decode else made

    with torch.inference_mode():
        side_by_side(
            benchmark,
            {
                "ddfast": lambda: images(student.sample(condition, noise)),
                "2 steps": lambda: images(student.sample(condition, noise, steps=(0, config.dd1.point))),
                "AR, KV cache": lambda: images(teacher.generate(condition)),
                "AR, flow sampler": lambda: images(teacher.generate(condition, sampler="flow", noise=noise)),
                "AR, plain loop": lambda: images(plain.generate(condition)),
            },
            rounds=15,
        )

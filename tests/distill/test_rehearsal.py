"""What a step takes without memory is what it takes with memory."""

import pytest
import torch

from ddfast import seeds
from ddfast.config import update
from ddfast.distill.batch import Part
from ddfast.distill.dd1 import DD1
from ddfast.distill.dd2 import Matching, Tuning
from ddfast.distill.method import Roles
from ddfast.distill.micro_batch import peak_bytes
from ddfast.distill.rehearsal import Rehearsal, forward_pass
from ddfast.distill.stages import new_network
from ddfast.models.loading import start_student, untrained_teacher
from ddfast.recipes import get_recipe

SIZES = {
    "var-d16": {"teacher": {"depth": 2, "patch_nums": [1, 2, 4, 6]}, "dd1": {"point": 2, "split": 2}},
    "llamagen-b": {"teacher": {"dim": 64, "n_layer": 4, "n_head": 2, "block_size": 36}, "dd1": {"point": 9}},
    "digits": {"teacher": {"width": 64, "depth": 4, "heads": 2}},
}
TOKENIZER = {"num_codes": 128, "code_dim": 8, "channels": 32, "multipliers": [1, 1], "blocks": 1, "latent_channels": 32}


def small(recipe: str, method: str):
    config = get_recipe(recipe)
    update(config, {"method": method, "dd2": {"head_width": 64, "head_depth": 1}, **SIZES[recipe]})
    if recipe != "digits":
        update(config, {"tokenizer": TOKENIZER})
    return config


def networks(config, teacher):
    if config.method == "dd1":
        return {"student": start_student(teacher)}
    return {name: new_network(config, teacher) for name in ("student", "guidance")}


def method_of(config, teacher, found, phase):
    if config.method == "dd1":
        return DD1(Roles(student=found["student"], teacher=teacher), config.dd1)
    roles = Roles(student=found["student"], teacher=teacher, guidance=found["guidance"])
    return Tuning(roles, config.dd2.tune) if phase in ("head", "full") else Matching(roles, config.dd2.match)


def measured(config, phase: str, samples: int, precision: str, recompute: bool) -> int:
    """Bytes that forward and backward of a real micro-batch hold at a time, at most."""
    teacher = untrained_teacher(config)
    found = {name: network.train().requires_grad_(True) for name, network in networks(config, teacher).items()}
    method = method_of(config, teacher, found, phase)
    updated = method.networks[phase]
    for parameter in updated.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        part = Part.whole(samples, seeds.generator(0))
        loss, _ = forward_pass(method, phase, part, precision=precision, recompute=recompute)
        loss.backward()

    step()  # what is made once and kept
    return peak_bytes(step)


@pytest.mark.parametrize(
    ("recipe", "phase", "samples", "precision", "recompute"),
    [
        ("var-d16", "student", 4, "bfloat16", False),
        ("llamagen-b", "full", 4, "float32", False),
        ("digits", "student", 8, "float32", True),
    ],
)
def test_a_rehearsed_step_takes_what_a_real_one_takes(recipe, phase, samples, precision, recompute):
    config = small(recipe, "dd1" if recipe == "digits" else "dd2")
    real = measured(config, phase, samples, precision, recompute)
    config.device = "meta"
    made = Rehearsal(config, lambda teacher: networks(config, teacher), "cpu")
    with made.pretending():
        method = method_of(config, made.teacher, made.networks, phase)
    cost = made.cost(method, phase, precision=precision, recompute=recompute)
    assert cost.peak(samples) == pytest.approx(real, rel=0.03)
    assert 0 < cost.activations(samples) <= cost.peak(samples)


def test_work_is_that_of_the_products():
    """Of a guided pass of the digits' teacher, by hand."""
    config = small("digits", "dd1")
    config.device = "meta"
    made = Rehearsal(config, lambda teacher: networks(config, teacher))
    teacher, tokens, width = made.teacher, made.teacher.num_tokens, 64
    block = 12 * width**2 * 2 * tokens + 4 * tokens**2 * width
    ends = 2 * tokens * width * (teacher.code_dim + teacher.num_codes)
    assert made.sequence_flops() == pytest.approx(2 * (4 * block + ends), rel=0.01)

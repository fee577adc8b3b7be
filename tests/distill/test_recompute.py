"""Recomputation of blocks: the same numbers from less memory, for every family and both methods."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from official import llamagen_teacher_like, var_teacher_like
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from ddfast.config import DD1Config, MatchConfig, TuneConfig
from ddfast.distill.batch import Part
from ddfast.distill.dd1 import DD1
from ddfast.distill.dd2 import Matching, Tuning
from ddfast.distill.method import Method, Roles
from ddfast.distill.micro_batch import peak_bytes
from ddfast.distill.trainer import from_noise
from ddfast.models.blocks import blocks_of, recomputing
from ddfast.models.loading import student_class
from ddfast.models.protocol import Teacher
from ddfast.models.toy import ToyTeacher
from ddfast.models.transformer import TransformerTeacher

DEPTH, SIZE = 12, 8
HEAD = {"head_width": 16, "head_depth": 1}
MATCHING = {"form": "sid", "alpha": 1.0, "fake_score": "velocity", "anchor_weight": 1.0, "lookahead_weight": 1.0}


def small_teacher() -> Teacher:
    torch.manual_seed(0)
    teacher = TransformerTeacher(
        codebook=torch.randn(11, 3), groups=(1, 3, 5, 7), num_classes=3, width=32, depth=DEPTH, heads=4
    )
    return teacher.eval().requires_grad_(False)


TEACHERS = {
    "digits": small_teacher,
    "var": lambda: var_teacher_like(depth=DEPTH),
    "var, shared modulation": lambda: var_teacher_like(depth=DEPTH, shared_aln=True),
    "llamagen": lambda: llamagen_teacher_like(n_layer=DEPTH),
}
CASES = [(family, step) for family in ("digits", "var", "llamagen") for step in ("dd1", "student")]
CASES += [("var, shared modulation", "guidance"), ("digits", "tune")]


def method_of(teacher: Teacher, step: str) -> Method:
    """A method whose phase `step` is one update, its networks shaken so that every gradient is one."""
    torch.manual_seed(1)
    kind = student_class(teacher, "dd1" if step == "dd1" else "dd2")
    networks = [kind.from_teacher(teacher, **({} if step == "dd1" else HEAD)) for _ in range(2)]
    for network in networks:
        for parameter in network.train().requires_grad_(True).parameters():
            nn.init.normal_(parameter, std=0.1)
    student, guidance = networks
    if step == "dd1":
        return DD1(Roles(student=student, teacher=teacher), DD1Config(point=2))
    if step == "tune":
        return Tuning(Roles(student=student, teacher=teacher), TuneConfig(draws=1))
    roles = Roles(student=student, teacher=teacher, guidance=guidance)
    return Matching(roles, MatchConfig(draws=1, **MATCHING))


def update(method: Method, phase: str, *, on: bool, reduced: bool = False) -> torch.Tensor:
    """Loss of one step, with its gradients added."""
    part = Part.whole(SIZE, torch.Generator().manual_seed(2))
    batch = from_noise(method.roles.teacher)(part)
    batch.codes = torch.zeros(SIZE, method.roles.teacher.num_tokens, dtype=torch.int64)
    network = method.networks[phase]
    with recomputing(network, on), torch.autocast("cpu", torch.bfloat16, enabled=reduced):
        loss, _ = method.step(phase, batch, part)
    loss.backward()
    return loss.detach()


def gradients(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def phase_of(step: str) -> str:
    return {"dd1": "student", "tune": "full"}.get(step, step)


@pytest.mark.parametrize(("family", "step"), CASES, ids=str)
def test_memory_falls_to_a_third_at_the_same_numbers(family, step):
    """Gradients are there before what is measured: it is the activations' peak."""
    method, phase = method_of(TEACHERS[family](), step), phase_of(step)
    network = method.networks[phase]
    losses, found, peaks = [], [], []
    for on in (False, True):
        network.zero_grad(set_to_none=True)
        losses.append(update(method, phase, on=on))
        found.append(gradients(network))
        peaks.append(peak_bytes(lambda on=on: update(method, phase, on=on)))
    assert torch.equal(*losses)
    assert_same(*found)
    assert peaks[0] > 3 * peaks[1]


def calls_of_blocks(network: nn.Module) -> list[int]:
    """Numbers of blocks as their layers are called."""
    seen: list[int] = []
    for number, block in enumerate(blocks_of(network)):
        next(m for m in block.modules() if isinstance(m, nn.Linear)).register_forward_hook(
            lambda *_, number=number: seen.append(number)
        )
    return seen


@pytest.mark.parametrize("family", ["digits", "var"])
def test_autocast_holds_for_the_second_pass_and_none_is_made_without_gradient(family):
    method = method_of(TEACHERS[family](), "tune")
    student, found = method.roles.student, []
    for on in (False, True):
        student.zero_grad(set_to_none=True)
        update(method, "full", on=on, reduced=True)
        found.append(gradients(student))
    assert_same(*found)
    seen = calls_of_blocks(student)
    update(method, "head", on=True)  # its backbone has no gradient
    assert seen == list(range(DEPTH))
    update(method, "full", on=True)
    assert seen[DEPTH:] == [*range(DEPTH), *reversed(range(DEPTH))]


def test_a_network_frozen_for_its_forward_pass_hands_gradients_to_its_inputs():
    network = method_of(small_teacher(), "student").roles.student
    tokens = torch.randn(2, network.teacher.num_tokens, network.teacher.code_dim, requires_grad=True)
    found = []
    for on in (False, True):
        network.requires_grad_(False)
        with recomputing(network, on):
            out = network.features(torch.tensor([0, 1]), tokens).square().sum()
        network.requires_grad_(True)
        found.append(torch.autograd.grad(out, tokens)[0])
        assert not gradients(network)
    assert torch.equal(*found) and found[0].abs().amax() > 0


def test_a_network_is_what_it_was():
    method = method_of(small_teacher(), "dd1")
    network = method.roles.student
    names, blocks = list(network.state_dict()), blocks_of(network)
    with pytest.raises(KeyError), recomputing(network):
        assert list(network.state_dict()) == names == [name for name, _ in network.named_parameters()]
        copied = copy.deepcopy(network)
        assert all(block.forward.args[0] is block for block in blocks_of(copied))
        raise KeyError
    assert not any("forward" in vars(block) for block in blocks)
    with recomputing(network, False):
        assert not any("forward" in vars(block) for block in blocks)


def test_blocks_are_the_networks_own_or_its_heaviest_list():
    for make in TEACHERS.values():
        teacher = make()
        for network in (teacher, *(method_of(teacher, step).roles.student for step in ("dd1", "tune"))):
            blocks = blocks_of(network)
            assert len(blocks) == DEPTH and len({type(block) for block in blocks}) == 1
            assert hasattr(blocks[0], "qkv") or hasattr(blocks[0], "attn") or hasattr(blocks[0], "attention")
    assert blocks_of(ToyTeacher()) == []
    foreign = nn.Module()
    foreign.small = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    foreign.large = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    foreign.mixed = nn.ModuleList([nn.Linear(64, 64), nn.GELU()])
    foreign.levels = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(99, 99)}), nn.ModuleDict()])
    assert blocks_of(foreign) == list(foreign.large)


@pytest.mark.parametrize("sharded_within", [True, False])
def test_blocks_are_sharded_before_or_within(sharded_within):
    method = method_of(var_teacher_like(depth=2), "student")
    network = method.roles.student
    expected = update(method, "student", on=False), gradients(network)
    network.zero_grad(set_to_none=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with recomputing(network) if sharded_within else contextlib.nullcontext():
            for module in (*blocks_of(network), network):
                fully_shard(module)
            register_fsdp_forward_method(network, "runs")
            register_fsdp_forward_method(network, "code_logits")
            seen = calls_of_blocks(network)
            assert torch.equal(update(method, "student", on=not sharded_within), expected[0])
        assert seen == [0, 1, 1, 0]
        assert_same({name: value.full_tensor() for name, value in gradients(network).items()}, expected[1])
    finally:
        dist.destroy_process_group()

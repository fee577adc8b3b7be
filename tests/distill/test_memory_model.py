"""The rules of what a training holds, by hand."""

from torch import nn

from ddfast.distill.memory_model import (
    Size,
    choose_strategy,
    gathered_bytes,
    part_of,
    shards_teacher,
    state_bytes,
)

GIB = 2**30


class Two(nn.Module):
    """Two blocks of 4 x 4 numbers and a bias of 4, and an embedding of 10 x 4 outside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.table = nn.Embedding(10, 4)


def test_what_a_network_is_made_of():
    assert Size.of(Two()) == Size(parameters=80, matrices=32, block=20, outside=40)


def test_state_is_parameters_gradients_moments_and_average():
    size = Size(parameters=100, matrices=60, block=30, outside=10)
    adamw = state_bytes(size, "adamw", averaged=True)
    assert (adamw.parameters, adamw.gradients, adamw.moments, adamw.average) == (400, 400, 800, 400)
    assert (adamw.total, adamw.saved) == (2000, 1600)
    muon = state_bytes(size, "muon", averaged=False)
    assert (muon.moments, muon.average) == (800 - 240, 0)


def test_networks_are_sharded_where_they_leave_too_little_and_there_is_somebody_to_share_with():
    assert choose_strategy(30 * GIB, 72 * GIB, 8) == "replicate"
    assert choose_strategy(37 * GIB, 72 * GIB, 8) == "shard"
    assert choose_strategy(37 * GIB, 72 * GIB, 1) == "replicate"
    assert shards_teacher(30 * GIB, 10 * GIB, 72 * GIB)
    assert not shards_teacher(30 * GIB, 4 * GIB, 72 * GIB)
    assert part_of(10, 4) == 3


def test_blocks_are_gathered_as_they_are_needed():
    trained, read = (Size(parameters=0, matrices=0, block=block, outside=rest) for block, rest in ((100, 7), (300, 5)))
    assert gathered_bytes(trained) == 4 * (2 * 7 + 5 * 100)
    assert gathered_bytes(trained, read) == 4 * (2 * 7 + 5 + 2 * 300 + 3 * 100)

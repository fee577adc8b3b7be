"""Training pairs made on a GPU: the copies to the host, and the memory that a batch takes."""

import pytest
import torch
from small import build

from ddfast.config import TrajectoryConfig
from ddfast.trajectories.generate import generate_trajectories, store_settings
from ddfast.trajectories.memory import free_bytes, largest_batch, sample_bytes
from ddfast.trajectories.store import TrajectoryStore

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_pairs_are_those_of_a_cpu_up_to_rounding(tmp_path):
    teacher = build((1,) * 9, trained=True)[0]
    pairs = []
    for name in ("cpu", "cuda"):
        settings = store_settings(teacher.to(name), TrajectoryConfig(shard_size=50, store_noise=True), seed=3)
        store = TrajectoryStore.create(tmp_path / name, settings)
        held = torch.cuda.memory_allocated()
        generate_trajectories(teacher, store, 500, batch_size=20)
        assert torch.cuda.memory_allocated() - held < 2**24  # nothing captured is kept
        pairs.append(store.load())  # every checksum is right
    here, there = pairs
    assert torch.equal(here.stored_noise, there.stored_noise)
    assert (here.codes.long() != there.codes.long()).any(1).float().mean() <= 0.1


def test_the_largest_batch_fits(tmp_path):
    """A batch of memory's choosing, with memory as scarce as 2 GiB."""
    teacher = build((1,) * 1024)[0].to("cuda")
    device = teacher.codebook.device
    batch = min(largest_batch(teacher), int(0.8 * 2**31 / sample_bytes(teacher)))
    taken = torch.empty(max(free_bytes(device) - 2**31, 0), dtype=torch.uint8, device=device)
    settings = store_settings(teacher, TrajectoryConfig(shard_size=batch), seed=3)
    generate_trajectories(teacher, TrajectoryStore.create(tmp_path, settings), batch, batch_size=batch)
    del taken

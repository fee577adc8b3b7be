"""DD1's data generation: a teacher's flow maps noise to codes, shard by shard."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import torch

from ddfast import env
from ddfast.config import TrajectoryConfig
from ddfast.models.protocol import Teacher
from ddfast.ops import noise
from ddfast.trajectories.store import StoreSettings, TrajectoryStore

Progress = Callable[[int, int, str], None]


def teacher_hash(teacher: Teacher) -> str:
    """Sixteen hex digits that identify a teacher's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def store_settings(teacher: Teacher, config: TrajectoryConfig, seed: int) -> StoreSettings:
    """Settings of the store that holds this teacher's trajectories."""
    defaults = teacher.defaults
    return StoreSettings(
        teacher=teacher_hash(teacher),
        cfg_scale=defaults.cfg_scale,
        temperature=defaults.temperature,
        top_k=defaults.top_k,
        top_p=defaults.top_p,
        solver=config.solver,
        steps=config.steps,
        seed=seed,
        num_tokens=teacher.num_tokens,
        num_codes=teacher.num_codes,
        code_dim=teacher.code_dim,
        num_classes=teacher.num_conditions,
        shard_size=config.shard_size,
        store_noise=config.store_noise,
    )


def generate_trajectories(
    teacher: Teacher, store: TrajectoryStore, count: int, *, progress: Progress | None = None
) -> float:
    """Make the shards that the first `count` pairs need and that are not there yet (METHOD.md section 2).

    Sample i has the label (or caption) i mod their number and the noise (seed, i); a shard is one batch, so its bits
    depend on the shard alone. Under torchrun, process r of W makes the shards r, r + W, ...

    Args:
        teacher: with the settings of `store`.
        store: where the shards go; every finished one stays whatever happens next.
        count: number of pairs.
        progress: called as progress(pairs there, pairs wanted, text) after every shard.

    Returns:
        Pairs per second of what was made; 0 if nothing was missing.

    Raises:
        ValueError: `count` is not positive, or `store` was made for another teacher.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, expected at least 1")
    settings = store.settings
    if settings.teacher != teacher_hash(teacher):
        raise ValueError(f"teacher: got {teacher_hash(teacher)}, expected the store's teacher {settings.teacher}")
    rank, world_size = env.rank_and_world_size()
    mine = [shard for shard in store.shards_for(count) if shard % world_size == rank]
    device = teacher.codebook.device
    made, started = 0, time.perf_counter()
    for done, shard in enumerate(mine, start=1):
        if not store.has_shard(shard):
            index = store.indices(shard)
            condition = index % settings.num_classes
            eps = noise(settings.seed, index, (settings.num_tokens, settings.code_dim), device)
            codes = teacher.generate(
                teacher.condition_of(condition.to(device)),
                sampler="flow",
                noise=eps,
                steps=settings.steps,
                solver=settings.solver,
            )
            store.write_shard(shard, codes.cpu(), condition, eps.cpu())
            made += len(index)
        if progress:
            rate = made / (time.perf_counter() - started)
            progress(done * settings.shard_size, len(mine) * settings.shard_size, f"{rate:.0f} pairs/s")
    return made / (time.perf_counter() - started) if made else 0.0

"""DD1's data generation: a teacher's flow maps noise to codes, shard by shard.

A stream: while the device decodes a shard, the one before it travels to the host, is checksummed and written.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ddfast import env
from ddfast.config import TrajectoryConfig
from ddfast.errors import DDFastError
from ddfast.models.decoding import release_graphs
from ddfast.models.protocol import Teacher
from ddfast.ops import dispatch, noise
from ddfast.ops.common import sizes_of
from ddfast.trajectories.memory import fitting, largest_batch
from ddfast.trajectories.store import StoreSettings, TrajectoryStore

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What a call of `generate_trajectories` made.

    Attributes:
        pairs: without those that were there before.
        seconds: from the first batch to the end of the last write.
        batch_size: samples decoded at a time.
    """

    pairs: int = 0
    seconds: float = 0.0
    batch_size: int = 0

    @property
    def pairs_per_s(self) -> float:
        """Pairs per second; 0 if nothing was made."""
        return self.pairs / self.seconds if self.pairs else 0.0


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
        backend=_backend(teacher),
    )


def _backend(teacher: Teacher) -> str:
    """What takes this teacher's codes, here."""
    logits_dtype = next((tensor.dtype for tensor in teacher.parameters()), torch.float32)
    sizes = sizes_of(teacher.codebook)
    return dispatch.choose("sample_codes", teacher.codebook.device, logits_dtype, **sizes).backend


def generate_trajectories(
    teacher: Teacher,
    store: TrajectoryStore,
    count: int,
    *,
    batch_size: int = 0,
    progress: Progress | None = None,
) -> Throughput:
    """Make the shards that the first `count` pairs need and that are not there yet.

    Method: docs/method.md section 6 (DD1: trajectories).

    Sample i has the label (or caption) i mod their number and the noise (seed, i). A shard is decoded in batches of its
    own, so its bits depend on its number and the batch size alone; on the batch size only through the rounding of
    matrix products, which now and then decides between two codes. Under torchrun, process r of W makes the shards
    r, r + W, ...

    While a shard is decoded, a thread writes the one before it; there are never more than these two in memory. What
    ends the call early (an error, Ctrl-C) waits for the writes: no shard that was decoded is lost.

    Args:
        teacher: with the settings of `store`.
        store: where the shards go; every finished one stays whatever happens next.
        count: number of pairs.
        batch_size: samples decoded at a time, at most a shard; 0: as many as the free memory holds.
        progress: called as progress(pairs made, pairs that were missing, text) after every batch.

    Returns:
        What was made, and how fast.

    Raises:
        ValueError: `count` or `batch_size` is out of range, or `store` was made for another teacher.
        DDFastError: a shard cannot be written, a batch does not fit in memory, or the store was begun with another
            backend (class of kernels): their codes now and then differ.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, expected at least 1")
    if batch_size < 0:
        raise ValueError(f"batch_size: got {batch_size}, expected a positive number, or 0 for what memory holds")
    if store.settings.teacher != teacher_hash(teacher):
        raise ValueError(f"teacher: got {teacher_hash(teacher)}, expected the store's teacher {store.settings.teacher}")
    # By the environment, not `processes`: shards need no talk, so a caller under torchrun needs no `together`.
    rank, world_size = env.rank_and_world_size()
    missing = [shard for shard in store.shards_for(count)[rank::world_size] if not store.has_shard(shard)]
    if not missing:
        return Throughput()
    made_by, backend = store.settings.backend, _backend(teacher)
    if made_by not in ("", backend):
        remedy = "use --device cpu" if made_by == "cpu" else f"set DDFAST_BACKEND=sample_codes={made_by}"
        raise DDFastError(
            f"{store.path} was begun with the backend {made_by!r} of sample_codes, here it is {backend!r}: {remedy}, "
            "or choose another folder"
        )
    size = store.settings.shard_size
    batches = math.ceil(size / (batch_size or largest_batch(teacher)))
    batch_size = math.ceil(size / batches)
    # All batches of one size, since a captured graph serves one: the last may decode a few samples once more.
    starts = [min(batch * batch_size, size - batch_size) for batch in range(batches)]
    began = time.perf_counter()
    writing: Future[None] | None = None
    try:
        with ThreadPoolExecutor(1, "shard writer") as writer:  # leaving it, also by an exception, ends the write
            for done, shard in enumerate(missing):
                on_host = _HostShard(store, shard, teacher.codebook.device)
                for start in starts:
                    on_host.take(start, *_decode(teacher, store, on_host.index[start : start + batch_size]))
                    if progress:
                        made = done * size + start + batch_size
                        text = f"{made / (time.perf_counter() - began):.1f} pairs/s"
                        progress(made, len(missing) * size, text)
                earlier, writing = writing, writer.submit(on_host.write)
                if earlier:
                    earlier.result()
            assert writing is not None
            writing.result()
    finally:
        release_graphs(teacher)  # of a batch as large as the memory: what comes next needs it
    return Throughput(pairs=len(missing) * size, seconds=time.perf_counter() - began, batch_size=batch_size)


def _decode(teacher: Teacher, store: TrajectoryStore, index: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int64 [B, N] and noise float32 [B, N, D] of the samples `index`, on the teacher's device."""
    settings, device = store.settings, teacher.codebook.device
    with fitting(len(index), device, "--trajectories.batch-size"):
        eps = noise(settings.seed, index, (settings.num_tokens, settings.code_dim), device)
        codes = teacher.generate(
            teacher.condition_of((index % settings.num_classes).to(device)),
            sampler="flow",
            noise=eps,
            steps=settings.steps,
            solver=settings.solver,
        )
    return codes, eps


class _HostShard:
    """A shard that gathers on the host, batch by batch, without a wait for the device until it is written."""

    def __init__(self, store: TrajectoryStore, shard: int, device: torch.device) -> None:
        self.store, self.shard, self.device = store, shard, device
        self.index, settings = store.indices(shard), store.settings
        shape, pinned = (settings.shard_size, settings.num_tokens), device.type == "cuda"
        self.codes = torch.empty(shape, dtype=torch.int64, pin_memory=pinned)
        self.noise: Tensor | None = None
        if settings.store_noise:
            self.noise = torch.empty(*shape, settings.code_dim, dtype=torch.float32, pin_memory=pinned)
        self.there: torch.cuda.Event | None = None

    def take(self, start: int, codes: Tensor, eps: Tensor) -> None:
        """Copy the batch that begins at row `start` as soon as the device has made it."""
        rows = slice(start, start + len(codes))
        self.codes[rows].copy_(codes, non_blocking=True)
        if self.noise is not None:
            self.noise[rows].copy_(eps, non_blocking=True)
        if self.device.type == "cuda":
            self.there = torch.cuda.Event()
            self.there.record(torch.cuda.current_stream(self.device))

    def write(self) -> None:
        """Wait for the last copy; checksum and write."""
        if self.there is not None:
            self.there.synchronize()
        self.store.write_shard(self.shard, self.codes, self.index % self.store.settings.num_classes, self.noise)

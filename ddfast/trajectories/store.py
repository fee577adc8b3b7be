"""The trajectory store: a folder of checksummed shards that survives kills, grows, and is the same however it was made.

    manifest.json             what the pairs are: teacher, sampling settings, solver, seed, sizes, format version
    shard-000000.safetensors  codes [S, N] in the smallest unsigned type that holds V, condition [S], index [S], noise

Shard k holds the samples k S .. (k + 1) S - 1, always all of them. A sample's noise is a function of (seed, index): it
is regenerated, not stored, unless `store_noise` asks for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ddfast.errors import DDFastError, first_line, shown
from ddfast.files import expect, parse_json, write_atomically
from ddfast.ops import noise
from ddfast.seeds import check_seed

FORMAT = 1
_REMAKE = "delete it and run again to remake it"
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """What decides a store's contents; two stores with equal settings hold equal samples.

    `backend` is the kernel that took the codes (`ddfast.ops.sample_codes`); empty in a store of before that was kept.
    Others round otherwise, so that now and then a code differs.
    """

    teacher: str
    cfg_scale: float
    temperature: float
    top_k: int
    top_p: float
    solver: str
    steps: int
    seed: int
    num_tokens: int
    num_codes: int
    code_dim: int
    num_classes: int
    shard_size: int
    store_noise: bool = False
    backend: str = ""
    format: int = FORMAT


@dataclass(kw_only=True)
class Trajectories:
    """Pairs in memory: codes [K, N] (unsigned), condition int64 [K], index int64 [K], and the noise they came from."""

    codes: Tensor
    condition: Tensor
    index: Tensor
    settings: StoreSettings
    stored_noise: Tensor | None = None

    def noise(self, rows: Tensor) -> Tensor:
        """Noise float32 [B, N, D] of the pairs `rows` int64 [B]."""
        if self.stored_noise is not None:
            return self.stored_noise[rows]
        return noise(self.settings.seed, self.index[rows], (self.settings.num_tokens, self.settings.code_dim))


class TrajectoryStore:
    """A directory of trajectory shards; use `create`, `open` or `open_or_create`."""

    def __init__(self, path: Path, settings: StoreSettings) -> None:
        self.path, self.settings = path, settings

    @classmethod
    def create(cls, path: str | Path, settings: StoreSettings) -> TrajectoryStore:
        """A new, empty store.

        Raises:
            DDFastError: there is a store already, or the directory cannot be written.
        """
        path = Path(path)
        if (path / MANIFEST).exists():
            raise DDFastError(f"{path} already holds a trajectory store")
        write_atomically(path / MANIFEST, json.dumps(dataclasses.asdict(settings), indent=2) + "\n")
        return cls(path, settings)

    @classmethod
    def open(cls, path: str | Path) -> TrajectoryStore:
        """The store at `path`.

        Raises:
            DDFastError: there is none, or its manifest is damaged or of another format.
        """
        path = Path(path)
        try:
            found = expect(parse_json((path / MANIFEST).read_bytes()), dict[str, Any])
            if found.get("format") != FORMAT:
                raise DDFastError(
                    f"{path} is a store of format {shown(found.get('format'))}; this ddfast reads {FORMAT}"
                )
            settings = expect(found, StoreSettings)
            check_seed(settings.seed)
            for name in ("num_tokens", "num_codes", "code_dim", "shard_size"):
                if getattr(settings, name) < 1:
                    raise ValueError(f"{name}: got {getattr(settings, name)}, expected a positive number")
        except OSError as error:
            raise DDFastError(f"no trajectory store at {path}: {error.strerror}") from error
        except ValueError as error:
            raise DDFastError(f"{path / MANIFEST} is damaged ({error}); make the store again elsewhere") from error
        return cls(path, settings)

    @classmethod
    def open_or_create(cls, path: str | Path, settings: StoreSettings) -> TrajectoryStore:
        """The store at `path` if it was made with `settings`, or a new one.

        Raises:
            DDFastError: the store there was made with other settings; they are listed. Another backend is none: a
                store is read wherever it is needed, and `generate_trajectories` refuses to mix two.
        """
        if not (Path(path) / MANIFEST).exists():
            return cls.create(path, settings)
        store = cls.open(path)
        wanted = dataclasses.asdict(settings)
        different = [
            f"{name} is {value!r}, not {wanted[name]!r}"
            for name, value in dataclasses.asdict(store.settings).items()
            if value != wanted[name] and name != "backend"
        ]
        if different:
            raise DDFastError(f"{path} was made with other settings: {'; '.join(different)}; choose another folder")
        return store

    def shard_path(self, shard: int) -> Path:
        """File of one shard."""
        return self.path / f"shard-{shard:06d}.safetensors"

    def has_shard(self, shard: int) -> bool:
        """Whether the shard is there; only whole shards ever get their name."""
        return self.shard_path(shard).exists()

    def shards_for(self, count: int) -> range:
        """Shards that the first `count` samples need."""
        return range(-(-count // self.settings.shard_size))

    def indices(self, shard: int) -> Tensor:
        """Sample indices int64 [S] of one shard."""
        size = self.settings.shard_size
        return torch.arange(shard * size, (shard + 1) * size, dtype=torch.int64)

    def write_shard(self, shard: int, codes: Tensor, condition: Tensor, stored_noise: Tensor | None = None) -> None:
        """Write one whole shard: codes int64 [S, N], condition int64 [S], and the noise if the settings ask for it."""
        tensors = {
            "codes": codes.to(_code_dtype(self.settings.num_codes)).contiguous(),
            "condition": condition.contiguous(),
            "index": self.indices(shard),
        }
        if self.settings.store_noise:
            assert stored_noise is not None
            tensors["noise"] = stored_noise.contiguous()
        write_atomically(self.shard_path(shard), save(tensors, {"sha256": checksum(tensors)}))

    def read_shard(self, shard: int) -> dict[str, Tensor]:
        """The tensors of one shard, after comparing them with their checksum, and types and shapes with the settings.

        Raises:
            DDFastError: the shard is missing or damaged, or another one has its name.
        """
        path = self.shard_path(shard)
        if not path.exists():
            raise DDFastError(f"{path} is missing; run `ddfast trajectories` again to make it")
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
                written = (file.metadata() or {}).get("sha256")
        except (SafetensorError, ValueError, OSError) as error:
            raise DDFastError(f"{path} is damaged ({first_line(error)}); {_REMAKE}") from error
        if written != checksum(tensors):
            raise DDFastError(f"{path} is damaged (its checksum differs); {_REMAKE}")
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        if found != self._layout() or not torch.equal(tensors["index"], self.indices(shard)):
            raise DDFastError(f"{path} is damaged, or of another store (its header differs); {_REMAKE}")
        return tensors

    def _layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of a shard's tensors, which their checksum does not tell."""
        size, settings = self.settings.shard_size, self.settings
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (_code_dtype(settings.num_codes), (size, settings.num_tokens)),
            "condition": (torch.int64, (size,)),
            "index": (torch.int64, (size,)),
        }
        if settings.store_noise:
            layout["noise"] = (torch.float32, (size, settings.num_tokens, settings.code_dim))
        return layout

    def load(self, count: int | None = None) -> Trajectories:
        """The first `count` pairs (None: all of the shards that follow each other from 0), every shard checked.

        Raises:
            DDFastError: a shard is missing or damaged, or the store is empty.
        """
        shards = range(self.num_shards()) if count is None else self.shards_for(count)
        if not shards:
            raise DDFastError(f"{self.path} holds no trajectories yet; run `ddfast trajectories` first")
        parts = [self.read_shard(shard) for shard in shards]
        whole = {name: torch.cat([part[name] for part in parts])[:count] for name in parts[0]}
        return Trajectories(
            codes=whole["codes"],
            condition=whole["condition"],
            index=whole["index"],
            settings=self.settings,
            stored_noise=whole.get("noise"),
        )

    def num_shards(self) -> int:
        """How many shards follow each other from 0."""
        count = 0
        while self.has_shard(count):
            count += 1
        return count


def _code_dtype(num_codes: int) -> torch.dtype:
    for dtype in (torch.uint8, torch.uint16):
        if num_codes - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.uint32


def checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors on the CPU and their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

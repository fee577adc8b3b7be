"""A stage's checkpoints: a folder per step, written beside and renamed, by all processes together (PyTorch's DCP).

    checkpoints/tuning-00000500/
        *.distcp, .metadata   tensors: a run with another number of processes, or another strategy, reads them as well
        state.json            stage, settings' identity, step, a digest of every file, and one of itself

The last two are kept: where a file of the newer one is damaged, the run goes on from the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddfast import processes
from ddfast.errors import DDFastError, first_line, shown
from ddfast.files import expect, json_digest, parse_json, reading, sync, write_atomically, writing
from ddfast.messages import warn

FOLDER = "checkpoints"
STATE = "state.json"
_INDEX = ".metadata"
FORMAT = 1
"""Of `state.json`; those of before have none."""

KEPT = 2
"""Checkpoints of a stage: a run keeps its last ones."""

_CHUNK = 2**24


class Checkpoints:
    """Those of one stage of a run.

    Args:
        out: folder of the run.
        stage: its name.
        identity: of the settings; a checkpoint of others is refused.
    """

    def __init__(self, out: Path, stage: str, identity: str) -> None:
        self.folder, self.stage, self.identity = out / FOLDER, stage, identity

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, to: Path | None = None) -> Path:
        """Write a checkpoint of step `state["step"]`; those before the last two go. All processes call this.

        Args:
            tensors: by name; those that are spread over the processes are written by all of them.
            state: what else is to be found again, as JSON holds it.
            to: the folder, if it shall not be one of the stage's.

        Raises:
            DDFastError: it cannot be written; those that are there stay.
        """
        place = to or self.folder / f"{self.stage}-{state['step']:08d}"
        temporary = place.with_name(f".{place.name}.tmp")
        processes.first_does(lambda: _prepare(temporary))
        with processes.busy():
            try:
                _dcp("save", tensors, temporary)
            except Exception as error:
                said = getattr(error, "strerror", None) or first_line(error)
                raise DDFastError(f"cannot write {place}: {said}; the last checkpoint is kept") from error
            mine = {name: _digest(temporary / name) for name in _written_here(temporary)}
        digests = {name: digest for part in processes.gather(mine) for name, digest in part.items()}

        def finish() -> None:
            header = {"format": FORMAT, "stage": self.stage, "identity": self.identity, **state, "files": digests}
            header["seal"] = json_digest(header)
            with writing(place):
                write_atomically(temporary / STATE, json.dumps(header, indent=2) + "\n")
                if place.exists():  # of the same step: a run that went on from it, and was stopped at once
                    shutil.rmtree(place)
                temporary.replace(place)
                sync(place.parent)
                for old in [] if to else self._others(place):
                    shutil.rmtree(old, ignore_errors=True)

        processes.first_does(finish)
        return place

    def _others(self, newest: Path) -> list[Path]:
        """Folders that the newest makes needless: of earlier stages, and of steps before the one before or later.

        (Those of later ones were damaged: the run has gone on from an earlier one.)
        """
        found = sorted(path for path in self.folder.iterdir() if path.is_dir() and path != newest)
        kept = [path for path in found if path.name.startswith(f"{self.stage}-") and path < newest][1 - KEPT :]
        return [path for path in found if path not in kept]

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The last checkpoint of the stage that is whole, and its state; None: there is none. All processes call this.

        Raises:
            DDFastError: it is of another format or other settings, or those that are there are all damaged.
        """
        found = processes.first_does(self._all)
        for place in found:
            state, damage = processes.first_does(partial(_read_state, place))
            if not damage:
                names = processes.share(sorted(state["files"]))
                with processes.busy():
                    damaged = [name for name in names if _digest(place / name) != state["files"][name]]
                damage = ", ".join(name for part in processes.gather(damaged) for name in part)
            if damage:
                warn(f"{place} is damaged ({damage}): the checkpoint before it is used")
                continue
            if state.get("format", FORMAT) != FORMAT:
                raise DDFastError(
                    f"{place} is of format {state['format']}, this ddfast reads {FORMAT}: install a newer one"
                )
            if state.get("identity") != self.identity:
                raise DDFastError(
                    f"{place} belongs to a run with other settings; choose another --out or delete the folder"
                )
            return place, state
        if found:
            raise DDFastError(f"no checkpoint in {self.folder} is whole; delete the folder to begin the stage again")
        return None

    def _all(self) -> list[Path]:
        """Folders of the stage, the last step first."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if path.name.startswith(f"{self.stage}-")), reverse=True)


def load(place: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors, spread as they are, from a checkpoint. All processes call this.

    Raises:
        DDFastError: it holds anything but tensors.
    """
    names_in(place)  # refuses what is no tensor
    with processes.busy():
        _dcp("load", into, place)


def names_in(place: Path) -> set[str]:
    """Names of the tensors that a checkpoint holds, by its index, a pickle that PyTorch would run.

    It has to hold tensors of this folder alone: what is none, PyTorch would unpickle too, and from anywhere.

    Raises:
        DDFastError: it is damaged, or holds something else.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    path = place / _INDEX
    with reading(path), path.open("rb") as file:
        index = _Index(file).load()
        tensors, parts = dict(index.state_dict_metadata), dict(index.storage_data)
        elsewhere = [one.relative_path for one in parts.values() if Path(one.relative_path).name != one.relative_path]
        other = [name for name, value in tensors.items() if type(value) is not TensorStorageMetadata]
        if other or elsewhere:
            raise ValueError(f"names {shown([*other, *elsewhere][0])}, which is no tensor in this folder")
        return set(tensors)


class _Index(pickle.Unpickler):
    """Makes what PyTorch writes into a checkpoint's index, and nothing else."""

    _NAMES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "torch.distributed.checkpoint.metadata": (
            "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
            "StorageMeta", "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size",),
        **dict.fromkeys(("pathlib", "pathlib._local"), ("Path", "PosixPath", "WindowsPath")),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in self._NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}: refused, nothing of it was run")


def remove(out: Path) -> None:
    """Remove a run's checkpoints: what they led to is there. The first process does."""
    processes.first_does(lambda: shutil.rmtree(out / FOLDER, ignore_errors=True))


def keep(out: Path, copy: Path) -> bool:
    """Keep the last checkpoint under another name; returns whether there was one. All processes call this."""

    def copied() -> bool:
        found = sorted((out / FOLDER).glob("[!.]*"), key=lambda path: path.stat().st_mtime)
        if found:
            shutil.rmtree(copy, ignore_errors=True)
            with processes.busy():
                shutil.copytree(found[-1], copy, copy_function=_linked)
        return bool(found)

    return processes.first_does(copied)


def _linked(source: str, target: str) -> str:
    """The same file under another name, where a file system has that: one that is there is never written into."""
    try:
        os.link(source, target)
        return target
    except OSError:
        return shutil.copy2(source, target)


def _prepare(temporary: Path) -> None:
    with writing(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)


def _written_here(folder: Path) -> list[str]:
    """Files of a new checkpoint that this process wrote: `__RANK_*`, and what is no process's own the first."""
    names = sorted(file.name for file in folder.iterdir())
    rank = processes.rank()
    return [name for name in names if name.startswith(f"__{rank}_") or (rank == 0 and not name.startswith("__"))]


def _read_state(place: Path) -> tuple[dict[str, Any], str]:
    """A checkpoint's state, and what is wrong with it."""
    try:
        state = expect(parse_json((place / STATE).read_bytes()), dict[str, Any])
        if state.pop("seal", None) not in (None, json_digest(state)):  # those of before have none
            return {}, f"{STATE}: its digest differs"
        expect(state.get("step"), int, "step")
        files = expect(state.get("files"), dict[str, str], "files")
        missing = [name for name in files if Path(name).name != name or not (place / name).is_file()]
        return state, f"{', '.join(missing)} missing" if missing else ""
    except (OSError, ValueError) as error:
        return {}, f"{STATE}: {first_line(error)}"


def _dcp(action: str, tensors: Mapping[str, Tensor], place: Path) -> None:
    from torch.distributed import checkpoint  # its import takes a second

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        try:
            getattr(checkpoint, action)(dict(tensors), checkpoint_id=str(place), no_dist=processes.count() == 1)
        except checkpoint.CheckpointException as error:  # no Exception; its text is all tracebacks of all processes
            failure = next(failure for failure, _ in error.failures.values())
            if action == "load":
                with reading(place):
                    raise failure from error
            raise failure from error


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()

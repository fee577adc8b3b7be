"""Checkpoint files: ours are safetensors with the configuration in the header; PyTorch's are read, never run.

Ours are sealed: the header has a digest of every tensor's bytes, and one of itself, so that what was damaged since is
refused, not used. A tensor is compared when it is read.

Opening a file reads its structure; a tensor is read when it is wanted, into memory of its own. So a file that is
written anew, or cut short, under a loaded model changes nothing, and what nobody wants (an optimizer's state, a second
set of weights) costs nothing.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import pathlib
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ddfast import private_api, processes
from ddfast.errors import DDFastError, first_line
from ddfast.files import bytes_digest, expect, json_digest, parse_json, read_text, reading, write_atomically
from ddfast.messages import say
from ddfast.models.layers import stacked_rows
from ddfast.ops.common import check_finite

INDEX_SUFFIX = ".index.json"
"""Of the file that tells in which of several files a tensor is (Hugging Face)."""

Model = TypeVar("Model", bound=nn.Module)

_MOST_PROBLEMS = 100
"""Tensors that do not fit, of which one error tells."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Element types by safetensors' names."""

_SAID: dict[str, Any] = {
    "family": str, "method": str, "learnt_from": str, "files": dict[str, dict[str, str]], "config": dict[str, Any],
    "student": dict[str, Any], "teacher": dict[str, Any], "tokenizer": dict[str, Any],
    "point": int | None, "later_points": list[int], "split": int | None,
}  # fmt: skip
"""What our files say of themselves, and how."""

FORMAT = 1
"""Of our files, in their headers; those of before have none, and no digests."""

_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_HARMLESS: list[Any] = [
    argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, np.dtype, np.ndarray,
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float16", "float32", "float64")),
    *((maker, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")  # NumPy 1 and 2
      for name, maker in (("scalar", np.float64(0).__reduce__()[0]), ("_reconstruct", np.empty(0).__reduce__()[0]))),
]  # fmt: skip
"""What training scripts store beside tensors: options, paths, NumPy's numbers. Making them runs no code of the file."""


class _File:
    """A checkpoint that stays open while tensors may be read from it: whoever replaces it leaves this one readable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.raw = path.open("rb", buffering=0)
        except OSError as error:
            raise DDFastError(f"cannot read {path}: {error.strerror}") from error
        self.state = self._state()

    def __del__(self) -> None:
        if hasattr(self, "raw"):
            self.raw.close()

    def _state(self) -> tuple[int, int]:
        """Size and time of change: what tells that nobody wrote into it."""
        found = os.fstat(self.raw.fileno())
        return found.st_size, found.st_mtime_ns

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fill the memory with what begins at an offset."""
        try:
            self.raw.seek(offset)
            while len(memory) and (count := self.raw.readinto(memory)):
                memory = memory[count:]
        except OSError as error:
            raise DDFastError(f"cannot read {self.path}: {error.strerror}") from error
        if len(memory) or self._state() != self.state:
            raise DDFastError(f"{self.path} was changed while it was read; load it again when it is complete")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor that is still in its file.

    Attributes:
        file: the file.
        offset: of the first element, in bytes.
        shape, stride, dtype: of the tensor.
        digest: of its bytes, as the file has it; empty: the file has none.
    """

    file: _File
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    digest: str = ""

    def read(self) -> Tensor:
        """The tensor, contiguous, in memory of its own.

        Raises:
            DDFastError: the file cannot be read, was written into since it was opened, or is damaged.
        """
        if self.dtype.itemsize * math.prod(self.shape) > self.file.state[0]:  # before memory for it is asked for
            raise DDFastError(f"{self.file.path} is damaged: a tensor claims more bytes than the file has; {_REMEDY}")
        span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        flat = torch.empty(span if math.prod(self.shape) else 0, dtype=self.dtype, device="cpu")
        content = memoryview(flat.view(torch.uint8).numpy().data)
        self.file.read_into(content, self.offset)
        if self.digest and bytes_digest(content) != self.digest:
            raise DDFastError(f"{self.file.path} is damaged (a tensor's digest differs); {_REMEDY}")
        return flat.as_strided(self.shape, self.stride).contiguous()


@dataclass(frozen=True, kw_only=True)
class SpreadRows:
    """Some rows of a tensor that processes hold in parts.

    Attributes:
        tensor: all of it.
        first: of the rows.
        shape: of the rows.
    """

    tensor: Tensor
    first: int
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self.tensor.dtype

    def read(self) -> Tensor:
        """The rows; every process asks at the same point."""
        return processes.whole(self.tensor.detach()).narrow(0, self.first, self.shape[0]).contiguous()


_REMEDY = "copy it again, or delete it and make it again"


AnyTensor: TypeAlias = Tensor | StoredTensor | SpreadRows


def read_tensor(tensor: AnyTensor) -> Tensor:
    """A tensor in memory, contiguous."""
    if isinstance(tensor, (StoredTensor, SpreadRows)):
        return tensor.read()
    return processes.whole(tensor.detach()).contiguous()


def save_tensors(path: Path, tensors: Mapping[str, AnyTensor], config: dict[str, Any]) -> None:
    """Write tensors and their configuration to `path`, which is either the old file or the whole new one, always.

    One tensor after the other passes through the memory. Where some are spread over processes, all processes call this,
    and the first writes.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so that each lies aligned
    about = {"config": json.dumps(config, sort_keys=True), "format": str(FORMAT)}
    entries: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name in order:
        dtype, shape = tensors[name].dtype, list(tensors[name].shape)
        start, end = end, end + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}

    def write(file: BinaryIO) -> None:
        digests = dict.fromkeys(order, bytes_digest(b""))
        file.write(_sealed(entries, digests))
        for name in order:
            digests[name] = _write_tensor(file, tensors[name])
        file.seek(0)
        file.write(_sealed(entries, digests))

    with processes.busy():
        if processes.rank() and any(_is_spread(tensor) for tensor in tensors.values()):
            for name in order:
                read_tensor(tensors[name])
            return
        write_atomically(Path(path), write)


def _write_tensor(file: BinaryIO, tensor: AnyTensor) -> str:
    """Its bytes, of which the digest is returned; what was read of it is gone before the next one is."""
    content = memoryview(read_tensor(tensor).cpu().reshape(-1).view(torch.uint8).numpy().data)
    file.write(content)
    return bytes_digest(content)


def _sealed(entries: Mapping[str, Any], digests: Mapping[str, str]) -> bytes:
    """The first bytes of a file, of the same length whatever the digests are."""
    about = {**entries["__metadata__"], "digests": json.dumps(digests)}
    about["seal"] = _seal({**entries, "__metadata__": about})
    header = json.dumps({**entries, "__metadata__": about}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _seal(header: Mapping[str, Any]) -> str:
    """Digest of a header but for its seal."""
    about = {name: text for name, text in header["__metadata__"].items() if name != "seal"}
    return json_digest({**header, "__metadata__": about})


def _is_spread(tensor: AnyTensor) -> bool:
    return isinstance(tensor, SpreadRows) or processes.is_spread(tensor)


def state_of(network: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> dict[str, AnyTensor]:
    """`state_dict` of a network that may be spread over processes, whose tensors are gathered when they are read.

    Args:
        network: the network.
        parameters: others by the names of its own, in their place.
    """
    own = {name: value.detach() for name, value in network.named_parameters(remove_duplicate=False)}
    state: dict[str, AnyTensor] = dict(parameters or own)
    for whole, parts in stacked_rows(network):
        tensor = state.pop(whole)
        assert isinstance(tensor, Tensor)
        shape = torch.Size((tensor.shape[0] // len(parts), *tensor.shape[1:]))
        for number, part in enumerate(parts):
            state[part] = SpreadRows(tensor=tensor, first=number * shape[0], shape=shape)
    for place, module in network.named_modules():
        for name, value in module.named_buffers(recurse=False):
            if private_api.is_persistent(module, name):
                state[f"{place}.{name}" if place else name] = value
    return state


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and the configuration (none: an empty dict) of a file that `save_tensors` wrote.

    Raises:
        DDFastError: the file is missing, damaged, or no checkpoint.
    """
    content, config = read_checkpoint(Path(path))
    return {name: read_tensor(value) for name, value in tensors_of(content).items()}, config


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content of a checkpoint, its tensors as `StoredTensor`, and the configuration of ours (others: empty).

    What a file is, its first bytes decide, not its name. safetensors; PyTorch's, read by
    `torch.load(weights_only=True)`: tensors, plain containers and numbers, paths, and `argparse.Namespace` (training
    scripts store their options), nothing else; no code of the file runs; an index of several files is all of them.

    Raises:
        DDFastError: the file is missing, damaged, something else, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise DDFastError(f"no checkpoint at {path}")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DDFastError(f"cannot read {path}: {error.strerror}") from error
    if path.name.endswith(INDEX_SUFFIX):
        return _read_index(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:  # the header's length; text would be larger
        return _read_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        content = _read_pytorch(path, zipped=head.startswith(b"PK"))
        if not isinstance(content, Mapping):
            name = "Tensor" if isinstance(content, StoredTensor) else type(content).__name__
            raise DDFastError(f"{path} holds a {name}, expected a dict of tensors")
        return dict(content), {}
    raise DDFastError(f"{path} {_what_it_is(head)}")


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    opened = _File(path)
    try:
        with safe_open(path, framework="pt") as file:  # it checks the header, and the file's length by it
            about = file.metadata() or {}
        opened.raw.seek(0)
        length = int.from_bytes(opened.raw.read(8), "little")
        header = parse_json(opened.raw.read(length))
    except (SafetensorError, ValueError, OSError) as error:
        reason = f"{first_line(error)}; copy or download it again"
        raise DDFastError(f"{path} is not a readable safetensors file, cut short or damaged: {reason}") from error
    digests = _checked_digests(path, header, about)
    content = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise DDFastError(f"{path}: {name} has elements of type {entry['dtype']}, which PyTorch does not know")
        shape = torch.Size(entry["shape"])
        content[name] = StoredTensor(
            file=opened,
            offset=8 + length + entry["data_offsets"][0],
            shape=shape,
            stride=_contiguous(shape),
            dtype=_DTYPES[entry["dtype"]],
            digest=digests.get(name, ""),
        )
    try:
        parsed = parse_json(about.get("config", "{}"))
    except ValueError:
        parsed = {}
    if not isinstance(parsed, dict):
        return content, {}
    try:
        for name in parsed.keys() & _SAID.keys():
            expect(parsed[name], _SAID[name], name)
    except ValueError as error:
        raise DDFastError(f"{path} is damaged (what its header says of it: {error}); {_REMEDY}") from error
    return content, parsed


def _checked_digests(path: Path, header: Mapping[str, Any], about: Mapping[str, str]) -> dict[str, str]:
    """Digests of the tensors by name; of a file that is not ours, or of before, none."""
    written = about.get("format", "")
    if {"seal", "digests"} & about.keys():
        if about.get("seal") != _seal(header):
            raise DDFastError(f"{path} is damaged (its header's digest differs); {_REMEDY}")
        if written != str(FORMAT):
            raise DDFastError(f"{path} is of format {written}, this ddfast reads {FORMAT}: install a newer one")
        try:
            return expect(parse_json(about["digests"]), dict[str, str])
        except (ValueError, KeyError) as error:
            raise DDFastError(f"{path} is damaged (no digests of its tensors); {_REMEDY}") from error
    return {}


def _read_pytorch(path: Path, *, zipped: bool) -> Any:
    opened = _File(path)
    if zipped:
        _check_archive(path)
    with reading(path, "is damaged or no PyTorch checkpoint"):
        try:
            return _unpickled(opened, zipped=zipped)
        except pickle.UnpicklingError as error:
            if "Unsupported operand" in str(error):  # bytes that are no pickle of PyTorch at all
                raise DDFastError(f"{path} is damaged or no PyTorch checkpoint; copy or download it again") from error
            reason = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), "")
            found = f" ({reason.strip()[:160]})" if reason else ""
            raise DDFastError(
                f"{path} holds something else than tensors{found}: refused, nothing of it was run; "
                "save its state_dict alone"
            ) from error


def _unpickled(opened: _File, *, zipped: bool) -> Any:
    """What a pickle of PyTorch's holds, its tensors as they are in the file where that can be told."""
    with os.fdopen(os.dup(opened.raw.fileno()), "rb") as file, torch.serialization.safe_globals(_HARMLESS):
        if not zipped:  # the format before PyTorch 1.6 cannot be read in part
            return _spread(torch.load(file, map_location="cpu", weights_only=True), opened)
        try:  # storages on the meta device are not read, and PyTorch notes where in the file they are
            return _stored(_spread(torch.load(file, map_location="meta", weights_only=True), opened), opened)
        except _NoPlaceError:  # before 2.12 it does so for fake tensors only, whose import takes seconds
            file.seek(0)
            fake = private_api.fake_tensors()
            if fake is None:
                return _spread(torch.load(file, map_location="cpu", weights_only=True), opened)
            with torch.inference_mode(False), fake:
                return _stored(_spread(torch.load(file, map_location="cpu", weights_only=True), opened), opened)


class _NoPlaceError(Exception):
    """PyTorch did not note where in a file a storage is."""


def _check_archive(path: Path) -> None:
    """Raise where a zip archive is cut short, or is not one that `torch.save` writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except Exception as error:  # zipfile's, of which several are listed nowhere
        raise DDFastError(f"{path} is damaged, most likely cut short: copy or download it again") from error
    if "constants.pkl" in names:
        raise DDFastError(f"{path} is a TorchScript program, which is not run here: save its state_dict alone")
    if "data.pkl" not in names:
        raise DDFastError(f"{path} is a zip archive, not a PyTorch checkpoint: unpack it first")


def _spread(content: Any, file: _File) -> Any:
    """The content, which a file can hold as it is: in a pickle, few containers that hold each other twice are many.

    Raises:
        ValueError: it is nested deeply, or has more entries than the file has bytes.
    """
    left, entries = [(content, 0)], 0
    while left:
        value, depth = left.pop()
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, _SEQUENCES) else ()
        entries += len(inner)
        if depth > _DEEPEST or entries > file.state[0]:
            raise ValueError("its containers hold each other, or are nested too deeply")
        left += [(one, depth + 1) for one in inner]
    return content


_SEQUENCES, _DEEPEST = (list, tuple, set, frozenset), 100


def _stored(content: Any, file: _File) -> Any:
    """The content with every tensor in nested dicts as what is known of it in the file."""
    if isinstance(content, Mapping):
        return {name: _stored(value, file) for name, value in content.items()}
    if not isinstance(content, Tensor):
        return content
    start: Any = getattr(content.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise _NoPlaceError
    return StoredTensor(
        file=file,
        offset=int(start) + int(content.storage_offset()) * content.element_size(),
        shape=content.shape,
        stride=content.stride(),
        dtype=content.dtype,
    )


def _read_index(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        index = expect(parse_json(read_text(path)), dict[str, Any])
        files = set(expect(index.get("weight_map"), dict[str, str], "weight_map").values())
    except ValueError as error:
        raise DDFastError(f"{path} is no index of checkpoint files: {first_line(error)}") from error
    content: dict[str, Any] = {}
    for name in sorted(files):
        part = path.parent / name
        if part.parent != path.parent or not os.path.isfile(part) or name.endswith(INDEX_SUFFIX):
            raise DDFastError(f"{path} names {name[:200]}, which is not there; download it too")
        content |= read_checkpoint(part)[0]
    return content, {}


def _what_it_is(head: bytes) -> str:
    """What a file that is no checkpoint seems to be, as its error says it."""
    if not head:
        return "is damaged: it is empty; copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself: run `git lfs pull`, or download the file"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page (HTML), not a checkpoint: open the link in a browser and download the file itself"
    if text.startswith((b"{", b"[")):
        return "is a JSON file, not a checkpoint: give the file with the weights, or its folder"
    for start, name in ((b"\x1f\x8b", "gzip"), (b"7z\xbc\xaf", "7-Zip"), (b"BZh", "bzip2"), (b"Rar!", "RAR")):
        if head.startswith(start):
            return f"is a {name} archive, not a checkpoint: unpack it first"
    if head[257:262] == b"ustar":
        return "is a tar archive, not a checkpoint: unpack it first"
    if head.startswith(b"\x93NUMPY"):
        return "is a NumPy array, not a checkpoint of PyTorch or safetensors"
    if len(text) > 8 and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in text):
        return f"is a text file, not a checkpoint: it begins {text[:60].decode().split(chr(10))[0].strip()!r}"
    return "is damaged or no checkpoint of PyTorch or safetensors; copy or download it again"


def cached(path: Path, read: Callable[[], Model], make: Callable[[], object]) -> Model:
    """What `read` finds in a file that only ddfast writes: where it is missing or damaged, `make` writes it first."""
    if path.exists():
        try:
            return read()
        except DDFastError as error:
            if not os.access(path.parent, os.W_OK):
                raise
            say(f"{path} cannot be used ({first_line(error)}): it is made again")
    make()
    return read()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Twelve hex digits that tell tensors from others: of their names, shapes and some of each one's numbers."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 1000)].cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(some.view(torch.uint8).numpy().data)
    return found.hexdigest()[:12]


def tensors_of(content: Mapping[Any, Any]) -> dict[str, AnyTensor]:
    """The tensors among a dict's values."""
    return {str(name): value for name, value in content.items() if isinstance(value, AnyTensor)}


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file takes them: on the CPU, contiguous, none inside another's memory."""
    return _unshared({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, copied where two of them share memory: a file holds each by itself."""
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel())
    return {
        name: tensor.clone() if owners[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for name, tensor in tensors.items()
    }


def state_problems(expected: Mapping[str, Tensor], tensors: Mapping[str, AnyTensor]) -> list[str]:
    """What keeps `tensors` from being a state with the names and shapes of `expected`, an entry per tensor."""
    problems = [f"missing {name} {list(expected[name].shape)}" for name in expected if name not in tensors]
    problems += [f"unexpected {name} {list(tensors[name].shape)}" for name in tensors if name not in expected]
    both = [name for name in expected if name in tensors]
    problems += [
        f"{name} is {list(tensors[name].shape)} instead of {list(expected[name].shape)}"
        for name in both
        if tensors[name].shape != expected[name].shape
    ]
    return problems + [
        f"{name} holds {str(tensors[name].dtype).removeprefix('torch.')} instead of floating-point numbers"
        for name in both
        if expected[name].is_floating_point() and not tensors[name].dtype.is_floating_point
    ]


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """`module.load_state_dict`, strict, with one error that names every tensor that does not fit.

    Raises:
        DDFastError: tensors are missing, unexpected or of another shape; or one holds NaN or infinite values.
    """
    _check_state(module, tensors, source)
    _check_values(tensors, source)
    module.load_state_dict(tensors)


def check_fits(make: Callable[[], nn.Module], tensors: Mapping[str, AnyTensor], source: object) -> None:
    """Raise unless tensors are the state of the module that is made: before memory for it is asked for.

    Raises:
        DDFastError: tensors are missing, unexpected or of another shape.
    """
    with torch.device("meta"), _Undrawn():
        module = make()
    _check_state(module, tensors, source)


def check_layers(settings: Mapping[str, Any], tensors: Mapping[str, AnyTensor], source: object) -> None:
    """Raise where settings tell of more layers than there are tensors: before any is made.

    Raises:
        DDFastError: they do.
    """
    for name in _LAYERS & settings.keys():
        if isinstance(settings[name], int) and settings[name] > len(tensors):
            raise DDFastError(f"{source} is damaged: it has {len(tensors)} tensors, and {name} is {settings[name]}")


_LAYERS = {"depth", "head_depth", "blocks", "n_layer"}
"""Settings that count what a network has one after the other."""


def _check_state(module: nn.Module, tensors: Mapping[str, AnyTensor], source: object) -> None:
    problems = state_problems(module.state_dict(), tensors)
    if len(problems) > _MOST_PROBLEMS:
        problems[_MOST_PROBLEMS:] = [f"and {len(problems) - _MOST_PROBLEMS} more"]
    if problems:
        raise DDFastError(f"{source} does not fit {type(module).__name__}: " + "; ".join(problems))


def _check_values(tensors: Mapping[str, Tensor], source: object) -> None:
    """Weights of a training that diverged are told where they are read: the likeliest of NaN is some code too."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            try:
                check_finite(name, tensor)
            except ValueError as error:
                raise DDFastError(f"{source} is of no use: {error}; train or download it again") from error


def build_around(
    make: Callable[[], Model],
    tensors: Mapping[str, AnyTensor],
    source: object,
    *,
    derived: Iterable[str] = (),
    dtype: torch.dtype | None = None,
    beside: Mapping[str, Tensor] | None = None,
) -> Model:
    """A module whose parameters *are* the given tensors: nothing is drawn or allocated first.

    The module is made on the meta device, and the tensors, which are read one by one where they still are in a file,
    are assigned. A module's `derive_buffers()` then fills what is in no file.

    Args:
        make: builds the module.
        tensors: its state; every name and shape must fit.
        source: where they come from, for the error.
        derived: names (or ends of names, from the last dot on) of buffers in official files that the module computes.
        dtype: of the floating-point tensors; None: as they are.
        beside: the rest of its state, whose types stay.

    Raises:
        DDFastError: tensors are missing, unexpected or of another shape; each is listed. One holds NaN or infinite
            values.
    """
    endings = tuple(derived)
    kept = {name: value for name, value in tensors.items() if not (endings and name.endswith(endings))}
    with torch.device("meta"), _Undrawn():
        module = make()
    beside = beside or {}
    _check_state(module, {**kept, **beside}, source)
    read = _stacked(module, kept, dtype)
    read |= {name: cast_float(read_tensor(value), dtype) for name, value in kept.items()}
    _check_values(read, source)
    module.load_state_dict({**_unshared(read), **beside}, assign=True)
    for child in module.modules():
        derive = getattr(child, "derive_buffers", None)
        if derive is not None:
            derive()
    return module.eval().requires_grad_(False)


def _stacked(module: nn.Module, tensors: dict[str, AnyTensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The matrices that stand for several, which are read into them and taken out of `tensors`."""
    read = {}
    for whole, parts in stacked_rows(module):
        given = [tensors.pop(name) for name in parts]
        rows = [part.shape[0] for part in given]
        kind = functools.reduce(torch.promote_types, (part.dtype for part in given)) if dtype is None else dtype
        device = getattr(given[0], "device", "cpu")
        read[whole] = torch.empty(sum(rows), *given[0].shape[1:], dtype=kind, device=device)
        for part, place in zip(given, read[whole].split(rows), strict=True):
            place.copy_(read_tensor(part))
    return read


class _Undrawn(TorchFunctionMode):
    """Leaves out the drawing of weights: on the meta device it does nothing, but makes PyTorch load its compiler."""

    _DRAWS = frozenset({"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_"})

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in self._DRAWS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def cast_float(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating-point tensor in `dtype`; others, and with None all, as they are."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def one_dtype(tensors: Mapping[str, AnyTensor], source: object) -> torch.dtype | None:
    """The widest floating-point type of a network's tensors where they have several; None where they have one.

    Raises:
        DDFastError: there is a type in which nothing is computed, such as float8.
    """
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point}
    strange = dtypes - {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    if strange:
        name = str(strange.pop()).removeprefix("torch.")
        raise DDFastError(f"{source} holds {name} weights: convert them to float32, bfloat16 or float16 first")
    if len(dtypes) < 2:
        return None
    widest = functools.reduce(torch.promote_types, dtypes)
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    say(f"{source} holds weights of several types ({names}): all are made {str(widest).removeprefix('torch.')}")
    return widest


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    steps, step = [], 1
    for size in reversed(shape):
        steps.append(step)
        step *= max(size, 1)
    return tuple(reversed(steps))

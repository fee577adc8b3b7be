"""Writing files so that whatever happens, a name always stands for a whole file; reading text whoever wrote it."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, get_args, get_origin, get_type_hints

from ddfast import processes
from ddfast.errors import DDFastError, first_line, is_out_of_memory, shown

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""Byte-order marks that editors, and PowerShell's `>`, put before a text."""


def write_atomically(path: Path, data: bytes | str | Callable[[BinaryIO], object], *, durable: bool = True) -> None:
    """Write all of `path` or nothing, whenever the process or the machine stops; creates its folder.

    Args:
        path: the file.
        data: its content, or what writes it to an open file.
        durable: wait until the disk has it; without, the machine's stop (not the process's) may lose the file.

    Raises:
        DDFastError: the file cannot be written.
    """
    with whole_file(path, durable=durable) as temporary, temporary.open("wb") as file:
        if callable(data):
            data(file)
        else:
            file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """The name to write under; after the body, `path` is that file, and after its failure what it was before.

    Args and errors as of `write_atomically`, for what writes to no open file.
    """
    with _beside(path) as temporary:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)


@contextlib.contextmanager
def whole_folder(folder: Path, *, last: str) -> Iterator[Path]:
    """A new folder to fill; after the body, its files are those of `folder`, and after its failure nothing has changed.

    Where `folder` exists, its other files stay, and the file `last`, without which readers refuse it, is there only
    while all are of one writing.

    Raises:
        DDFastError: something cannot be written.
    """
    folder = folder.absolute()
    with _beside(folder) as temporary:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        if folder.exists():
            (folder / last).unlink(missing_ok=True)
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == last):
                os.replace(file, folder / file.name)
            temporary.rmdir()
        else:
            os.replace(temporary, folder)
        sync(folder.parent)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, whose folder is made; what is there is removed if the body fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
        except BaseException:
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, what the system says against writing is one line that names `path`."""
    try:
        yield
    except OSError as error:
        raise DDFastError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def locked(path: Path, occupied: str) -> Iterator[None]:
    """Within, this process alone holds the lock of a file that is made for it; the system frees it when a process ends.

    A file system without locks lets everybody in.

    Raises:
        DDFastError: another process holds it; the message is `occupied`, and which.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            who = file.read().strip()
            raise DDFastError(f"{occupied}{f' ({who})' if who else ''}; wait for its end, or stop it") from error
        except OSError:
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)  # nobody's any more, and the machine's name stays with nobody


def check_new(path: Path, option: str) -> None:
    """Raise unless the file or folder `path` is not there and can be made: before the work for it, not after.

    Raises:
        DDFastError: it is there (the message names the option that gave it), or `check_writable` raises.
    """
    check_writable(path)
    if path.exists():
        raise DDFastError(f"{option} {path} exists; choose another name, or delete it")


def check_writable(path: Path) -> None:
    """Raise unless something can be written at `path`.

    Raises:
        DDFastError: what should be a folder above it is a file, or may not be written to.
    """
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise DDFastError(f"cannot write {path}: {above} is not a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise DDFastError(f"cannot write {path}: {above} may not be written to")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, or of a UTF-16 file that begins with its mark.

    Raises:
        DDFastError: it cannot be read, or is no such text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DDFastError(f"cannot read {path}: {error.strerror}") from error
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DDFastError(f"{path} is not {encoding[:6].upper()} text ({error.reason}); save it as UTF-8") from error


def file_sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file, processes.busy():
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


@contextlib.contextmanager
def reading(path: object, otherwise: str = "is damaged or cannot be read") -> Iterator[None]:
    """Within, whatever is said against a file's content is one line that names it.

    For readers of formats of others (zip, NumPy, pictures, pickle): what they raise for damaged files is written
    nowhere, and differs by version.
    """
    try:
        yield
    except DDFastError:
        raise
    except Exception as error:
        said = "it asks for more memory than there is" if is_out_of_memory(error) else first_line(error)
        raise DDFastError(f"{path} {otherwise}: {said}") from error


def parse_json(text: str | bytes) -> Any:
    """What a JSON text of anyone's says.

    Raises:
        ValueError: it is none, or nested deeper than anything is that is meant.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def expect(value: Any, kind: Any, what: str = "content") -> Any:
    """A value that JSON or pickle gave, if it is of a type, at any depth.

    Args:
        value: the value.
        kind: bool, int, float (an int too), str, `Any`, list[X], tuple[X, ...], tuple[X, Y] (a list in JSON), dict[str,
            X], X | Y, or a dataclass of such fields (an object in JSON, that has those without defaults and no others).
        what: to call it.

    Returns:
        The value; tuples and dataclasses made of what JSON has for them.

    Raises:
        ValueError: it is not, or a number is larger than any that is meant.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is UnionType:
        for one in inner:
            with contextlib.suppress(ValueError):
                return expect(value, one, what)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        hints, fields = get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
        for name in (name for name, field in fields.items() if name not in value and _is_required(field)):
            raise ValueError(f"{what}: {name} is missing")
        for name in value.keys() - fields.keys():
            raise ValueError(f"{what}: {shown(name)} is unknown")
        return kind(**{name: expect(part, hints[name], name) for name, part in value.items()})
    if origin is dict and isinstance(value, dict):
        return {expect(name, inner[0], what): expect(part, inner[1], str(name)) for name, part in value.items()}
    if origin is list and isinstance(value, list):
        return [expect(part, inner[0], what) for part in value]
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            return tuple(expect(part, one, what) for part, one in zip(value, kinds, strict=True))
    if kind in (int, float):
        is_one = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if is_one and (isinstance(value, float) or -(2**63) <= value < 2**64):
            return value
    elif isinstance(kind, type) and not inner and isinstance(value, kind):
        return value
    raise ValueError(f"{what}: got {shown(value)}, expected {getattr(kind, '__name__', kind) if not inner else kind}")


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def bytes_digest(content: bytes | memoryview) -> str:
    """Digest of bytes in 32 hexadecimal digits: tells accidents, as digests can that lie beside what they are of."""
    return hashlib.sha256(content).hexdigest()[:32]


def json_digest(value: object) -> str:
    """Digest of a value that JSON takes, as it is read again (tuples as lists), whatever the order of names."""
    return bytes_digest(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode())


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable; Windows neither needs nor allows it for folders."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

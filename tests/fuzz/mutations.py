"""Changes to valid files that keep some of their structure, so that what lies behind the first check is reached too."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickletools
import random
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, TypeAlias

from ddfast.models import checkpoint

Change: TypeAlias = Callable[[bytes, random.Random], bytes]

NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53,
    2**63 - 1,
    2**64 - 1,
)

DEEP = 3000
"""Brackets in each other: more than Python's stack takes."""

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 10**6, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, float("inf"),
    float("-inf"), float("nan"), "", "x", "0", "1", "x" * 3000, "\n\r\x1b[2J",
    "\ud800", "\0", "%s{}", "../x", "/etc/passwd", "~", "F32", "cpu", "os:system", [], [[]], [0], [1, 2, 3, 4, 5],
    ["x"], [None], {}, {"": 0}, {"x": {"x": "x"}},
)  # fmt: skip

WORDS = (
    b"\0", b"\n", b"{", b"[", b"]", b'"', b"'", b":", b"/", b"../", b"\\", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe",
    b"\r\n", b"1e999", b"NaN", b"null", b"-", b"[" * DEEP, b"9" * 5000, b"PK\x03\x04", b"\x80\x02",
    b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\x85",
)  # fmt: skip


def bytewise(data: bytes, draw: random.Random) -> bytes:
    """Bits, numbers, cuts, repeats, words."""
    made = bytearray(data)
    at = draw.randrange(len(made) + 1)
    span = draw.choice((1, 1, 2, 4, 8, 16, 64, 512))
    kind = draw.randrange(8)
    if kind == 0 and made:
        at = draw.randrange(len(made))
        made[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        made[at : at + span] = draw.randbytes(span)
    elif kind == 2:
        del made[at : at + span]
    elif kind == 3:
        del made[at:]
    elif kind == 4:
        start = draw.randrange(len(made) + 1)
        made[at:at] = made[start : start + span]
    elif kind == 5:
        start = draw.randrange(len(made) + 1)
        made[at : at + span] = made[start : start + span]
    elif kind == 6:
        size = draw.choice((1, 2, 4, 8))
        number = draw.choice(NUMBERS) % 256**size
        made[at : at + size] = number.to_bytes(size, draw.choice(("little", "big")))
    else:
        made[at : at + draw.choice((0, span))] = draw.choice(WORDS)
    return bytes(made)


def changed(value: Any, draw: random.Random) -> Any:
    """A tree of dicts and lists with one place changed: its value, its type, its name, its being there."""
    nodes: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        node = left.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        nodes += [(node, key) for key in keys]
        left += [node[key] for key in keys]
    kind = draw.randrange(10)
    if not nodes or (kind == 0 and draw.randrange(4) == 0):
        return copy.deepcopy(draw.choice(VALUES))
    node, key = draw.choice(nodes)
    if kind == 1:
        del node[key]
    elif kind == 2 and isinstance(node, dict):
        node[draw.choice((*node, "", "x", "__metadata__", "format", "\ud800", "a.b"))] = node.pop(key)
    elif kind == 3:
        node[key] = draw.choice(([node[key]], {"x": node[key]}, str(node[key])))
    elif kind == 4:
        other, place = draw.choice(nodes)
        node[key] = json.loads(json.dumps(other[place])) if place in _places(other) else None
    elif kind == 5 and isinstance(node[key], (int, float)) and abs(node[key]) < 2**64:
        number = node[key]
        node[key] = draw.choice((number + 1, number - 1, -number, number / 2**32, str(number), draw.choice(NUMBERS)))
    elif kind == 6 and isinstance(node, list):
        node.insert(key, node[key])
    elif kind == 7 and isinstance(node[key], str) and node[key][:1] in ("{", "["):  # JSON in JSON
        try:
            node[key] = json.dumps(changed(json.loads(node[key]), draw))
        except (ValueError, RecursionError):
            node[key] = ""
    else:
        node[key] = copy.deepcopy(draw.choice(VALUES))
    return value


def _places(node: Any) -> Any:
    return node if isinstance(node, dict) else range(len(node))


def json_tree(data: bytes, draw: random.Random) -> bytes:
    """A JSON text with another value somewhere; sometimes with a name twice, or nested deeply."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return bytewise(data, draw)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        value = changed(value, draw)
    text = json.dumps(value, ensure_ascii=draw.randrange(4) > 0)
    kind = draw.randrange(12)
    if kind == 0:
        text = re.sub(r"[\[{]", lambda found: found[0] * DEEP, text, count=1)
    elif kind == 1:
        text = text.replace("{", '{"format": 2, "x": 1, ', 1)
    elif kind == 2:
        text = re.sub(r"\d+", "9" * draw.choice((20, 400, 5000)), text, count=1)
    return text.encode(errors="surrogatepass")


def toml_lines(data: bytes, draw: random.Random) -> bytes:
    """A TOML text with another value, a line more or less, or in another order."""
    lines = data.decode(errors="replace").split("\n")
    at = draw.randrange(len(lines))
    kind = draw.randrange(6)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, draw.choice(lines))
    elif kind == 2:
        lines.insert(
            at, draw.choice(("[x]", "[[x]]", "x = 1", '"" = 1', "[teacher]", "recipe = []", "a.b.c = {}", "= "))
        )
    else:
        name, equals, _ = lines[at].partition("=")
        values = (
            "0", "-1", "1e999", "nan", "inf", "-inf", "9" * 30, "9" * 5000, '""', '"x"', "[]", "[1, 'x']", "{}", "true",
            "1979-05-27T07:32:00Z", "07:32:00", '"\\u0000"', "[[[]]]", "[" * DEEP, "'../x'",
            '"os:system"', "1.5", "[1.5]",
        )  # fmt: skip
        lines[at] = f"{name}{equals or '='} {draw.choice(values)}"
    return "\n".join(lines).encode()


def safetensors(data: bytes, draw: random.Random) -> bytes:
    """Another header, of the right length and sealed anew, or not; of tensors of other types, shapes and places."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        for _ in range(draw.choice((1, 1, 2, 3))):
            header = _header_changed(header, draw)
        about = header.get("__metadata__") if isinstance(header, dict) else None
        if isinstance(about, dict) and "seal" in about and draw.randrange(4):
            about["seal"] = checkpoint._seal(header)
        text = json.dumps(header).encode()
    except (ValueError, RecursionError, AttributeError):
        return bytewise(data, draw)
    size = len(text) if draw.randrange(8) else draw.choice((*NUMBERS, len(text) + 1, len(data)))
    body = data[8 + length :]
    if draw.randrange(4) == 0:
        body = bytewise(body, draw)
    return (size % 2**64).to_bytes(8, "little") + text + body


def _header_changed(header: Any, draw: random.Random) -> Any:
    tensors = [entry for name, entry in header.items() if name != "__metadata__"] if isinstance(header, dict) else []
    kind = draw.randrange(8)
    about = header.get("__metadata__") if isinstance(header, dict) else None
    if kind > 4 and isinstance(about, dict) and isinstance(about.get("config"), str):
        about["config"] = json_tree(about["config"].encode(errors="replace"), draw).decode(errors="replace")
        return header
    if not tensors or kind > 2 or not all(isinstance(entry, dict) for entry in tensors):
        return changed(header, draw)
    entry = draw.choice(tensors)
    if kind == 0:
        entry["dtype"] = draw.choice((*checkpoint._DTYPES, "F8_E8M0", "F4", "C64", "f32", "X", 1, None))
    elif kind == 1:
        entry["shape"] = draw.choice(
            ([], [0], [1], [-1], [2**40, 0], [0, 2**62], [1] * 100, [2, 3], [3, 2], [6], [2.0])
        )
    else:
        numbers = (0, 1, 4, 8, 24, 2**32, 2**63, 2**64, -1)
        entry["data_offsets"] = [draw.choice(numbers), draw.choice(numbers)]
    return header


def members(change: Change) -> Change:
    """Of a zip archive: a member's content by `change`, its name, its being there; with the right sums of all."""

    def zipped(data: bytes, draw: random.Random) -> bytes:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                held = [(name, archive.read(name)) for name in archive.namelist()]
                comment = archive.comment
        except Exception:  # not one any more, whatever zipfile says of it
            return bytewise(data, draw)
        if not held:
            return bytewise(data, draw)
        at = draw.randrange(len(held))
        name, content = held[at]
        kind = draw.randrange(8)
        if kind == 0:
            del held[at]
        elif kind == 1:
            held.append(held[at])
        elif kind == 2:
            names = (
                name + "x",
                name.upper(),
                "../x",
                "/x",
                "",
                name.removesuffix(".npy"),
                f"x/{name}",
                "constants.pkl",
            )
            held[at] = (draw.choice(names), content)
        elif kind == 3:
            comment = draw.choice((b"", b"{", b"{}", b'{"count": "x"}', b"[" * 200, json_tree(comment, draw)))[:65000]
        else:
            held[at] = (name, (bytewise if kind == 4 else change)(content, draw))
        made = io.BytesIO()
        method = draw.choice((zipfile.ZIP_STORED,) * 6 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        with zipfile.ZipFile(made, "w", method) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that are there twice
            archive.comment = comment
            for name, content in held:
                archive.writestr(zipfile.ZipInfo(name), content, method)
        return made.getvalue()

    return zipped


def array(data: bytes, draw: random.Random) -> bytes:
    """Of an npy file: another header, of the right length."""
    if data[:6] != b"\x93NUMPY" or len(data) < 10:
        return bytewise(data, draw)
    length = int.from_bytes(data[8:10], "little")
    text, body = data[10 : 10 + length].decode("latin1"), data[10 + length :]
    kind = draw.randrange(5)
    if kind == 0:
        types = ("|u1", "|O", "<f8", ">f8", "<f4", "|S0", "<U2", "|V0", "<M8[s]", "<i8", "|b1", "", "x", "<f16", "<c8")
        text = re.sub(r"'descr': '[^']*'", f"'descr': '{draw.choice(types)}'", text)
    elif kind == 1:
        shapes = ("()", "(0,)", "(1,)", "(-1, 2, 2, 3)", "(2**9,)", "(99999999999, 9, 9, 3)", "(0, 9999999999, 9, 3)",
                  "(2, 2, 3)", "(1, 2, 2, 3)", "'x'", "None", "(True, 2, 2, 3)", "(1., 2, 2, 3)",
                  "[2, 2, 2, 3]")  # fmt: skip
        text = re.sub(r"'shape': \([^)]*\)", f"'shape': {draw.choice(shapes)}", text)
    elif kind == 2:
        text = text.replace("False", draw.choice(("True", "0", "None", "(", "x")))
    elif kind == 3:
        text = draw.choice(
            ("", "{", "{}", "[" * 300, "(" * 9000, "{'a': 1L}", "x = 1", "'''", "\0", "{'descr': [('x', '|u1')]}")
        )
    else:
        text = bytewise(text.encode("latin1"), draw).decode("latin1")
    version = draw.choice((1, 1, 1, 2, 3, 4))
    size = struct.pack("<H" if version == 1 else "<I", len(text) % 2**16)
    return data[:6] + bytes((version, 0)) + size + text.encode("latin1") + body


def pickled(data: bytes, draw: random.Random) -> bytes:
    """A pickle with an operation less, more, at another place, or with another argument."""
    starts: list[int] = []
    with contextlib.suppress(Exception):  # no pickle any more: what there is of one
        starts += [at for _, _, at in pickletools.genops(data) if at is not None]
    if len(starts) < 2:
        return bytewise(data, draw)
    number = draw.randrange(len(starts) - 1)
    first, end = starts[number], starts[number + 1]
    kind = draw.randrange(7)
    other = draw.randrange(len(starts) - 1)
    piece = data[starts[other] : starts[other + 1]]
    if kind == 0:
        return data[:first] + data[end:]
    if kind == 1:
        return data[:first] + piece + data[first:]
    if kind == 2:
        return data[:first] + piece + data[end:]
    if kind == 3:
        return data[:first] + draw.choice(_OPERATIONS) + data[draw.choice((first, end)) :]
    if kind == 4 and end - first > 1:
        return data[: first + 1] + bytewise(data[first + 1 : end], draw) + data[end:]
    if kind == 5 and end - first > 1:
        return data[: first + 1] + draw.randbytes(end - first - 1) + data[end:]
    return data[:first] + draw.choice(_NAMES) + data[end:]


_OPERATIONS = (
    b"0", b"1", b"2", b"(", b")", b"}", b"]", b"t", b"d", b"l", b"a", b"e", b"s", b"u", b"R", b"b", b"\x81",
    b"\x85", b"\x86", b"\x87", b"Q", b"q\x00", b"h\x00", b"K\x01", b"K\xff", b"J\xff\xff\xff\xff", b"N", b"\x88",
    b"I01\n", b"G\x7f\xf0\0\0\0\0\0\0",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"X\x01\0\0\0x", b"X\xff\xff\xff\x7f", b"T\xff\xff\xff\x7f", b"h\xff",
    b"r\xff\xff\xff\x7f", b"\x93", b"\x94", b"\x95\xff\0\0\0\0\0\0\0", b"\x8f", b"\x90", b"S'x'\n",
    b"P1\n", b"\x82\x01", b".",
)  # fmt: skip

_NAMES = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nSize\n", b"ctorch\nfloat64\n", b"ctorch\ndevice\n",
    b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n", b"cpathlib\nPosixPath\n",
    b"cnumpy\ndtype\n", b"cnumpy\nndarray\n",
    b"cnumpy._core.multiarray\n_reconstruct\n", b"cnumpy._core.multiarray\nscalar\n", b"c_codecs\nencode\n",
    b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch._utils\n_rebuild_qtensor\n",
    b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n",
    b"ctorch\nUntypedStorage\n", b"ctorch.serialization\n_get_layout\n", b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"ccollections\nCounter\n", b"cbuiltins\nbytearray\n", b"cbuiltins\nset\n", b"cbuiltins\ncomplex\n",
)  # fmt: skip


def picture(data: bytes, draw: random.Random) -> bytes:
    """Of a PNG: a chunk less, more, with another content or name, with the right sum."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return bytewise(data, draw)
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += size + 12
    if not chunks:
        return bytewise(data, draw)
    at = draw.randrange(len(chunks))
    name, content = chunks[at]
    kind = draw.randrange(6)
    if kind == 0:
        del chunks[at]
    elif kind == 1:
        chunks.insert(at, draw.choice(chunks))
    elif kind == 2:
        names = (
            b"IHDR",
            b"PLTE",
            b"tRNS",
            b"IDAT",
            b"IEND",
            b"iCCP",
            b"gAMA",
            b"acTL",
            b"fcTL",
            b"eXIf",
            b"zTXt",
            b"iTXt",
            b"pHYs",
        )
        chunks.insert(
            at, (draw.choice(names), draw.choice((b"", content, draw.randbytes(9), zlib.compress(bytes(10**6)))))
        )
    elif kind == 3 and name == b"IHDR":
        sides = (0, 1, 2, 16, 1000, 9000, 60000, 2**31 - 1, 2**31, 2**32 - 1)
        parts = draw.choice(sides), draw.choice(sides), draw.choice((1, 8, 16, 3)), draw.choice((0, 2, 3, 4, 6, 7))
        chunks[at] = (name, struct.pack(">IIBBBBB", *parts, 0, 0, draw.choice((0, 1))))
    else:
        chunks[at] = (name, bytewise(content, draw))
    made = [data[:8]]
    for name, content in chunks:
        made += [len(content).to_bytes(4, "big"), name, content, zlib.crc32(name + content).to_bytes(4, "big")]
    return b"".join(made)


KINDS: dict[str, tuple[Change, ...]] = {
    "bytes": (bytewise,),
    "text": (bytewise,),
    "json": (json_tree, json_tree, json_tree, bytewise),
    "toml": (toml_lines, toml_lines, toml_lines, bytewise),
    "safetensors": (safetensors, safetensors, safetensors, bytewise),
    "npz": (members(array), members(array), bytewise),
    "pytorch": (members(pickled), members(pickled), members(pickled), bytewise),
    "pickle": (pickled, pickled, pickled, bytewise),
    "picture": (picture, picture, bytewise),
}
"""Changes by what a file is."""


def kind_of(data: bytes) -> str:
    """What a file is, by its first bytes."""
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") < 2**32:
        return "safetensors"
    if data.startswith(b"PK"):
        return "pytorch" if b"data.pkl" in data else "npz"
    if data.startswith(b"\x80"):
        return "pickle"
    if data.startswith((b"\x89PNG", b"\xff\xd8")):
        return "picture"
    return "json" if data.lstrip()[:1] in (b"{", b"[") else "text"


def mutated(data: bytes, draw: random.Random, kind: str = "") -> bytes:
    """A file with one to four changes."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        data = draw.choice(KINDS[kind or kind_of(data)])(data, draw)
    return data

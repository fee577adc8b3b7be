"""A name always stands for a whole file or folder, and text is read whoever wrote it."""

import dataclasses
import os
from typing import Any

import pytest

from ddfast.errors import DDFastError
from ddfast.files import check_new, expect, read_text, reading, whole_file, whole_folder, write_atomically


def test_a_file_is_its_old_content_or_all_of_the_new(tmp_path):
    path = tmp_path / "folder" / "x"
    write_atomically(path, "old")

    def half(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert {file.name: file.read_text() for file in path.parent.iterdir()} == {"x": "old"}
    write_atomically(path, b"new", durable=False)
    assert {file.name: file.read_text() for file in path.parent.iterdir()} == {"x": "new"}


def test_what_writes_to_no_open_file(tmp_path):
    with whole_file(tmp_path / "x") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "x").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    with pytest.raises(DDFastError, match=r"cannot write .*/x: No space left"), whole_file(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x": "new"}


def test_only_durable_files_wait_for_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    write_atomically(tmp_path / "x", "a", durable=False)
    assert not synced
    write_atomically(tmp_path / "x", "a")
    assert len(synced) == 2  # the file, and its name in the folder


def test_a_folder_is_new_or_as_it_was(tmp_path):
    for content in ("first", "second"):
        with whole_folder(tmp_path / "x", last="z") as temporary:
            for name in ("z", "a"):
                (temporary / name).write_text(content)
        assert {path.name: path.read_text() for path in (tmp_path / "x").iterdir()} == {"a": content, "z": content}
    with pytest.raises(ValueError, match="stop"), whole_folder(tmp_path / "x", last="z") as temporary:
        (temporary / "a").write_text("third")
        raise ValueError("stop")
    assert (tmp_path / "x" / "a").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_is_there_or_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    check_new(tmp_path / "new" / "folders" / "y", "--to")
    assert not (tmp_path / "new").exists()
    with pytest.raises(DDFastError, match=r"--to .*/x exists; choose another name, or delete it"):
        check_new(tmp_path / "x", "--to")
    with pytest.raises(DDFastError, match=r"cannot write .*/x/y: .*/x is not a directory"):
        check_new(tmp_path / "x" / "y", "--to")


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(DDFastError, match=r"cannot write .*/x: .* may not be written to"):
        check_new(tmp_path / "x", "--to")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_of_any_editor(tmp_path, encoding):
    (tmp_path / "x").write_bytes("größe\r\n猫\n".encode(encoding))
    assert read_text(tmp_path / "x") == "größe\r\n猫\n"


def test_what_is_no_text(tmp_path):
    (tmp_path / "x").write_bytes("größe".encode("latin-1"))
    with pytest.raises(DDFastError, match=r"x is not UTF-8 text \(.*\); save it as UTF-8"):
        read_text(tmp_path / "x")
    with pytest.raises(DDFastError, match=r"cannot read .*/y: No such file"):
        read_text(tmp_path / "y")


@dataclasses.dataclass
class Thing:
    name: str
    sizes: tuple[int, int]
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    point: int | None = None


def test_what_json_says_has_its_type():
    made = expect({"name": "a", "sizes": [1, 2], "figures": {"x": 1, "y": float("inf")}, "point": None}, Thing)
    assert made == Thing("a", (1, 2), {"x": 1, "y": float("inf")})
    assert expect([[True, "a"]], list[tuple[bool, str]]) == [(True, "a")]
    assert expect((1, 2, 3), tuple[int, ...]) == (1, 2, 3)
    assert expect({"x": [None]}, dict[str, Any]) == {"x": [None]}


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ([], dict[str, int], r"content: got a list of 0, expected dict\[str, int\]"),
        ({"x": "1"}, dict[str, int], "x: got '1', expected int"),
        ({"x": True}, dict[str, int], "x: got True, expected int"),
        ({"x": 1.0}, dict[str, int], "x: got 1.0, expected int"),
        ({"x": 10**30}, dict[str, float], "x: got 1000000000000000000000000000000, expected float"),
        ([1], tuple[int, int], "got a list of 1"),
        (1, bool, "got 1, expected bool"),
        (None, str, "got nothing, expected str"),
        ("x" * 500, int | None, "got 'x{70,80}"),
        ({"name": "a"}, Thing, "sizes is missing"),
        ({"name": "a", "sizes": [1, 2], "": 1}, Thing, "'' is unknown"),
        ({"name": "a", "sizes": [1, "2"]}, Thing, "sizes: got '2', expected int"),
    ],
)
def test_what_has_another_type_is_named(value, kind, words):
    with pytest.raises(ValueError, match=words):
        expect(value, kind)


def test_whatever_a_message_repeats_it_is_one_line():
    text = str(DDFastError("a\nb\x1b[2J\u2028c\ud800 ä"))
    assert text == "a b\\x1b[2J c\\ud800 ä"
    assert text.encode()


@pytest.mark.parametrize(
    "error", [RuntimeError("x\ny"), NotImplementedError("x"), KeyError("x"), MemoryError(), EOFError()]
)
def test_what_others_code_says_of_a_file_names_it(error):
    with pytest.raises(DDFastError, match=r"^a\.zip is damaged or cannot be read: .") as caught, reading("a.zip"):
        raise error
    assert str(caught.value).isprintable()

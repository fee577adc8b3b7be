"""What leaves the machine names no folder of it: files by their base names, with hashes of their contents.

A folder's name tells who the user is and how the machine is laid out, and helps nobody elsewhere. Which artefacts keep
to this, and which stay local: docs/teachers.md.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

import tomli_w

from ddfast.config import DD1_PREFIX


def base_name(text: str) -> str:
    """The last part of a path of any system (of `dd1:PATH` too); a text that is none, as it is.

    The home folder's own name is the user's: it becomes `~`.
    """
    prefix = DD1_PREFIX if text.startswith(DD1_PREFIX) else ""
    path = text.removeprefix(prefix).rstrip("/\\") or text.removeprefix(prefix)
    if path == os.path.expanduser("~"):
        return f"{prefix}~"
    return prefix + re.split(r"[/\\]", path)[-1]


def portable(value: Any) -> Any:
    """Settings as TOML and JSON hold them, with base names for paths, at any depth."""
    if isinstance(value, Mapping):
        return {name: portable(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(inner) for inner in value]
    return base_name(value) if isinstance(value, str) else value


def portable_command(line: str) -> str:
    """A command line with base names for paths, after `--option=` too."""
    return shlex.join("=".join(map(base_name, word.split("=", 1))) for word in shlex.split(line))


def shared_settings(values: Mapping[str, Any], files: Mapping[str, Mapping[str, str]]) -> str:
    """Settings as TOML for others, with a comment for every file that they name.

    Args:
        values: as a run's config.toml has them.
        files: of each by its setting, `file` and `sha256` (`ddfast.runs.hashed_files`).
    """
    told = (f"# {name}: {said['file']}, SHA-256 {said['sha256']}\n" for name, said in files.items())
    return tomli_w.dumps(portable(values)) + "".join(told)

"""`ddfast doctor`: versions, compiled backends, and which backend each op uses and why."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ddfast import cli
from ddfast.diagnosis import diagnosis
from ddfast.errors import DDFastError
from ddfast.ops import native


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. `--check` fails where the CPU kernels are missing."""

    def body(rest: list[str]) -> None:
        if rest in (["--help"], ["-h"]):
            print("usage: ddfast doctor [--check]\n\n--check: exit with an error where the CPU kernels are missing")
            return
        unknown = [argument for argument in rest if argument != "--check"]
        if unknown:
            raise DDFastError(f"unknown option {unknown[0]!r}; known: --check")
        print("\n".join(diagnosis()))
        if "--check" in rest and native.cpu is None:
            raise DDFastError(native.cpu_reason)

    return cli.run("doctor", body, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""`ddfast sample`: images or codes from a distilled student."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ddfast import cli, processes
from ddfast.config import ParallelConfig
from ddfast.drawing import SampleOptions, draw
from ddfast.messages import say
from ddfast.progress import progress_bar
from ddfast.runs import check_device

EXAMPLES = """  python -m ddfast.sample --student runs/digits --steps 2 --classes 1,2,3 --count 12
  python -m ddfast.sample --student runs/digits --teacher-steps 4 --format files --to images
  python -m ddfast.sample --student runs/digits --format codes --count 1000
  torchrun --nproc-per-node 8 -m ddfast.sample --student var-d16 --format files --count 50000 --to images
  python -m ddfast.sample --student t2i --caption "a red bird on a branch" --caption "two dogs" --count 4
  python -m ddfast.sample --student var-d16 --steps 0 --guidance.cfg-scale 4 --guidance.top-p 0.96 --classes 207"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def body(rest: list[str]) -> None:
        options = cli.parse_plain("sample", SampleOptions, rest, EXAMPLES)
        check_device(options.device)
        with processes.together(options.device, ParallelConfig().timeout):
            say("\n".join(draw(options, progress_bar)))

    return cli.run("sample", body, arguments)


if __name__ == "__main__":
    sys.exit(main())

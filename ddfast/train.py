"""`ddfast train`: everything from a teacher to a distilled student and its report."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ddfast import cli
from ddfast.config import TrainConfig
from ddfast.pipeline import train
from ddfast.progress import progress_bar

EXAMPLES = """  python -m ddfast.train --recipe digits --method dd1
  python -m ddfast.train --out runs/long --dd1.iterations 5000 --seed 1
  python -m ddfast.train --out runs/digits --resume
  torchrun --standalone --nproc-per-node 2 -m ddfast.train --out runs/digits --parallel.micro-batch 64
Many GPUs and nodes, and little memory: docs/scale.md."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def body(rest: list[str]) -> None:
        options = cli.parse("train", TrainConfig, rest, EXAMPLES)
        cli.check_effect(rest, {**cli.of_other_methods(options), **cli.of_other_weights(options)})
        train(options, progress_bar=progress_bar)

    return cli.run("train", body, arguments)


if __name__ == "__main__":
    sys.exit(main())

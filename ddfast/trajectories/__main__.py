"""`ddfast trajectories`: DD1's training pairs into a store."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from ddfast import cli, processes
from ddfast.config import TrainConfig
from ddfast.messages import say
from ddfast.models.loading import build_teacher
from ddfast.pipeline import make_trajectories
from ddfast.progress import progress_bar
from ddfast.runs import check_device

EXAMPLES = """  python -m ddfast.trajectories --recipe digits --count 20000 --out runs/digits
  torchrun --nproc-per-node 8 -m ddfast.trajectories --count 1200000 --out runs/many"""


@dataclasses.dataclass(kw_only=True)
class TrajectoriesOptions(TrainConfig):
    """Settings of the pairs; the store is OUT/trajectories.

    Attributes:
        count: pairs that the store shall hold at least; None: the recipe's.
    """

    count: int | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def body(rest: list[str]) -> None:
        options = cli.parse("trajectories", TrajectoriesOptions, rest, EXAMPLES)
        cli.check_effect(rest, {"resume": "the store goes on by itself", **cli.of_other_weights(options)})
        if options.count is not None:
            options.trajectories.count = options.count
            options.trajectories.__post_init__()
        check_device(options.device)
        limit, kept = options.parallel.timeout, "finished shards are kept"
        with processes.together(options.device, limit, option="--parallel.timeout", kept=kept):
            teacher = build_teacher(options, progress_bar("teacher"))
            store = make_trajectories(options, teacher, progress_bar("trajectories"))
            say(f"{store.num_shards() * store.settings.shard_size} pairs in {store.path}")

    return cli.run("trajectories", body, arguments)


if __name__ == "__main__":
    sys.exit(main())

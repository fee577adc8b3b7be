"""`ddfast plan`: whether a training fits, how it would be split, and what it takes, without weights or a GPU."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ddfast import cli
from ddfast.config import SettingError, TrainConfig
from ddfast.files import check_new, write_atomically
from ddfast.planning import GPUS, Machine, as_json, lines, parse_bytes, plan

EXAMPLES = """  python -m ddfast.plan --recipe var-d24 --method dd2 --devices 8 --memory 80GiB
  python -m ddfast.plan --recipe llamagen-l --devices 16 --nodes 2 --gpu h100 --mfu 0.5
  python -m ddfast.plan --recipe var-d16 --devices 1 --memory 24GiB --dd1.batch-size 64 --json plan.json"""


@dataclasses.dataclass(kw_only=True)
class PlanOptions(TrainConfig):
    """The machine to plan for, beside the settings of `ddfast train`.

    Attributes:
        devices: GPUs of the whole job.
        nodes: that they are in, in equal numbers.
        memory: of a GPU.
        gpu: whose FLOPs and memory per second hours are told by.
        peak_flops: FLOPs per second of a GPU in the precision of training; 0: the data sheet's.
        mfu: share of them that training reaches.
        json: file for all figures, in bytes, FLOPs and hours; -: standard output, in the table's place.
    """

    devices: int = 8
    nodes: int = 1
    memory: str = "80GiB"
    gpu: Literal["a100", "h100", "h200"] = "a100"
    peak_flops: float = 0.0
    mfu: float = 0.4
    json: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.peak_flops >= 0:
            raise SettingError(f"peak_flops: got {self.peak_flops}, expected a positive number, or 0: the data sheet's")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 0 also where the training does not fit."""

    def body(rest: list[str]) -> None:
        options = cli.parse("plan", PlanOptions, rest, EXAMPLES)
        cli.check_effect(
            rest,
            cli.of_other_methods(options) | dict.fromkeys(("out", "resume", "device"), "nothing is run or written"),
        )
        to_file = options.json not in ("", "-")
        if to_file:
            check_new(Path(options.json), "--json")
        gpu = GPUS[options.gpu]
        if options.peak_flops:
            gpu = dataclasses.replace(gpu, bfloat16=options.peak_flops, float32=options.peak_flops)
        machine = Machine(
            devices=options.devices, nodes=options.nodes, memory=parse_bytes(options.memory), gpu=gpu, mfu=options.mfu
        )
        config = TrainConfig(**{field.name: getattr(options, field.name) for field in dataclasses.fields(TrainConfig)})
        found = plan(config, machine)
        text = json.dumps(as_json(found), indent=2)
        print(text if options.json == "-" else "\n".join(lines(found)))
        if to_file:
            write_atomically(Path(options.json), text + "\n")

    return cli.run("plan", body, arguments)


if __name__ == "__main__":
    sys.exit(main())

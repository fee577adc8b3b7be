"""Providers of one computation, timed in turn in one process: the ratio is the result, not the seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def waited(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, which returns once a GPU has done its work too."""

    def both() -> Any:
        made = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return made

    return both


def side_by_side(
    benchmark: Any, providers: dict[str, Callable[[], Any]], *, rounds: int = 10, warm_up: int = 2, **facts: Any
) -> None:
    """Time every provider once per round, so that whatever else the machine does meets all of them alike.

    The provider "ddfast" is also what pytest-benchmark reports. `extra_info` gets, per provider, the median with the
    20th and 80th percentile in milliseconds, how many times ddfast is faster, and `facts` (floors, shapes).
    """
    providers = {name: waited(call) for name, call in providers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for call in providers.values():
        for _ in range(warm_up):
            call()
    for _ in range(rounds):
        for name, call in providers.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    benchmark.pedantic(providers["ddfast"], rounds=rounds, warmup_rounds=1)
    ours = statistics.median(seconds["ddfast"])
    report = {}
    for name, values in seconds.items():
        cuts = statistics.quantiles(values, n=5)
        report[name] = {
            "median_ms": 1e3 * statistics.median(values),
            "p20_ms": 1e3 * cuts[0],
            "p80_ms": 1e3 * cuts[3],
            "ddfast_is_faster_by": statistics.median(values) / ours,
        }
    benchmark.extra_info.update(providers=report, threads=torch.get_num_threads(), torch=torch.__version__, **facts)
    print("\n" + benchmark.name)
    for name, row in sorted(report.items(), key=lambda item: item[1]["median_ms"]):
        spread = f"[{row['p20_ms']:.3f}, {row['p80_ms']:.3f}]"
        print(
            f"  {name:26s} {row['median_ms']:10.3f} ms {spread:22s} ddfast is {row['ddfast_is_faster_by']:.2f}x as fast"
        )
